#include "cuda_host_buffers.h"

#include "cuda_device.h"

namespace vmalloc::cuda {

std::shared_ptr<char[]> HostBuffers::try_allocate(std::size_t bytes) {
  char* buffer = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes == buffer_bytes_ && !free_.empty()) {
      buffer = free_.back();
      free_.pop_back();
    }
  }
  if (buffer == nullptr) {
    const CurrentContext current(library_, context_);
    void* pinned = nullptr;
    const Result result = library_.cuMemHostAlloc(&pinned, bytes, kHostPortable);
    if (!library_.try_check("cuMemHostAlloc", result)) return nullptr;
    buffer = static_cast<char*>(pinned);
  }
  return std::shared_ptr<char[]>(
      buffer, [self = shared_from_this(), bytes](char* done) { self->give_back(done, bytes); });
}

void HostBuffers::give_back(char* buffer, std::size_t bytes) noexcept {
  if (guard_.is_forked_child()) return;  // the buffers are the parent's
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_forgotten_) return;
  if (bytes == buffer_bytes_ && !is_closed_ && free_.size() < kMaxFree) {
    free_.push_back(buffer);
    return;
  }
  try {
    const CurrentContext current(library_, context_);
    Library::give_back([&] { return library_.cuMemFreeHost(buffer); });
  } catch (const DriverError&) {
    // A driver that is gone has unpinned it.
  }
}

void HostBuffers::close() noexcept {
  std::vector<char*> buffers;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closed_ = true;
    buffers.swap(free_);
  }
  for (char* const buffer : buffers) {
    Library::give_back([&] { return library_.cuMemFreeHost(buffer); });
  }
}

void HostBuffers::forget() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_forgotten_ = true;
  free_.clear();
}

}  // namespace vmalloc::cuda
