// dlpack.h: the DLPack 0.8 ABI, as much of it as handing out a tensor needs.
// Owns: nothing.  Thread-safety: plain structs. Source: dmlc/dlpack, include/dlpack/dlpack.h.
#pragma once

#include <cstdint>

namespace vmalloc::dlpack {

constexpr std::int32_t kDeviceCpu = 1;
constexpr std::int32_t kDeviceCuda = 2;
constexpr std::uint8_t kTypeUInt = 1;
constexpr std::uint8_t kTypeFloat = 2;
constexpr std::uint8_t kTypeBfloat = 4;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace vmalloc::dlpack
