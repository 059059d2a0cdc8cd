// cuda_abi.h: the part of NVIDIA's driver ABI that we call, so that building needs no CUDA toolkit.
// Owns: nothing.  Thread-safety: plain types. Source: cuda.h of CUDA 12 and 13; names as there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vmalloc::cuda {

using Result = int;  ///< CUresult
using Device = int;  ///< CUdevice
using DevicePointer = unsigned long long;
using Handle = unsigned long long;  ///< CUmemGenericAllocationHandle
using Context = struct ContextTag*;
using StreamHandle = struct StreamTag*;
using Event = struct EventTag*;

constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr Result kDeinitialized = 4;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidDevice = 101;
constexpr Result kNotReady = 600;

// CUdevice_attribute
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kAttributeVirtualMemory = 102;
constexpr int kAttributePosixHandles = 103;
constexpr int kAttributeRdmaVirtualMemory = 110;

// CUmemAllocationType, CUmemLocationType, CUmemAllocationHandleType, CUmemAccess_flags
constexpr int kAllocationPinned = 1;
constexpr int kLocationDevice = 1;
constexpr int kHandlePosixFd = 1;
constexpr int kAccessRead = 1;
constexpr int kAccessReadWrite = 3;

// CUmemAllocationGranularity_flags
constexpr int kGranularityMinimum = 0;
constexpr int kGranularityRecommended = 1;

constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostPortable = 1;

/// The ABI whose functions cuGetProcAddress is asked for: the first that has it. It has all we
/// call, in their last form, and a driver refuses to name functions of a later version than its
/// own.
constexpr int kAbiVersion = 11030;

struct Location {
  int type;
  int id;
};

struct AllocationProp {
  int type;
  int handle_types;
  Location location;
  void* win32_metadata;
  struct {
    unsigned char compression;
    unsigned char gpu_direct_rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
static_assert(sizeof(AllocationProp) == 32, "CUmemAllocationProp has 32 bytes");

struct AccessDesc {
  Location location;
  int flags;
};
static_assert(sizeof(AccessDesc) == 12, "CUmemAccessDesc has 12 bytes");

using Size = std::size_t;
using Flags = unsigned long long;

// Every function we call: its base name, for cuGetProcAddress, and its arguments.
#define VMALLOC_CUDA_FUNCTIONS(X)                                          \
  X(cuInit, unsigned)                                                      \
  X(cuDriverGetVersion, int*)                                              \
  X(cuGetErrorName, Result, const char**)                                  \
  X(cuGetErrorString, Result, const char**)                                \
  X(cuDeviceGetCount, int*)                                                \
  X(cuDeviceGet, Device*, int)                                             \
  X(cuDeviceGetName, char*, int, Device)                                   \
  X(cuDeviceGetAttribute, int*, int, Device)                               \
  X(cuDeviceTotalMem, Size*, Device)                                       \
  X(cuDevicePrimaryCtxRetain, Context*, Device)                            \
  X(cuDevicePrimaryCtxRelease, Device)                                     \
  X(cuCtxGetCurrent, Context*)                                             \
  X(cuCtxSetCurrent, Context)                                              \
  X(cuMemGetInfo, Size*, Size*)                                            \
  X(cuMemGetAllocationGranularity, Size*, const AllocationProp*, int)      \
  X(cuMemAddressReserve, DevicePointer*, Size, Size, DevicePointer, Flags) \
  X(cuMemAddressFree, DevicePointer, Size)                                 \
  X(cuMemCreate, Handle*, Size, const AllocationProp*, Flags)              \
  X(cuMemRelease, Handle)                                                  \
  X(cuMemMap, DevicePointer, Size, Size, Handle, Flags)                    \
  X(cuMemUnmap, DevicePointer, Size)                                       \
  X(cuMemSetAccess, DevicePointer, Size, const AccessDesc*, Size)          \
  X(cuMemExportToShareableHandle, void*, Handle, int, Flags)               \
  X(cuMemHostAlloc, void**, Size, unsigned)                                \
  X(cuMemFreeHost, void*)                                                  \
  X(cuMemcpyDtoDAsync, DevicePointer, DevicePointer, Size, StreamHandle)   \
  X(cuMemcpyDtoHAsync, void*, DevicePointer, Size, StreamHandle)           \
  X(cuMemcpyHtoDAsync, DevicePointer, const void*, Size, StreamHandle)     \
  X(cuMemsetD8Async, DevicePointer, unsigned char, Size, StreamHandle)     \
  X(cuStreamSynchronize, StreamHandle)                                     \
  X(cuStreamWaitEvent, StreamHandle, Event, unsigned)                      \
  X(cuEventCreate, Event*, unsigned)                                       \
  X(cuEventDestroy, Event)                                                 \
  X(cuEventRecord, Event, StreamHandle)                                    \
  X(cuEventQuery, Event)

}  // namespace vmalloc::cuda
