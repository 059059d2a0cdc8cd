// state.h: everything the stand-in driver holds, and the gate that every driver call passes.
// Owns: all tables, behind one mutex.  Thread-safety: lock `mutex` around `device` and `modes`.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "abi.h"
#include "address_space.h"
#include "allocations.h"
#include "contexts.h"
#include "faults.h"
#include "modes.h"
#include "physical_memory.h"
#include "reason.h"
#include "streams.h"

namespace fakecuda {

/// One device with its memory, addresses, context and queues. A reset replaces it whole.
struct Device {
  Device();
  CUresult execute(const Operation& operation);
  /// Is every byte of a span usable now? Device spans may also be page-locked host memory.
  bool is_usable(const Span& span, std::size_t bytes, int access) const;
  bool is_host_allocation(std::uint64_t address, std::size_t bytes) const;
  /// Unmaps and drops the mappings' claims on their memory.
  CUresult unmap(CUdeviceptr address, std::size_t bytes, bool may_span);
  std::uint64_t num_leaks() const;

  PhysicalMemory memory;
  AllocationTable allocations;
  AddressSpace addresses;
  PrimaryContext context;
  StreamTable streams;

  struct HostAllocation {
    std::unique_ptr<unsigned char, void (*)(unsigned char*)> memory;
    std::size_t bytes;
    std::uint64_t context;
  };
  std::map<std::uint64_t, HostAllocation> host_allocations;
};

struct State {
  static State& get();  // never destroyed: calls at process exit find it
  void reset();

  std::mutex mutex;
  Modes modes;
  std::unique_ptr<Device> device;
  Faults faults;  // has its own mutex

 private:
  State() { reset(); }
};

/// What a call needs before its own rules are looked at.
enum class Needs {
  kNothing,  // names, versions, symbols: works in every state
  kDriver,   // not shut down: cuInit alone
  kInit,     // cuInit; works after an illegal address too
  kHealthy,  // ... and no illegal address so far
  kLaunch,   // the same, for a launch of the test's own: not in the total of driver calls
  kVmm,      // ... and a device with virtual memory management
  kContext,  // ... and a current context
};

/// Is the call allowed in this state? The mutex is held.
CUresult admit(State& state, Needs needs);

/// 101 unless the ordinal names a device that is there.
CUresult check_device(const State& state, CUdevice device);

/// The frame of every cu* function: count, fault, latency (no lock held), then state and body.
template <typename Body>
CUresult driver_call(const char* name, Needs needs, Body body) {
  State& state = State::get();
  const bool is_total = needs != Needs::kNothing && needs != Needs::kLaunch;
  if (const CUresult code = state.faults.enter(name, is_total)) return code;
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (const CUresult code = admit(state, needs)) return code;
  return body(state, *state.device);
}

}  // namespace fakecuda
