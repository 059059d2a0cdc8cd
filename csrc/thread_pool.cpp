// thread_pool.cpp: workers that sleep on a condition variable and claim tasks from one counter.
// Owns: the worker threads.  Thread-safety: see thread_pool.h.
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"

namespace vmalloc {
namespace {

constexpr std::size_t kMaxThreads = 1024;
// A few microseconds: long enough for a worker in its last task, short on a machine with no core to
// spare, where spinning takes the core that the worker needs.
constexpr int kSpinsBeforeSleep = 200;
// Between calls that follow each other: longer than what a caller does alone in between.
constexpr std::chrono::microseconds kAwake{50};

void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Spin until `happened()`, for as long as workers stay awake; whether it did.
template <typename Condition>
bool spin_until(const Condition& happened) noexcept {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  do {
    for (int i = 0; i < 32; ++i) {
      if (happened()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

std::size_t usable_cpus() noexcept {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 1;
  const int count = CPU_COUNT(&cpus);
  return count > 0 ? static_cast<std::size_t>(count) : 1;
}

class Workers {
 public:
  explicit Workers(std::size_t count) : num_threads_(count) {}
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(std::size_t num_tasks, std::size_t max_participants, TaskFunction function,
           void* context) noexcept;
  void resize(std::size_t count);
  void stay_awake() noexcept;
  void may_sleep() noexcept { awake_calls_.fetch_sub(1, std::memory_order_relaxed); }
  std::size_t size() const noexcept { return num_threads_.load(std::memory_order_relaxed); }

 private:
  void start_missing() noexcept;
  void work() noexcept;
  void wait_for_call(std::unique_lock<std::mutex>& lock, std::size_t* seen_wakes) noexcept;
  bool stays_awake() const noexcept { return awake_calls_.load(std::memory_order_relaxed) > 0; }
  void claim(std::size_t participant) noexcept;

  std::mutex call_mutex_;  // one parallel call at a time; taken before mutex_
  std::vector<std::thread> threads_;
  std::atomic<std::size_t> num_threads_;

  std::mutex mutex_;  // guards the fields below
  std::condition_variable wake_;
  std::condition_variable done_;
  std::size_t num_asleep_ = 0;  // workers that a call has to wake
  std::size_t wakes_ = 0;       // how often AwakeWorkers asked for all of them
  std::size_t joined_ = 0;      // participants so far, the caller included
  // Written under mutex_; read without it by workers that wait awake.
  std::atomic<bool> stopping_{false};
  std::atomic<std::size_t> seats_{0};  // workers that may still join the call
  // The call. Written under mutex_ before seats_ rises, so a worker that took a seat may read it.
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;
  std::size_t num_tasks_ = 0;

  std::atomic<std::size_t> next_task_{0};
  std::atomic<std::size_t> active_{0};  // workers inside the call; written under mutex_
  std::atomic<int> awake_calls_{0};     // AwakeWorkers that live
};

void Workers::claim(std::size_t participant) noexcept {
  for (;;) {
    const std::size_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    function_(context_, task, participant);
  }
}

// Requires: `lock` is held, on return too. Returns with a seat to take, or to stop.
void Workers::wait_for_call(std::unique_lock<std::mutex>& lock, std::size_t* seen_wakes) noexcept {
  const auto is_called = [this] {
    return seats_.load(std::memory_order_relaxed) > 0 || stopping_.load(std::memory_order_relaxed);
  };
  while (!is_called()) {
    if (stays_awake()) {
      lock.unlock();
      spin_until(is_called);
      lock.lock();
      if (is_called()) return;
    }
    ++num_asleep_;
    wake_.wait(lock, [&] { return is_called() || wakes_ != *seen_wakes; });
    --num_asleep_;
    *seen_wakes = wakes_;
  }
}

void Workers::work() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  std::size_t seen_wakes = wakes_;
  for (;;) {
    wait_for_call(lock, &seen_wakes);
    if (stopping_) return;
    --seats_;
    const std::size_t participant = joined_++;
    active_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    claim(participant);
    lock.lock();
    if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
  }
}

// Workers take no signals: those belong to the threads of the program (Python's main thread).
void Workers::start_missing() noexcept {
  if (threads_.size() + 1 >= size()) return;
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    while (threads_.size() + 1 < size()) threads_.emplace_back([this] { work(); });
  } catch (const std::exception&) {
    // The system gives no more threads; the calls are correct with fewer.
    num_threads_.store(threads_.size() + 1, std::memory_order_relaxed);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void run_alone(std::size_t num_tasks, TaskFunction function, void* context) noexcept {
  for (std::size_t task = 0; task < num_tasks; ++task) function(context, task, 0);
}

void Workers::run(std::size_t num_tasks, std::size_t max_participants, TaskFunction function,
                  void* context) noexcept {
  if (num_tasks <= 1 || max_participants <= 1 || size() <= 1) {
    run_alone(num_tasks, function, context);
    return;
  }
  std::unique_lock<std::mutex> call(call_mutex_, std::try_to_lock);
  if (!call.owns_lock()) {
    run_alone(num_tasks, function, context);
    return;
  }
  start_missing();
  std::size_t helpers = threads_.size();
  std::size_t to_wake = 0;
  if (helpers > num_tasks - 1) helpers = num_tasks - 1;
  if (helpers > max_participants - 1) helpers = max_participants - 1;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    function_ = function;
    context_ = context;
    num_tasks_ = num_tasks;
    next_task_.store(0, std::memory_order_relaxed);
    joined_ = 1;
    seats_ = helpers;
    to_wake = helpers < num_asleep_ ? helpers : num_asleep_;
  }
  for (std::size_t i = 0; i < to_wake; ++i) wake_.notify_one();
  claim(0);
  const auto is_done = [this] { return active_.load(std::memory_order_acquire) == 0; };
  if (stays_awake()) {
    spin_until(is_done);
  } else {
    for (int i = 0; i < kSpinsBeforeSleep && !is_done(); ++i) relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  seats_ = 0;  // a worker that has not woken by now is not waited for
  done_.wait(lock, is_done);
}

void Workers::stay_awake() noexcept {
  awake_calls_.fetch_add(1, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++wakes_;
    if (num_asleep_ == 0) return;
  }
  wake_.notify_all();
}

void Workers::resize(std::size_t count) {
  const std::lock_guard<std::mutex> call(call_mutex_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  stopping_ = false;
  num_threads_.store(count, std::memory_order_relaxed);
}

// Never destroyed: workers sleep in it until the process ends, and a forked child leaves the
// parent's where it is, because the threads and the state of its locks stayed behind.
std::atomic<Workers*>& current_workers() {
  static std::atomic<Workers*> current{[] {
    pthread_atfork(nullptr, nullptr, [] { current_workers().store(new Workers(1)); });
    return new Workers(usable_cpus());
  }()};
  return current;
}

}  // namespace

void parallel_for(std::size_t num_tasks, std::size_t max_participants, TaskFunction function,
                  void* context) noexcept {
  current_workers().load()->run(num_tasks, max_participants, function, context);
}

AwakeWorkers::AwakeWorkers() noexcept : workers_(current_workers().load()) {
  static_cast<Workers*>(workers_)->stay_awake();
}

AwakeWorkers::~AwakeWorkers() { static_cast<Workers*>(workers_)->may_sleep(); }

std::size_t num_threads() noexcept { return current_workers().load()->size(); }

void set_num_threads(std::size_t count) {
  if (count < 1 || count > kMaxThreads) {
    throw ConfigError("num_threads is " + std::to_string(count) + ", must be in [1, " +
                      std::to_string(kMaxThreads) + "]");
  }
  current_workers().load()->resize(count);
}

}  // namespace vmalloc
