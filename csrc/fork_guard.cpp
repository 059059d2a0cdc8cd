#include "fork_guard.h"

#include <pthread.h>

#include <atomic>
#include <string>

#include "error.h"

namespace vmalloc {
namespace {

std::atomic<std::uint64_t> num_forks{0};  // forks between the first process and this one

void count_fork() { num_forks.fetch_add(1, std::memory_order_relaxed); }

bool register_handler() { return pthread_atfork(nullptr, nullptr, count_fork) == 0; }

}  // namespace

ForkGuard::ForkGuard() {
  static const bool registered = register_handler();
  static_cast<void>(registered);
  generation_ = num_forks.load(std::memory_order_relaxed);
}

bool ForkGuard::is_forked_child() const {
  return num_forks.load(std::memory_order_relaxed) != generation_;
}

void ForkGuard::check(const char* what) const {
  if (is_forked_child()) {
    throw ClosedError(std::string(what) +
                      " belongs to the parent of this forked process; make a new one here, or "
                      "start workers with the 'spawn' method");
  }
}

}  // namespace vmalloc
