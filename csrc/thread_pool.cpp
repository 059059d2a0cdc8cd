// thread_pool.cpp: workers that spin, then sleep, and claim tasks from one counter.
// Owns: the worker threads.  Thread-safety: see thread_pool.h.
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"

namespace vmalloc {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr std::size_t kMaxThreads = 1024;
// While AwakeWorkers live, a worker spins for this long at most before it sleeps: longer than what
// a caller does alone between two calls.
constexpr microseconds kWorkerSpin{50};
// A caller whose workers are in their last tasks spins too: as long as those take when calls are
// short, else less than it takes to wake somebody.
constexpr microseconds kAwakeCallerSpin{10};
constexpr microseconds kCallerSpin{2};
// Looks at the clock are about a microsecond apart. Between two that are this far apart somebody
// else had the core: they need it more, so the thread does not spin for a while.
constexpr microseconds kCoreWasTaken{200};
constexpr std::chrono::milliseconds kWithoutSpinning{20};
constexpr int kRelaxesPerLook = 16;

void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

std::size_t usable_cpus() noexcept {
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 1;
  const int count = CPU_COUNT(&cpus);
  return count > 0 ? static_cast<std::size_t>(count) : 1;
}

// Spins where that takes the core from nobody: not after the core was taken away, and not on the
// core where the thread it waits for ran last, because that one is waiting for the core.
class Spinner {
 public:
  // Wait for `ready`, which the thread last seen on `other_cpu` brings about; false where it takes
  // longer than `longest`.
  template <typename Ready>
  bool spin_until(const Ready& ready, microseconds longest,
                  const std::atomic<int>& other_cpu) noexcept {
    if (ready()) return true;
    const Clock::time_point start = Clock::now();
    Clock::time_point last = start;
    while (last >= no_spinning_before_ && last - start <= longest &&
           sched_getcpu() != other_cpu.load(std::memory_order_relaxed)) {
      for (int i = 0; i < kRelaxesPerLook; ++i) {
        relax();
        if (ready()) return true;
      }
      const Clock::time_point now = Clock::now();
      if (now - last > kCoreWasTaken) no_spinning_before_ = now + kWithoutSpinning;
      last = now;
    }
    return false;
  }

 private:
  Clock::time_point no_spinning_before_{};
};

class Workers {
 public:
  explicit Workers(std::size_t count) : num_threads_(count), may_spin_(count <= usable_cpus()) {}
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(std::size_t num_tasks, std::size_t max_participants, TaskFunction function,
           void* context) noexcept;
  void resize(std::size_t count);
  void stay_awake() noexcept;
  void may_sleep() noexcept { awake_calls_.fetch_sub(1, std::memory_order_relaxed); }
  std::size_t size() const noexcept { return num_threads_.load(std::memory_order_relaxed); }

 private:
  // state_ holds the seats that workers may still take and, above them, the workers inside the
  // call.
  static constexpr std::uint64_t kSeats = 0xffffffffU;
  static constexpr std::uint64_t kOneActive = kSeats + 1;

  void start_missing() noexcept;
  void work() noexcept;
  bool wait_for_seat(Spinner* spinner) noexcept;
  void take_seat() noexcept;
  void claim(std::size_t participant) noexcept;
  void wake(std::size_t helpers) noexcept;
  void pass_sleepers() noexcept;
  void wait_for_workers() noexcept;
  bool stays_awake() const noexcept {
    return awake_calls_.load(std::memory_order_relaxed) > 0 &&
           may_spin_.load(std::memory_order_relaxed);
  }
  bool has_seats() const noexcept { return (state_.load() & kSeats) > 0; }
  bool is_idle() const noexcept { return state_.load() < kOneActive; }

  std::mutex call_mutex_;  // one parallel call at a time; taken before mutex_
  std::vector<std::thread> threads_;
  std::atomic<std::size_t> num_threads_;
  std::atomic<bool> may_spin_;  // each thread may have a core of its own
  Spinner caller_spinner_;      // guarded by call_mutex_

