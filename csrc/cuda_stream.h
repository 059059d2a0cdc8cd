// cuda_stream.h: the stream that a driver works on: order, fences, waiting.
// Owns: events.  Thread-safety: all methods, two mutexes, of which none is held while waiting.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda_library.h"
#include "driver.h"

namespace vmalloc::cuda {

/// Work is numbered as it is enqueued, so that one can ask whether a given piece is done. Requires,
/// for every method but the constructor: the device's context is current in the calling thread.
class WorkStream {
 public:
  explicit WorkStream(Library& library) : library_(library) {}
  WorkStream(const WorkStream&) = delete;
  WorkStream& operator=(const WorkStream&) = delete;

  /// Work on `stream` from now on, after all that is on the one before. Costs nothing if it is the
  /// same. The caller keeps both alive.
  void use(Stream stream);
  [[nodiscard]] bool is_on(Stream stream);

  /// Enqueue what `work(stream)` enqueues; false if the driver is out of memory. Sets `*number`.
  template <typename Work>
  [[nodiscard]] bool try_enqueue(const char* call, std::uint64_t* number, Work work) {
    const std::lock_guard<std::mutex> lock(stream_mutex_);
    if (!library_.try_check(call, work(stream_))) return false;
    *number = ++num_enqueued_;
    return true;
  }

  /// Whether a piece of work is known to be done, without asking the device.
  [[nodiscard]] bool is_done(std::uint64_t number) const { return number <= num_done_; }

  /// Wait for all that was enqueued, kernels of others included.
  void wait();

  [[nodiscard]] std::optional<Fence> try_record_fence();
  [[nodiscard]] bool fence_passed(Fence fence);
  [[nodiscard]] std::uint64_t num_waits() const { return num_waits_; }
  [[nodiscard]] std::uint64_t num_enqueued() const { return num_enqueued_; }

  /// Destroy the events, as far as the driver still answers.
  void close() noexcept;

 private:
  struct Recorded {
    Fence fence;
    Event event;
    std::uint64_t num_enqueued;
  };
  [[nodiscard]] Event try_take_event();  // null if the driver is out of memory
  void note_done(std::uint64_t number);

  Library& library_;
  std::mutex stream_mutex_;  // whoever enqueues, so that a change of the stream keeps the order
  StreamHandle stream_ = nullptr;
  std::atomic<std::uint64_t> num_enqueued_{0};
  std::atomic<std::uint64_t> num_done_{0};
  std::atomic<std::uint64_t> num_waits_{0};

  std::mutex fence_mutex_;  // after stream_mutex_
  std::deque<Recorded> recorded_;
  std::vector<Event> events_;  // not in use
  Fence next_fence_ = 1;
  Fence passed_ = 0;
};

}  // namespace vmalloc::cuda
