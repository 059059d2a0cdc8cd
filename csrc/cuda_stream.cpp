#include "cuda_stream.h"

namespace vmalloc::cuda {
namespace {

/// The engine names its stream by the handle's value.
StreamHandle to_handle(Stream stream) {
  return reinterpret_cast<StreamHandle>(static_cast<std::uintptr_t>(stream));
}

}  // namespace

bool WorkStream::is_on(Stream stream) {
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  return to_handle(stream) == stream_;
}

void WorkStream::use(Stream stream) {
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  const StreamHandle next = to_handle(stream);
  Event event = nullptr;
  {
    const std::lock_guard<std::mutex> fence_lock(fence_mutex_);
    event = try_take_event();
  }
  if (event == nullptr) {  // slower, and right
    ++num_waits_;
    library_.check("cuStreamSynchronize", library_.cuStreamSynchronize(stream_));
    stream_ = next;
    return;
  }
  const Result recorded = library_.cuEventRecord(event, stream_);
  const Result waited =
      recorded == kSuccess ? library_.cuStreamWaitEvent(next, event, 0) : recorded;
  {
    // A wait that is enqueued keeps what the event stood for then.
    const std::lock_guard<std::mutex> fence_lock(fence_mutex_);
    events_.push_back(event);
  }
  library_.check("cuEventRecord", recorded);
  library_.check("cuStreamWaitEvent", waited);
  stream_ = next;
}

void WorkStream::wait() {
  StreamHandle stream = nullptr;
  std::uint64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(stream_mutex_);
    stream = stream_;
    number = num_enqueued_;
  }
  ++num_waits_;
  library_.check("cuStreamSynchronize", library_.cuStreamSynchronize(stream));
  note_done(number);
}

std::optional<Fence> WorkStream::try_record_fence() {
  const std::lock_guard<std::mutex> lock(stream_mutex_);
  const std::lock_guard<std::mutex> fence_lock(fence_mutex_);
  const Event event = try_take_event();
  if (event == nullptr) return std::nullopt;
  const Result result = library_.cuEventRecord(event, stream_);
  if (result != kSuccess) {
    events_.push_back(event);
    if (!library_.try_check("cuEventRecord", result)) return std::nullopt;
  }
  recorded_.push_back({next_fence_, event, num_enqueued_});
  return next_fence_++;
}

bool WorkStream::fence_passed(Fence fence) {
  const std::lock_guard<std::mutex> lock(fence_mutex_);
  while (fence > passed_ && !recorded_.empty()) {
    const Result result = library_.cuEventQuery(recorded_.front().event);
    if (result == kNotReady) break;
    library_.check("cuEventQuery", result);
    passed_ = recorded_.front().fence;
    note_done(recorded_.front().num_enqueued);
    events_.push_back(recorded_.front().event);
    recorded_.pop_front();
  }
  return fence <= passed_;
}

void WorkStream::note_done(std::uint64_t number) {
  std::uint64_t done = num_done_;
  while (done < number && !num_done_.compare_exchange_weak(done, number)) {
  }
}

Event WorkStream::try_take_event() {
  Event event = nullptr;
  if (!events_.empty()) {
    event = events_.back();
    events_.pop_back();
  } else if (!library_.try_check("cuEventCreate",
                                 library_.cuEventCreate(&event, kEventDisableTiming))) {
    return nullptr;
  }
  return event;
}

void WorkStream::close() noexcept {
  const std::lock_guard<std::mutex> lock(fence_mutex_);
  for (const Recorded& recorded : recorded_) events_.push_back(recorded.event);
  recorded_.clear();
  for (const Event event : events_) {
    Library::give_back([&] { return library_.cuEventDestroy(event); });
  }
  events_.clear();
}

}  // namespace vmalloc::cuda
