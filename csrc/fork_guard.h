// fork_guard.h: tells an object whether it lives in a process forked after it was made.
// Owns: one process-wide fork counter.  Thread-safety: all methods.
#pragma once

#include <cstdint>

namespace vmalloc {

/// Mappings, threads and locks do not survive fork(), so whoever holds some refuses to work there.
class ForkGuard {
 public:
  ForkGuard();
  [[nodiscard]] bool is_forked_child() const;
  /// Throws ClosedError in a forked child; `what` names the object.
  void check(const char* what) const;

 private:
  std::uint64_t generation_;
};

}  // namespace vmalloc
