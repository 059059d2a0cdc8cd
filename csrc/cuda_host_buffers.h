// cuda_host_buffers.h: pinned host memory for swapped-out pages, kept for the next ones.
// Owns: the free buffers.  Thread-safety: all methods.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_library.h"
#include "fork_guard.h"

namespace vmalloc::cuda {

/// Pinning takes the driver about a millisecond a page, so freed buffers of one size are kept, up
/// to a limit. Buffers in use keep this object alive.
class HostBuffers : public std::enable_shared_from_this<HostBuffers> {
 public:
  HostBuffers(Library& library, Context context, std::size_t buffer_bytes)
      : library_(library), context_(context), buffer_bytes_(buffer_bytes) {}
  HostBuffers(const HostBuffers&) = delete;
  HostBuffers& operator=(const HostBuffers&) = delete;

  /// Null if there is no memory for it. Throws DriverError.
  [[nodiscard]] std::shared_ptr<char[]> try_allocate(std::size_t bytes);

  /// Free the buffers that nobody uses, and keep none from now on.
  void close() noexcept;

  /// Keep the buffers to the end of the process: the driver is gone.
  void forget() noexcept;

 private:
  static constexpr std::size_t kMaxFree = 64;

  void give_back(char* buffer, std::size_t bytes) noexcept;

  Library& library_;
  Context context_;
  std::size_t buffer_bytes_;
  ForkGuard guard_;
  std::mutex mutex_;
  std::vector<char*> free_;
  bool is_closed_ = false;
  bool is_forgotten_ = false;
};

}  // namespace vmalloc::cuda
