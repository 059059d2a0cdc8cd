// driver_memory.cpp: memory info, plain device memory and page-locked host memory.
// Owns: nothing.  Thread-safety: every function.
#include <cstdlib>
#include <cstring>

#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

constexpr unsigned kAllHostFlags = 0x7;  // portable, device map, write-combined
constexpr unsigned char kHostPoison = 0xFF;
constexpr std::size_t kHostAlignment = 4096;

std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

CUresult alloc_plain(Device& device, std::size_t bytes, CUdeviceptr* address) {
  CUmemAllocationProp properties{};
  properties.type = kAllocationPinned;
  properties.location = {kLocationDevice, 0};
  Handle handle = 0;
  if (const CUresult code = device.allocations.create(bytes, properties, &handle)) return code;
  CUresult code = device.addresses.reserve(bytes, 0, 0, true, address);
  if (code == CUDA_SUCCESS) {
    code = device.addresses.map(*address, bytes, handle, device.allocations.find(handle)->extents,
                                device.memory.fd());
    if (code == CUDA_SUCCESS) {
      device.allocations.add_mapping(handle);
      return device.addresses.set_access(*address, bytes, kAccessReadWrite, false);
    }
    device.addresses.free(*address, bytes);
  }
  device.allocations.release(handle);
  return code;
}

}  // namespace

CUresult cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes) {
  return driver_call("cuMemGetInfo", Needs::kContext, [&](State&, Device& device) {
    if (free_bytes == nullptr || total_bytes == nullptr) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    }
    *total_bytes = device.memory.capacity_bytes();
    *free_bytes = *total_bytes - device.memory.used_bytes();
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, std::size_t bytes) {
  return driver_call("cuMemAlloc", Needs::kContext, [&](State&, Device& device) -> CUresult {
    if (address == nullptr || bytes == 0) return refuse(CUDA_ERROR_INVALID_VALUE, "0 bytes");
    if (bytes > device.memory.capacity_bytes()) {
      return refuse(CUDA_ERROR_OUT_OF_MEMORY, "%zu bytes asked for, the device has %zu", bytes,
                    device.memory.capacity_bytes());
    }
    return alloc_plain(device, round_up(bytes, device.memory.granule_bytes()), address);
  });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  return driver_call("cuMemFree", Needs::kContext, [&](State&, Device& device) -> CUresult {
    CUdeviceptr base = 0;
    const Reservation* reservation = device.addresses.find_reservation(address, &base);
    if (reservation == nullptr || !reservation->is_plain || base != address) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "free: no memory of cuMemAlloc starts here");
    }
    // cudaFree waits for the device, so this does (PyTorch's note on VMM calls, which do not).
    if (const CUresult code = device.streams.run_all()) return code;
    const std::size_t bytes = reservation->bytes;
    const Handle handle = device.addresses.find_mapping(address, &base)->handle;
    if (const CUresult code = device.unmap(address, bytes, false)) return code;
    device.allocations.release(handle);
    return device.addresses.free(address, bytes);
  });
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* bytes, CUdeviceptr address) {
  return driver_call("cuMemGetAddressRange", Needs::kContext, [&](State&, Device& device) {
    CUdeviceptr start = 0;
    const Mapping* mapping = device.addresses.find_mapping(address, &start);
    if (mapping == nullptr) return refuse(CUDA_ERROR_NOT_FOUND, "address range: not mapped");
    if (base != nullptr) *base = start;
    if (bytes != nullptr) *bytes = mapping->bytes;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemHostAlloc(void** memory, std::size_t bytes, unsigned flags) {
  return driver_call("cuMemHostAlloc", Needs::kContext, [&](State&, Device& device) -> CUresult {
    if (memory == nullptr || bytes == 0 || (flags & ~kAllHostFlags) != 0) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "host alloc: %zu bytes, flags %u", bytes, flags);
    }
    void* raw = bytes > SIZE_MAX / 2
                    ? nullptr
                    : std::aligned_alloc(kHostAlignment, round_up(bytes, kHostAlignment));
    if (raw == nullptr) return refuse(CUDA_ERROR_OUT_OF_MEMORY, "host alloc: %zu bytes", bytes);
    std::memset(raw, kHostPoison, bytes);
    auto* start = static_cast<unsigned char*>(raw);
    device.host_allocations.emplace(
        reinterpret_cast<std::uint64_t>(raw),
        Device::HostAllocation{
            {start, [](unsigned char* old) { std::free(old); }}, bytes, device.context.handle()});
    *memory = raw;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemFreeHost(void* memory) {
  return driver_call("cuMemFreeHost", Needs::kContext, [&](State&, Device& device) -> CUresult {
    const auto found = device.host_allocations.find(reinterpret_cast<std::uint64_t>(memory));
    if (found == device.host_allocations.end() ||
        found->second.context != device.context.handle()) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "free host: %p is no host allocation", memory);
    }
    device.host_allocations.erase(found);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory, unsigned flags) {
  return driver_call("cuMemHostGetDevicePointer", Needs::kContext, [&](State&, Device& device) {
    const auto wanted = reinterpret_cast<std::uint64_t>(memory);
    if (address == nullptr || flags != 0 || !device.is_host_allocation(wanted, 1)) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "%p is no host allocation", memory);
    }
    *address = wanted;
    return CUDA_SUCCESS;
  });
}
