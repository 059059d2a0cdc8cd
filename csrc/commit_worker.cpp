#include "commit_worker.h"

#include <pthread.h>

#include <exception>
#include <utility>

namespace vmalloc {

CommitWorker::CommitWorker(std::function<void(std::uint32_t)> commit)
    : commit_(std::move(commit)), thread_([this] { work(); }) {}

CommitWorker::~CommitWorker() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  thread_.join();
}

void CommitWorker::post(std::uint32_t slot) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_.empty()) return;
    queue_.push_back(slot);
    if (is_paused_ || is_running_ || queue_.size() > 1) return;  // nobody to wake
  }
  work_.notify_one();
}

void CommitWorker::wait_idle() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (is_paused_ && !queue_.empty()) commit_next(lock);
  idle_.wait(lock, [this] { return queue_.empty() && !is_running_; });
}

void CommitWorker::pause() {
  std::unique_lock<std::mutex> lock(mutex_);
  is_paused_ = true;
  idle_.wait(lock, [this] { return !is_running_; });
}

std::size_t CommitWorker::run(std::size_t max_slots) {
  std::unique_lock<std::mutex> lock(mutex_);
  std::size_t num_done = 0;
  for (; num_done < max_slots && !queue_.empty(); ++num_done) commit_next(lock);
  return num_done;
}

std::string CommitWorker::error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void CommitWorker::work() {
  // Its CPU time is told apart from the engine's by this name; at most 15 characters.
  pthread_setname_np(pthread_self(), "vmalloc-commit");
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stop_ || (!is_paused_ && !queue_.empty()); });
    if (stop_) return;
    commit_next(lock);
  }
}

/// Requires: the lock is held, the queue has a slot, and nothing runs.
void CommitWorker::commit_next(std::unique_lock<std::mutex>& lock) {
  const std::uint32_t slot = queue_.front();
  queue_.pop_front();
  is_running_ = true;
  lock.unlock();
  std::string error;
  try {
    commit_(slot);
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  lock.lock();
  is_running_ = false;
  if (!error.empty()) {
    error_ = error;
    queue_.clear();
  }
  if (is_paused_ || queue_.empty()) idle_.notify_all();
}

}  // namespace vmalloc
