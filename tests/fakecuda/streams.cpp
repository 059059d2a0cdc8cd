#include "streams.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace fakecuda {
namespace {

constexpr std::uint64_t kLegacyId = 1;
constexpr std::uint64_t kLastSpecialHandle = 2;  // 0 default, 1 legacy, 2 per-thread default
constexpr std::uint64_t kHandleStep = 16;

}  // namespace

StreamTable::StreamTable(std::function<CUresult(const Operation&)> execute)
    : execute_(std::move(execute)) {
  streams_[kLegacyId].id = kLegacyId;
}

std::uint64_t StreamTable::create_stream(std::uint64_t context, bool is_blocking) {
  next_id_ += kHandleStep;
  Stream& stream = streams_[next_id_];
  stream.id = next_id_;
  stream.context = context;
  stream.is_blocking = is_blocking;
  return next_id_;
}

void StreamTable::destroy_stream(Stream& stream) {
  stream.is_destroyed = true;
  forget_finished();
}

Stream* StreamTable::find_stream(std::uint64_t handle, std::uint64_t context) {
  if (handle <= kLastSpecialHandle) return &streams_.at(kLegacyId);
  const auto found = streams_.find(handle);
  if (found == streams_.end() || found->second.is_destroyed) return nullptr;
  return found->second.context == context ? &found->second : nullptr;
}

std::uint64_t StreamTable::create_event(std::uint64_t context) {
  next_id_ += kHandleStep;
  events_[next_id_].context = context;
  return next_id_;
}

Event* StreamTable::find_event(std::uint64_t handle, std::uint64_t context) {
  const auto found = events_.find(handle);
  return found != events_.end() && found->second.context == context ? &found->second : nullptr;
}

void StreamTable::enqueue(Stream& stream, Operation operation) {
  operation.number = next_number_++;
  stream.queue.push_back(operation);
}

void StreamTable::record(Event& event, Stream& stream) {
  Operation mark;
  mark.kind = OperationKind::kRecord;
  enqueue(stream, mark);
  event.stream = stream.id;
  event.number = stream.queue.back().number;
  event.num_pending_queries = 0;
}

void StreamTable::wait(Stream& stream, const Event& event) {
  if (is_complete(event)) return;
  Operation wait;
  wait.kind = OperationKind::kWait;
  wait.awaited_stream = event.stream;
  wait.awaited_number = event.number;
  enqueue(stream, wait);
}

bool StreamTable::is_complete(const Event& event) const {
  const auto found = streams_.find(event.stream);
  return found == streams_.end() || found->second.last_run >= event.number;
}

CUresult StreamTable::run(Stream& stream) {
  if (stream.queue.empty()) return CUDA_SUCCESS;
  return run_limits({{stream.id, stream.queue.back().number}});
}

CUresult StreamTable::run(const Event& event) {
  if (is_complete(event)) return CUDA_SUCCESS;
  return run_limits({{event.stream, event.number}});
}

CUresult StreamTable::run_all() {
  Limits limits;
  for (const auto& [id, stream] : streams_) limits[id] = next_number_;
  return run_limits(std::move(limits));
}

/// Raises the limits until everything that the named work waits for is inside them.
void StreamTable::add_dependencies(Limits* limits) const {
  Limits seen;
  std::vector<std::uint64_t> todo;
  for (const auto& [id, limit] : *limits) todo.push_back(id);
  const auto need = [&](std::uint64_t id, std::uint64_t number) {
    std::uint64_t& limit = (*limits)[id];
    if (number <= limit) return;
    limit = number;
    todo.push_back(id);
  };
  while (!todo.empty()) {
    const std::uint64_t id = todo.back();
    todo.pop_back();
    const auto found = streams_.find(id);
    if (found == streams_.end()) continue;
    const Stream& stream = found->second;
    const std::uint64_t limit = limits->at(id);
    const auto is_before = [](const Operation& operation, std::uint64_t number) {
      return operation.number < number;
    };
    auto operation =
        std::lower_bound(stream.queue.begin(), stream.queue.end(), seen[id] + 1, is_before);
    std::uint64_t last = 0;
    for (; operation != stream.queue.end() && operation->number <= limit; ++operation) {
      last = operation->number;
      if (operation->kind == OperationKind::kWait) {
        need(operation->awaited_stream, operation->awaited_number);
      }
    }
    seen[id] = limit;
    if (last == 0 || !stream.is_blocking) continue;
    if (id != kLegacyId) {
      need(kLegacyId, last - 1);
      continue;
    }
    for (const auto& [other_id, other] : streams_) {
      if (other_id != kLegacyId && other.is_blocking) need(other_id, last - 1);
    }
  }
}

CUresult StreamTable::run_limits(Limits limits) {
  add_dependencies(&limits);
  std::vector<std::pair<std::uint64_t, Stream*>> order;
  for (const auto& [id, limit] : limits) {
    const auto found = streams_.find(id);
    if (found == streams_.end()) continue;
    for (const Operation& operation : found->second.queue) {
      if (operation.number > limit) break;
      order.emplace_back(operation.number, &found->second);
    }
  }
  std::sort(order.begin(), order.end());
  for (const auto& [number, stream] : order) {
    const Operation operation = stream->queue.front();
    stream->queue.pop_front();
    stream->last_run = number;
    if (const CUresult code = execute_(operation)) {
      drop_all();
      return code;
    }
  }
  forget_finished();
  return CUDA_SUCCESS;
}

void StreamTable::drop_all() {
  for (auto& [id, stream] : streams_) {
    if (!stream.queue.empty()) stream.last_run = stream.queue.back().number;
    stream.queue.clear();
  }
  forget_finished();
}

std::size_t StreamTable::num_streams() const {
  std::size_t count = 0;
  for (const auto& [id, stream] : streams_) count += id != kLegacyId && !stream.is_destroyed;
  return count;
}

/// A destroyed stream stays until its work is done, as the driver's own text promises.
void StreamTable::forget_finished() {
  for (auto stream = streams_.begin(); stream != streams_.end();) {
    const bool is_over = stream->second.is_destroyed && stream->second.queue.empty();
    stream = is_over ? streams_.erase(stream) : std::next(stream);
  }
}

}  // namespace fakecuda
