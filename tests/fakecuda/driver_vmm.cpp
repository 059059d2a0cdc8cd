// driver_vmm.cpp: virtual memory management: reserve, create, map, set access, unmap, release.
// Owns: nothing.  Thread-safety: every function.
#include <fcntl.h>

#include <algorithm>
#include <iterator>

#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

constexpr int kMaxHandleTypes = 0xF;  // all the kinds of shareable handle that cuda.h names
constexpr int kMaxCompression = 1;

CUresult check_flags(const char* what, unsigned long long flags) {
  if (flags == 0) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "%s: flags are %llu, not 0", what, flags);
}

CUresult check_location(const State& state, const CUmemLocation& location) {
  if (location.type == kLocationDevice) return check_device(state, location.id);
  return refuse(CUDA_ERROR_INVALID_VALUE, "location type %d is not a device", location.type);
}

CUresult check_properties(const State& state, const CUmemAllocationProp* properties) {
  if (properties == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "no properties");
  const auto& flags = properties->allocFlags;
  const bool has_reserved = std::any_of(std::begin(flags.reserved), std::end(flags.reserved),
                                        [](unsigned char byte) { return byte != 0; });
  if (properties->type != kAllocationPinned || properties->win32HandleMetaData != nullptr ||
      has_reserved || flags.usage != 0 || flags.compressionType > kMaxCompression ||
      flags.gpuDirectRDMACapable > 1) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "allocation properties hold a value of no meaning");
  }
  if (const CUresult code = check_location(state, properties->location)) return code;
  const int types = properties->requestedHandleTypes;
  if ((types & ~kMaxHandleTypes) != 0) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "handle types 0x%x", types);
  }
  const int supported = state.modes.posix_fd != 0 ? kHandlePosixFd : kHandleNone;
  if ((types & ~supported) != 0) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "handle types 0x%x", types);
  }
  if (flags.gpuDirectRDMACapable != 0 && state.modes.rdma == 0) {
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "gpuDirectRDMACapable: the attribute says no");
  }
  return CUDA_SUCCESS;
}

/// cuMemAlloc's memory cannot be taken apart by VMM calls.
CUresult check_not_plain(const Device& device, CUdeviceptr address) {
  CUdeviceptr base = 0;
  const Reservation* reservation = device.addresses.find_reservation(address, &base);
  if (reservation == nullptr || !reservation->is_plain) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_VALUE, "0x%llx is memory of cuMemAlloc",
                static_cast<unsigned long long>(address));
}

CUresult check_access(const State& state, const CUmemAccessDesc& access) {
  if (const CUresult code = check_location(state, access.location)) return code;
  const int flags = access.flags;
  if (flags == kAccessRead && state.modes.read_only == 0) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "read-only access, mode says no");
  }
  if (flags == kAccessNone || flags == kAccessRead || flags == kAccessReadWrite) {
    return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_INVALID_VALUE, "access flags %d", flags);
}

CUresult refuse_dead(const char* what, CUmemGenericAllocationHandle handle) {
  return refuse(CUDA_ERROR_INVALID_VALUE, "%s: dead handle 0x%llx", what,
                static_cast<unsigned long long>(handle));
}

CUresult refuse_null(const char* what) {
  return refuse(CUDA_ERROR_INVALID_VALUE, "%s: null pointer", what);
}

}  // namespace

CUresult cuMemGetAllocationGranularity(std::size_t* bytes, const CUmemAllocationProp* properties,
                                       int option) {
  const char* name = "cuMemGetAllocationGranularity";
  return driver_call(name, Needs::kVmm, [&](State& state, Device& device) -> CUresult {
    if (const CUresult code = check_properties(state, properties)) return code;
    if (bytes == nullptr) return refuse_null(name);
    if (option != kGranularityMinimum && option != kGranularityRecommended) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "granularity option %d", option);
    }
    const std::size_t minimum = device.memory.granule_bytes();
    *bytes = option == kGranularityMinimum ? minimum : 2 * minimum;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAddressReserve(CUdeviceptr* address, std::size_t bytes, std::size_t alignment,
                             CUdeviceptr hint, unsigned long long flags) {
  const char* name = "cuMemAddressReserve";
  return driver_call(name, Needs::kVmm, [&](State&, Device& device) -> CUresult {
    if (address == nullptr) return refuse_null(name);
    if (const CUresult code = check_flags(name, flags)) return code;
    return device.addresses.reserve(bytes, alignment, hint, false, address);
  });
}

CUresult cuMemAddressFree(CUdeviceptr address, std::size_t bytes) {
  return driver_call("cuMemAddressFree", Needs::kVmm, [&](State&, Device& device) -> CUresult {
    if (const CUresult code = check_not_plain(device, address)) return code;
    return device.addresses.free(address, bytes);
  });
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  const char* name = "cuMemCreate";
  return driver_call(name, Needs::kVmm, [&](State& state, Device& device) -> CUresult {
    if (handle == nullptr) return refuse_null(name);
    if (const CUresult code = check_flags(name, flags)) return code;
    if (const CUresult code = check_properties(state, properties)) return code;
    if (bytes == 0 || bytes % device.memory.granule_bytes() != 0) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "create: %zu is no multiple of %zu", bytes,
                    device.memory.granule_bytes());
    }
    return device.allocations.create(bytes, *properties, handle);
  });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return driver_call("cuMemRelease", Needs::kVmm,
                     [&](State&, Device& device) { return device.allocations.release(handle); });
}

