// commit_worker.h: one thread that maps pages before they are needed.
// Owns: the thread and a queue of slots.  Thread-safety: all methods.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace vmalloc {

class CommitWorker {
 public:
  /// `commit(slot)` runs on the worker's thread; what it throws is kept as `error()` and ends the
  /// background work, never the process.
  explicit CommitWorker(std::function<void(std::uint32_t)> commit);
  /// Drops what is queued, finishes what runs, joins. A forked child must leak the object instead:
  /// its thread stayed in the parent, and destroying a condition variable waits for its waiters.
  ~CommitWorker();
  CommitWorker(const CommitWorker&) = delete;
  CommitWorker& operator=(const CommitWorker&) = delete;

  void post(std::uint32_t slot);
  void wait_idle();  ///< Until the queue is empty and nothing runs; paused, it does the work here.
  /// From now on queued slots wait for run(): for simulations, which say how much time there is.
  void pause();
  /// Commit at most `max_slots` queued slots on the calling thread; how many. Requires: paused.
  std::size_t run(std::size_t max_slots);
  [[nodiscard]] std::string error() const;

 private:
  void work();
  void commit_next(std::unique_lock<std::mutex>& lock);

  std::function<void(std::uint32_t)> commit_;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  std::deque<std::uint32_t> queue_;
  bool is_running_ = false;
  bool is_paused_ = false;
  bool stop_ = false;
  std::string error_;
  std::thread thread_;
};

}  // namespace vmalloc
