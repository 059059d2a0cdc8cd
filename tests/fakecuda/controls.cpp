// controls.cpp: the fakecuda_* functions: reset, modes and faults, counters, leaks.
// Owns: nothing.  Thread-safety: every function.
#include <cstdio>
#include <string>

#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

constexpr int kVersion = 1;

template <typename Body>
auto with_device(Body body) {
  State& state = State::get();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return body(*state.device);
}

Stream* find_stream(Device& device, CUstream handle) {
  return device.streams.find_stream(reinterpret_cast<std::uint64_t>(handle),
                                    device.context.handle());
}

}  // namespace

int fakecuda_version(void) { return kVersion; }

void fakecuda_reset(void) { State::get().reset(); }

int fakecuda_ctl(const char* text) {
  Control control;
  if (text == nullptr || !Control::try_parse(text, &control)) return -1;
  State& state = State::get();
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    Modes modes = state.modes;
    for (const auto& [name, value] : control.modes) {
      if (!modes.try_set(name, value)) return -1;
    }
    state.modes = modes;
  }
  state.faults.apply(control);
  return 0;
}

std::uint64_t fakecuda_calls(const char* name) { return State::get().faults.calls(name); }

std::uint64_t fakecuda_total_calls(void) { return State::get().faults.total_calls(); }

int fakecuda_call_names(char* buffer, std::size_t bytes) {
  const std::string names = State::get().faults.names();
  return std::snprintf(buffer, bytes, "%s", names.c_str()) + 1;
}

std::uint64_t fakecuda_used_bytes(void) {
  return with_device([](Device& device) { return device.memory.used_bytes(); });
}

std::uint64_t fakecuda_leaks(void) {
  return with_device([](Device& device) { return device.num_leaks(); });
}

std::uint64_t fakecuda_pending(CUstream handle) {
  return with_device([&](Device& device) -> std::uint64_t {
    const Stream* stream = find_stream(device, handle);
    return stream == nullptr ? 0 : stream->queue.size();
  });
}

CUresult fakecuda_run_stream(CUstream handle) {
  return with_device([&](Device& device) -> CUresult {
    if (device.context.sticky_error != CUDA_SUCCESS) return device.context.sticky_error;
    Stream* stream = find_stream(device, handle);
    if (stream == nullptr) return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no stream", handle);
    return device.streams.run(*stream);
  });
}

const char* fakecuda_reason(void) { return last_reason(); }
