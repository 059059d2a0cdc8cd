#include "contexts.h"

#include <atomic>

#include "reason.h"

namespace fakecuda {

std::vector<std::uint64_t>& thread_contexts() {
  thread_local std::vector<std::uint64_t> stack;
  return stack;
}

std::uint64_t current_context() { return thread_contexts().empty() ? 0 : thread_contexts().back(); }

std::uint64_t PrimaryContext::retain() {
  if (num_references_++ == 0) handle_ = next_handle();
  return handle_;
}

CUresult PrimaryContext::release() {
  if (num_references_ == 0) {
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "release of a primary context that nobody retained");
  }
  --num_references_;
  return CUDA_SUCCESS;
}

CUresult PrimaryContext::check_current() const {
  const std::uint64_t current = current_context();
  if (current == 0) return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context current on this thread");
  if (current != handle()) {
    return refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED, "this thread's context was released");
  }
  return CUDA_SUCCESS;
}

/// Never used twice in a process, also over fakecuda_reset: other threads may still hold old ones.
std::uint64_t PrimaryContext::next_handle() {
  static std::atomic<std::uint64_t> next{0x3000'0000};
  return next.fetch_add(0x100) + 0x100;
}

}  // namespace fakecuda
