// streams.h: lazy queues of device work, and the events that mark places in them.
// Owns: queues and events.  Thread-safety: none; State's mutex guards it.
//
// Every operation has a number from one counter, so "before" means a smaller number anywhere.
// Waiting for a place runs exactly what that place depends on, in the order of the numbers:
// earlier work of its stream, what awaited events captured, and the rules of the legacy stream.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>

#include "abi.h"

namespace fakecuda {

enum class OperationKind { kTouch, kCopy, kFill, kRecord, kWait };

/// A range of device or host memory that an operation reads or writes.
struct Span {
  std::uint64_t address = 0;
  bool is_host = false;
  bool is_pinned = false;  // host memory of cuMemHostAlloc when it was enqueued
};

struct Operation {
  OperationKind kind = OperationKind::kTouch;
  std::uint64_t number = 0;
  Span source;
  Span destination;  // kTouch: the range, whichever way it is used
  std::size_t bytes = 0;
  unsigned char value = 0;           // kFill
  bool is_write = false;             // kTouch
  std::uint64_t awaited_stream = 0;  // kWait: what the event had captured
  std::uint64_t awaited_number = 0;
};

struct Stream {
  std::uint64_t id = 0;
  std::uint64_t context = 0;
  bool is_blocking = true;     // takes part in the order of the legacy stream
  bool is_destroyed = false;   // its remaining work still counts
  std::uint64_t last_run = 0;  // number of the last operation that ran
  int num_pending_queries = 0;
  std::deque<Operation> queue;
};

struct Event {
  std::uint64_t context = 0;
  std::uint64_t stream = 0;  // 0: never recorded
  std::uint64_t number = 0;
  int num_pending_queries = 0;
};

class StreamTable {
 public:
  /// `execute` carries out one operation, or says why it cannot.
  explicit StreamTable(std::function<CUresult(const Operation&)> execute);

  std::uint64_t create_stream(std::uint64_t context, bool is_blocking);
  void destroy_stream(Stream& stream);
  /// By handle: 0, 1 and 2 are the legacy stream. Null if there is no such stream in `context`.
  Stream* find_stream(std::uint64_t handle, std::uint64_t context);
  std::uint64_t create_event(std::uint64_t context);
  void destroy_event(std::uint64_t handle) { events_.erase(handle); }
  Event* find_event(std::uint64_t handle, std::uint64_t context);

  void enqueue(Stream& stream, Operation operation);
  void record(Event& event, Stream& stream);
  void wait(Stream& stream, const Event& event);
  bool is_complete(const Event& event) const;

  /// Runs what the stream's whole queue, the event, or everything needs. The first operation that
  /// fails ends it all: its code is returned and every queue is dropped.
  CUresult run(Stream& stream);
  CUresult run(const Event& event);
  CUresult run_all();
  void drop_all();

  std::size_t num_streams() const;
  std::size_t num_events() const { return events_.size(); }

 private:
  using Limits = std::map<std::uint64_t, std::uint64_t>;  // stream id -> last number needed

  CUresult run_limits(Limits limits);
  void add_dependencies(Limits* limits) const;
  void forget_finished();

  std::function<CUresult(const Operation&)> execute_;
  std::map<std::uint64_t, Stream> streams_;  // by id; the legacy stream is always there
  std::map<std::uint64_t, Event> events_;
  std::uint64_t next_id_ = 0x5000'0000;
  std::uint64_t next_number_ = 1;
};

}  // namespace fakecuda
