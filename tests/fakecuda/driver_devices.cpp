// driver_devices.cpp: cuInit, the device and what it says of itself.
// Owns: nothing.  Thread-safety: every function.
#include <cstdio>
#include <cstring>

#include "exports.h"
#include "state.h"

namespace fakecuda {
namespace {

constexpr int kLastAttribute = 147;  // CU_DEVICE_ATTRIBUTE_MAX of 13.0, less one

/// The few attributes that programs of this project and cuda-python ask for; others are 0.
int attribute_value(const Modes& modes, int attribute) {
  switch (attribute) {
    case 1:  // MAX_THREADS_PER_BLOCK
      return 1024;
    case 10:  // WARP_SIZE
      return 32;
    case 16:  // MULTIPROCESSOR_COUNT
      return 132;
    case 19:  // CAN_MAP_HOST_MEMORY
    case 31:  // CONCURRENT_KERNELS
    case 41:  // UNIFIED_ADDRESSING
      return 1;
    case 39:  // MAX_THREADS_PER_MULTIPROCESSOR
      return 2048;
    case 40:  // ASYNC_ENGINE_COUNT
      return 3;
    case 75:  // COMPUTE_CAPABILITY_MAJOR
      return 9;
    case 102:  // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
      return modes.vmm;
    case 103:  // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
      return modes.posix_fd;
    case 110:  // GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    case 116:  // GPU_DIRECT_RDMA_SUPPORTED
      return modes.rdma;
    case 134:  // HOST_NUMA_ID
      return -1;
    default:
      return 0;
  }
}

}  // namespace
}  // namespace fakecuda

using namespace fakecuda;

CUresult cuInit(unsigned flags) {
  return driver_call("cuInit", Needs::kDriver, [&](State& state, Device&) -> CUresult {
    if (flags != 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuInit flags %u", flags);
    if (state.modes.devices == 0) return refuse(CUDA_ERROR_NO_DEVICE, "no device");
    state.modes.initialized = 1;
    return CUDA_SUCCESS;
  });
}

CUresult cuDriverGetVersion(int* version) {
  return driver_call("cuDriverGetVersion", Needs::kNothing, [&](State& state, Device&) {
    if (version == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *version = state.modes.driver_version;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetCount(int* count) {
  return driver_call("cuDeviceGetCount", Needs::kInit, [&](State& state, Device&) {
    if (count == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *count = state.modes.devices;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return driver_call("cuDeviceGet", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (device == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    if (const CUresult code = check_device(state, ordinal)) return code;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  return driver_call("cuDeviceGetName", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (name == nullptr || length < 1) return refuse(CUDA_ERROR_INVALID_VALUE, "no room");
    std::snprintf(name, static_cast<std::size_t>(length), "fakecuda (CPU memory, no kernels)");
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  return driver_call("cuDeviceGetUuid", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (uuid == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    std::memcpy(uuid->bytes, "fakecuda-dev-000", sizeof(uuid->bytes));
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceGetPCIBusId(char* text, int length, CUdevice device) {
  return driver_call("cuDeviceGetPCIBusId", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (text == nullptr || length < 13) return refuse(CUDA_ERROR_INVALID_VALUE, "no room");
    std::snprintf(text, static_cast<std::size_t>(length), "0000:00:00.0");
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  return driver_call("cuDeviceGetAttribute", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (value == nullptr || attribute < 1 || attribute > kLastAttribute) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d", attribute);
    }
    *value = attribute_value(state.modes, attribute);
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceTotalMem_v2(std::size_t* bytes, CUdevice device) {
  return driver_call("cuDeviceTotalMem", Needs::kInit, [&](State& state, Device& d) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (bytes == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *bytes = d.memory.capacity_bytes();
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  return driver_call("cuDeviceCanAccessPeer", Needs::kInit, [&](State& state, Device&) -> CUresult {
    if (const CUresult code = check_device(state, device)) return code;
    if (const CUresult code = check_device(state, peer)) return code;
    if (can == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "null");
    *can = 0;
    return CUDA_SUCCESS;
  });
}
