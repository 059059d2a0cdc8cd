// symbols.cpp: cuGetProcAddress: from base names and versions to functions.
// Owns: the table.  Thread-safety: every function.
#include <cstring>

#include "exports.h"
#include "state.h"

using namespace fakecuda;

namespace {

struct Symbol {
  const char* base;  // what a program asks for: no _v2
  int since;         // the CUDA version that brought this variant
  void* function;
};

template <typename Function>
void* pointer(Function* function) {
  return reinterpret_cast<void*>(function);
}

/// Variants of one name stand newest first.
const Symbol kSymbols[] = {
    {"cuGetErrorName", 6000, pointer(cuGetErrorName)},
    {"cuGetErrorString", 6000, pointer(cuGetErrorString)},
    {"cuDriverGetVersion", 2020, pointer(cuDriverGetVersion)},
    {"cuGetProcAddress", 12000, pointer(cuGetProcAddress_v2)},
    {"cuGetProcAddress", 11030, pointer(cuGetProcAddress)},
    {"cuInit", 2000, pointer(cuInit)},
    {"cuDeviceGetCount", 2000, pointer(cuDeviceGetCount)},
    {"cuDeviceGet", 2000, pointer(cuDeviceGet)},
    {"cuDeviceGetName", 2000, pointer(cuDeviceGetName)},
    {"cuDeviceGetUuid", 11040, pointer(cuDeviceGetUuid_v2)},
    {"cuDeviceGetUuid", 9020, pointer(cuDeviceGetUuid)},
    {"cuDeviceGetPCIBusId", 4010, pointer(cuDeviceGetPCIBusId)},
    {"cuDeviceGetAttribute", 2000, pointer(cuDeviceGetAttribute)},
    {"cuDeviceTotalMem", 3020, pointer(cuDeviceTotalMem_v2)},
    {"cuDeviceCanAccessPeer", 4000, pointer(cuDeviceCanAccessPeer)},
    {"cuDevicePrimaryCtxRetain", 7000, pointer(cuDevicePrimaryCtxRetain)},
    {"cuDevicePrimaryCtxRelease", 11000, pointer(cuDevicePrimaryCtxRelease_v2)},
    {"cuDevicePrimaryCtxGetState", 7000, pointer(cuDevicePrimaryCtxGetState)},
    {"cuCtxGetCurrent", 4000, pointer(cuCtxGetCurrent)},
    {"cuCtxSetCurrent", 4000, pointer(cuCtxSetCurrent)},
    {"cuCtxPushCurrent", 4000, pointer(cuCtxPushCurrent_v2)},
    {"cuCtxPopCurrent", 4000, pointer(cuCtxPopCurrent_v2)},
    {"cuCtxGetDevice", 2000, pointer(cuCtxGetDevice)},
    {"cuCtxSynchronize", 2000, pointer(cuCtxSynchronize)},
    {"cuMemGetAllocationGranularity", 10020, pointer(cuMemGetAllocationGranularity)},
    {"cuMemAddressReserve", 10020, pointer(cuMemAddressReserve)},
    {"cuMemAddressFree", 10020, pointer(cuMemAddressFree)},
    {"cuMemCreate", 10020, pointer(cuMemCreate)},
    {"cuMemRelease", 10020, pointer(cuMemRelease)},
    {"cuMemMap", 10020, pointer(cuMemMap)},
    {"cuMemUnmap", 10020, pointer(cuMemUnmap)},
    {"cuMemSetAccess", 10020, pointer(cuMemSetAccess)},
    {"cuMemGetAccess", 10020, pointer(cuMemGetAccess)},
    {"cuMemRetainAllocationHandle", 11000, pointer(cuMemRetainAllocationHandle)},
    {"cuMemGetAllocationPropertiesFromHandle", 10020,
     pointer(cuMemGetAllocationPropertiesFromHandle)},
    {"cuMemExportToShareableHandle", 10020, pointer(cuMemExportToShareableHandle)},
    {"cuMemGetInfo", 3020, pointer(cuMemGetInfo_v2)},
    {"cuMemAlloc", 3020, pointer(cuMemAlloc_v2)},
    {"cuMemFree", 3020, pointer(cuMemFree_v2)},
    {"cuMemGetAddressRange", 3020, pointer(cuMemGetAddressRange_v2)},
    {"cuMemHostAlloc", 2020, pointer(cuMemHostAlloc)},
    {"cuMemFreeHost", 2000, pointer(cuMemFreeHost)},
    {"cuMemHostGetDevicePointer", 3020, pointer(cuMemHostGetDevicePointer_v2)},
    {"cuMemcpyHtoD", 3020, pointer(cuMemcpyHtoD_v2)},
    {"cuMemcpyDtoH", 3020, pointer(cuMemcpyDtoH_v2)},
    {"cuMemcpyHtoDAsync", 3020, pointer(cuMemcpyHtoDAsync_v2)},
    {"cuMemcpyDtoHAsync", 3020, pointer(cuMemcpyDtoHAsync_v2)},
    {"cuMemcpyDtoDAsync", 3020, pointer(cuMemcpyDtoDAsync_v2)},
    {"cuMemsetD8Async", 3020, pointer(cuMemsetD8Async)},
    {"cuStreamCreate", 2000, pointer(cuStreamCreate)},
    {"cuStreamCreateWithPriority", 5050, pointer(cuStreamCreateWithPriority)},
    {"cuStreamDestroy", 4000, pointer(cuStreamDestroy_v2)},
    {"cuStreamSynchronize", 2000, pointer(cuStreamSynchronize)},
    {"cuStreamQuery", 2000, pointer(cuStreamQuery)},
    {"cuStreamWaitEvent", 3020, pointer(cuStreamWaitEvent)},
    {"cuEventCreate", 2000, pointer(cuEventCreate)},
    {"cuEventDestroy", 4000, pointer(cuEventDestroy_v2)},
    {"cuEventRecord", 2000, pointer(cuEventRecord)},
    {"cuEventQuery", 2000, pointer(cuEventQuery)},
    {"cuEventSynchronize", 2000, pointer(cuEventSynchronize)},
};

int find_symbol(const char* name, int version, void** function) {
  int status = kSymbolNotFound;
  for (const Symbol& symbol : kSymbols) {
    if (std::strcmp(symbol.base, name) != 0) continue;
    if (version >= symbol.since) {
      *function = symbol.function;
      return kSymbolFound;
    }
    status = kSymbolVersionNotSufficient;
  }
  return status;
}

}  // namespace

CUresult cuGetProcAddress_v2(const char* name, void** function, int version, std::uint64_t,
                             int* status) {
  return driver_call("cuGetProcAddress", Needs::kNothing, [&](State& state, Device&) -> CUresult {
    if (name == nullptr || function == nullptr || version > state.modes.driver_version) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "symbol of version %d asked for", version);
    }
    *function = nullptr;
    const int found = find_symbol(name, version, function);
    if (status != nullptr) *status = found;
    if (found == kSymbolFound) return CUDA_SUCCESS;
    // The text promises success and a null pointer; the list of codes has NOT_FOUND. Only a GPU
    // can tell, so it is a mode.
    return refuse(static_cast<CUresult>(state.modes.missing_symbol), "no symbol %s", name);
  });
}

CUresult cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
