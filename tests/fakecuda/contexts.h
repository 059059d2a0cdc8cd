// contexts.h: the device's primary context, and which context each thread has current.
// Owns: the retain count.  Thread-safety: the count is guarded by State's mutex; a thread's
// current context is its own.
#pragma once

#include <cstdint>
#include <vector>

#include "abi.h"

namespace fakecuda {

/// Contexts the calling thread pushed; the last one is current. 0 stands for none.
std::vector<std::uint64_t>& thread_contexts();
std::uint64_t current_context();

class PrimaryContext {
 public:
  /// Each first retain makes a new context, so that use of a released one is noticed.
  std::uint64_t retain();
  CUresult release();
  /// SUCCESS if the calling thread has this context current, 201 or 709 otherwise.
  CUresult check_current() const;

  std::uint64_t handle() const { return num_references_ > 0 ? handle_ : 0; }
  bool is_active() const { return num_references_ > 0; }

  /// Every call that uses the device returns this once a kernel or copy has failed.
  CUresult sticky_error = CUDA_SUCCESS;

 private:
  static std::uint64_t next_handle();

  std::uint64_t handle_ = 0;
  std::size_t num_references_ = 0;
};

}  // namespace fakecuda
