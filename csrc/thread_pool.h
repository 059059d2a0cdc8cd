// thread_pool.h: the few persistent threads that CPU copies and CPU attention share.
// Owns: the process's worker threads, one set for all caches because they share the same cores.
// Thread-safety: every function, from any thread; callers must not hold the GIL while they wait.
#pragma once

#include <cstddef>

namespace vmalloc {

/// A task body. `participant` is below the call's `max_participants` and unique among the threads
/// that run this call's tasks, so it can index scratch memory.
using TaskFunction = void (*)(void* context, std::size_t task, std::size_t participant);

/// Run tasks [0, num_tasks), each once, claimed in order by the caller and up to
/// `max_participants - 1` workers; return when all are done.
/// Requires: `function` does not throw. A nested or concurrent call runs on its caller alone.
void parallel_for(std::size_t num_tasks, std::size_t max_participants, TaskFunction function,
                  void* context) noexcept;

/// As above for a callable `body(task, participant)`.
template <typename Body>
void parallel_for(std::size_t num_tasks, std::size_t max_participants, Body& body) noexcept {
  parallel_for(
      num_tasks, max_participants,
      [](void* context, std::size_t task, std::size_t participant) {
        (*static_cast<Body*>(context))(task, participant);
      },
      &body);
}

/// While one lives, workers wait for the next call awake for some microseconds before they sleep:
/// for a caller that makes many short calls in a row. It wakes them when it is made.
class AwakeWorkers {
 public:
  AwakeWorkers() noexcept;
  ~AwakeWorkers();
  AwakeWorkers(const AwakeWorkers&) = delete;
  AwakeWorkers& operator=(const AwakeWorkers&) = delete;

 private:
  void* workers_;  // those that were woken; a forked child has others
};

/// Threads a call may use, the caller included; at first the CPUs this process may run on. One in a
/// forked child, which inherits no threads, until `set_num_threads`.
[[nodiscard]] std::size_t num_threads() noexcept;

/// Use `count` threads from now on, the caller included. Waits for a running call.
/// Throws ConfigError unless 1 <= count <= 1024.
void set_num_threads(std::size_t count);

}  // namespace vmalloc