  // Whoever is about to sleep says so before it looks at state_ for the last time, and whoever
  // changes state_ looks for sleepers afterwards, all in one total order (seq_cst): one of the two
  // notices. Sleepers hold mutex_ in between, so who has passed through it finds them waiting.
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::size_t wakes_ = 0;  // how often AwakeWorkers asked for all workers; guarded by mutex_
  std::atomic<bool> stopping_{false};
  std::atomic<std::size_t> num_asleep_{0};
  std::atomic<bool> caller_asleep_{false};

  std::atomic<int> awake_calls_{0};  // AwakeWorkers that live
  std::atomic<int> caller_cpu_{-1};  // where the caller began its call
  std::atomic<int> worker_cpu_{-1};  // where a worker joined it last

  // The call. Written before state_ offers seats, so a worker that took one may read it.
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;
  std::size_t num_tasks_ = 0;
  std::size_t helpers_ = 0;

  alignas(64) std::atomic<std::uint64_t> state_{0};
  alignas(64) std::atomic<std::size_t> next_task_{0};
};

void Workers::claim(std::size_t participant) noexcept {
  for (;;) {
    const std::size_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= num_tasks_) return;
    function_(context_, task, participant);
  }
}

void Workers::take_seat() noexcept {
  std::uint64_t state = state_.load();
  do {
    if ((state & kSeats) == 0) return;
  } while (!state_.compare_exchange_weak(state, state - 1 + kOneActive));
  worker_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  claim(helpers_ - (state & kSeats) + 1);
  const bool was_last = state_.fetch_sub(kOneActive) < 2 * kOneActive;
  if (was_last && caller_asleep_.load()) {
    pass_sleepers();
    done_.notify_one();
  }
}

// False: the workers stop.
bool Workers::wait_for_seat(Spinner* spinner) noexcept {
  const auto ready = [this] { return has_seats() || stopping_.load(); };
  while (!ready()) {
    if (stays_awake() && spinner->spin_until(ready, kWorkerSpin, caller_cpu_)) break;
    std::unique_lock<std::mutex> lock(mutex_);
    const std::size_t seen = wakes_;
    num_asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return ready() || wakes_ != seen; });
    num_asleep_.fetch_sub(1);
  }
  return !stopping_.load();
}

void Workers::work() noexcept {
  Spinner spinner;
  while (wait_for_seat(&spinner)) take_seat();
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

// Notify after this, not under the lock: whom it wakes needs the lock.
void Workers::pass_sleepers() noexcept { const std::lock_guard<std::mutex> lock(mutex_); }

// Workers that are awake find their seats by themselves.
void Workers::wake(std::size_t helpers) noexcept {
  const std::size_t asleep = num_asleep_.load();
  const std::size_t awake = threads_.size() - std::min(asleep, threads_.size());
  if (asleep == 0 || awake >= helpers) return;
  pass_sleepers();
  for (std::size_t i = awake; i < helpers; ++i) wake_.notify_one();
}

void Workers::wait_for_workers() noexcept {
  const auto ready = [this] { return is_idle(); };
  const microseconds longest = stays_awake() ? kAwakeCallerSpin : kCallerSpin;
  if (caller_spinner_.spin_until(ready, longest, worker_cpu_)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_asleep_.store(true);
  done_.wait(lock, ready);
  caller_asleep_.store(false);
}

void Workers::stay_awake() noexcept {
  awake_calls_.fetch_add(1, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++wakes_;
  }
  wake_.notify_all();
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
  if (helpers > num_tasks - 1) helpers = num_tasks - 1;
  if (helpers > max_participants - 1) helpers = max_participants - 1;
  function_ = function;
  context_ = context;
  num_tasks_ = num_tasks;
  helpers_ = helpers;
  next_task_.store(0, std::memory_order_relaxed);
  caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  worker_cpu_.store(-1, std::memory_order_relaxed);
  state_.store(helpers);
  wake(helpers);
  claim(0);
  state_.fetch_and(~kSeats);  // a worker that has not come by now is not waited for
  wait_for_workers();
}

void Workers::resize(std::size_t count) {
  const std::lock_guard<std::mutex> call(call_mutex_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  stopping_.store(false);
  num_threads_.store(count, std::memory_order_relaxed);
  may_spin_.store(count <= usable_cpus(), std::memory_order_relaxed);
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