CUresult cuMemMap(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  const char* name = "cuMemMap";
  return driver_call(name, Needs::kVmm, [&](State&, Device& device) -> CUresult {
    if (const CUresult code = check_flags(name, flags)) return code;
    if (offset != 0) return refuse(CUDA_ERROR_INVALID_VALUE, "map: offset %zu, not 0", offset);
    const Allocation* allocation = device.allocations.find(handle);
    if (allocation == nullptr) return refuse_dead(name, handle);
    if (bytes > allocation->bytes) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "map: %zu of an allocation of %zu", bytes,
                    allocation->bytes);
    }
    if (const CUresult code =
            device.addresses.map(address, bytes, handle, allocation->extents, device.memory.fd())) {
      return code;
    }
    device.allocations.add_mapping(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemUnmap(CUdeviceptr address, std::size_t bytes) {
  return driver_call("cuMemUnmap", Needs::kVmm, [&](State& state, Device& device) -> CUresult {
    if (const CUresult code = check_not_plain(device, address)) return code;
    if (state.modes.unmap_runs == 2) bytes = std::min(bytes, device.memory.granule_bytes());
    return device.unmap(address, bytes, state.modes.unmap_runs != 0);
  });
}

CUresult cuMemSetAccess(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* access,
                        std::size_t count) {
  const char* name = "cuMemSetAccess";
  return driver_call(name, Needs::kVmm, [&](State& state, Device& device) -> CUresult {
    if (access == nullptr || count == 0) return refuse_null(name);
    if (const CUresult code = check_not_plain(device, address)) return code;
    for (std::size_t index = 0; index < count; ++index) {
      if (const CUresult code = check_access(state, access[index])) return code;
    }
    const bool may_span = state.modes.access_runs != 0;
    return device.addresses.set_access(address, bytes, access[count - 1].flags, may_span);
  });
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                        CUdeviceptr address) {
  const char* name = "cuMemGetAccess";
  return driver_call(name, Needs::kVmm, [&](State& state, Device& device) -> CUresult {
    if (flags == nullptr || location == nullptr) return refuse_null(name);
    if (const CUresult code = check_location(state, *location)) return code;
    CUdeviceptr base = 0;
    const Mapping* mapping = device.addresses.find_mapping(address, &base);
    if (mapping == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "get access: not mapped");
    *flags = static_cast<unsigned long long>(mapping->access);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  const char* name = "cuMemRetainAllocationHandle";
  return driver_call(name, Needs::kVmm, [&](State&, Device& device) -> CUresult {
    if (handle == nullptr) return refuse_null(name);
    CUdeviceptr base = 0;
    const auto wanted = reinterpret_cast<CUdeviceptr>(address);
    if (const CUresult code = check_not_plain(device, wanted)) return code;
    const Mapping* mapping = device.addresses.find_mapping(wanted, &base);
    if (mapping == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "retain: not mapped");
    device.allocations.add_reference(mapping->handle);
    *handle = mapping->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* properties,
                                                CUmemGenericAllocationHandle handle) {
  const char* name = "cuMemGetAllocationPropertiesFromHandle";
  return driver_call(name, Needs::kVmm, [&](State&, Device& device) -> CUresult {
    const Allocation* allocation = device.allocations.find(handle);
    if (allocation == nullptr) return refuse_dead(name, handle);
    if (properties == nullptr) return refuse_null(name);
    *properties = allocation->properties;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      int type, unsigned long long flags) {
  const char* name = "cuMemExportToShareableHandle";
  return driver_call(name, Needs::kVmm, [&](State&, Device& device) -> CUresult {
    if (shareable == nullptr) return refuse_null(name);
    if (const CUresult code = check_flags(name, flags)) return code;
    const Allocation* allocation = device.allocations.find(handle);
    if (allocation == nullptr) return refuse_dead(name, handle);
    if (type != kHandlePosixFd || (allocation->properties.requestedHandleTypes & type) == 0) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "export as type %d: not asked for at create", type);
    }
    const int fd = fcntl(device.memory.fd(), F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return refuse(CUDA_ERROR_OPERATING_SYSTEM, "export: no file descriptor left");
    *static_cast<int*>(shareable) = fd;
    return CUDA_SUCCESS;
  });
}
