#include "state.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace fakecuda {
namespace {

std::size_t read_environment(const char* name, std::size_t fallback) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? fallback : std::strtoull(text, nullptr, 10);
}

/// A power of two of at least one page, whatever was asked for.
std::size_t read_granule_bytes() {
  const std::size_t wanted = read_environment("FAKECUDA_GRAN_KB", 64) << 10;
  auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  while (bytes < wanted) bytes *= 2;
  return bytes;
}

const char* describe(OperationKind kind) {
  if (kind == OperationKind::kTouch) return "launch";
  return kind == OperationKind::kCopy ? "copy" : "memset";
}

}  // namespace

Device::Device()
    : memory(read_environment("FAKECUDA_MEM_MB", 256) << 20, read_granule_bytes(),
             static_cast<int>(read_environment("FAKECUDA_POISON", 255) & 255)),
      allocations(&memory),
      addresses(memory.granule_bytes()),
      streams([this](const Operation& operation) { return execute(operation); }) {}

bool Device::is_host_allocation(std::uint64_t address, std::size_t bytes) const {
  auto found = host_allocations.upper_bound(address);
  if (found == host_allocations.begin()) return false;
  --found;
  const std::uint64_t offset = address - found->first;
  return offset < found->second.bytes && bytes <= found->second.bytes - offset;
}

bool Device::is_usable(const Span& span, std::size_t bytes, int access) const {
  if (span.is_host) return !span.is_pinned || is_host_allocation(span.address, bytes);
  return addresses.is_accessible(span.address, bytes, access) ||
         is_host_allocation(span.address, bytes);
}

CUresult Device::execute(const Operation& operation) {
  const auto fault = [&](const Span& span, const char* how) {
    context.sticky_error = CUDA_ERROR_ILLEGAL_ADDRESS;
    return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "%s %s 0x%llx + %zu, not accessible when it ran",
                  describe(operation.kind), how, static_cast<unsigned long long>(span.address),
                  operation.bytes);
  };
  const bool is_copy = operation.kind == OperationKind::kCopy;
  if (operation.kind == OperationKind::kRecord || operation.kind == OperationKind::kWait) {
    return CUDA_SUCCESS;
  }
  if (is_copy && !is_usable(operation.source, operation.bytes, kAccessRead)) {
    return fault(operation.source, "reads");
  }
  const bool writes = operation.kind != OperationKind::kTouch || operation.is_write;
  const int access = writes ? kAccessReadWrite : kAccessRead;
  if (!is_usable(operation.destination, operation.bytes, access)) {
    return fault(operation.destination, writes ? "writes" : "reads");
  }
  auto* destination = reinterpret_cast<unsigned char*>(operation.destination.address);
  if (is_copy) {
    std::memmove(destination, reinterpret_cast<const void*>(operation.source.address),
                 operation.bytes);
  } else if (operation.kind == OperationKind::kFill) {
    std::memset(destination, operation.value, operation.bytes);
  }
  return CUDA_SUCCESS;
}

CUresult Device::unmap(CUdeviceptr address, std::size_t bytes, bool may_span) {
  std::vector<Handle> handles;
  if (const CUresult code = addresses.unmap(address, bytes, may_span, &handles)) return code;
  for (const Handle handle : handles) allocations.drop_mapping(handle);
  return CUDA_SUCCESS;
}

std::uint64_t Device::num_leaks() const {
  // A cuMemAlloc is one thing, though it holds a handle, a mapping and a reservation.
  return allocations.num_live() + addresses.num_mappings() + addresses.num_reservations() -
         2 * addresses.num_plain() + streams.num_streams() + streams.num_events() +
         host_allocations.size();
}

State& State::get() {
  static State* const state = new State();
  return *state;
}

void State::reset() {
  const std::lock_guard<std::mutex> lock(mutex);
  const int was_initialized = modes.initialized;
  modes = Modes();
  modes.initialized = was_initialized;
  device.reset();  // before the new one, which may want the same memory
  device = std::make_unique<Device>();
  faults.reset();
  const char* text = std::getenv("FAKECUDA_CTL");
  Control control;
  if (text == nullptr || !Control::try_parse(text, &control)) return;
  faults.apply(control);
  for (const auto& [name, value] : control.modes) modes.try_set(name, value);
}

CUresult admit(State& state, Needs needs) {
  if (needs == Needs::kNothing) return CUDA_SUCCESS;
  if (state.modes.deinitialized != 0) {
    return refuse(CUDA_ERROR_DEINITIALIZED, "the driver is shut down");
  }
  if (needs == Needs::kDriver) return CUDA_SUCCESS;
  if (state.modes.initialized == 0) {
    return refuse(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
  }
  if (needs == Needs::kInit) return CUDA_SUCCESS;
  const CUresult sticky = state.device->context.sticky_error;
  if (sticky != CUDA_SUCCESS) return sticky;  // keeps the reason of the operation that failed
  if (needs == Needs::kVmm && state.modes.vmm == 0) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "this device has no virtual memory management");
  }
  const bool wants_context =
      needs == Needs::kContext || (needs == Needs::kVmm && state.modes.vmm_context != 0);
  return wants_context ? state.device->context.check_current() : CUDA_SUCCESS;
}

CUresult check_device(const State& state, CUdevice device) {
  if (device >= 0 && device < state.modes.devices) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of %d", device, state.modes.devices);
}

}  // namespace fakecuda
