// abi.h: the part of the CUDA driver's binary interface that the stand-in speaks, written out so
// that no toolkit is needed.
// Owns: nothing.  Thread-safety: constants and plain data.
//
// Values and layouts: cuda.h of CUDA 13.0. Enumerations are 32-bit integers on this platform.
#pragma once

#include <cstddef>
#include <cstdint>

using CUdevice = int;
using CUdeviceptr = std::uint64_t;
using CUcontext = void*;
using CUstream = void*;
using CUevent = void*;
using CUmemGenericAllocationHandle = std::uint64_t;

enum CUresult : int {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_DEINITIALIZED = 4,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_OPERATING_SYSTEM = 304,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_ILLEGAL_STATE = 401,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_NOT_PERMITTED = 800,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_UNKNOWN = 999,
};

struct CUuuid {
  char bytes[16];
};

struct CUmemLocation {
  int type;  // kLocationDevice, or one of the host types
  int id;
};

struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
};

static_assert(sizeof(CUmemAllocationProp) == 32 && sizeof(CUmemAccessDesc) == 12, "cuda.h layout");

namespace fakecuda {

constexpr int kDriverVersion = 13000;

constexpr int kLocationDevice = 1;
constexpr int kAllocationPinned = 1;
constexpr int kHandleNone = 0;
constexpr int kHandlePosixFd = 1;

constexpr int kGranularityMinimum = 0;
constexpr int kGranularityRecommended = 1;

constexpr int kAccessNone = 0;
constexpr int kAccessRead = 1;
constexpr int kAccessReadWrite = 3;

constexpr int kSymbolFound = 0;
constexpr int kSymbolNotFound = 1;
constexpr int kSymbolVersionNotSufficient = 2;

}  // namespace fakecuda
