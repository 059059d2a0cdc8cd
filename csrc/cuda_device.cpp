#include "cuda_device.h"

namespace vmalloc::cuda {
namespace {

constexpr int kMaxName = 256;

[[noreturn]] void refuse(int ordinal, const std::string& reason) {
  throw ConfigError("CUDA device " + std::to_string(ordinal) + " " + reason);
}

}  // namespace

DeviceContext::DeviceContext(Library& library, int ordinal, const PageKind& kind)
    : library_(library), ordinal_(ordinal) {
  int count = 0;
  library_.check("cuDeviceGetCount", library_.cuDeviceGetCount(&count));
  if (ordinal < 0 || ordinal >= count) {
    refuse(ordinal, "does not exist; there are " + std::to_string(count));
  }
  library_.check("cuDeviceGet", library_.cuDeviceGet(&device_, ordinal));
  if (attribute(kAttributeVirtualMemory) == 0) refuse(ordinal, "has no virtual memory management");
  if (kind.exportable && attribute(kAttributePosixHandles) == 0) {
    refuse(ordinal, "cannot export memory as file descriptors");
  }
  if (kind.gpu_direct_rdma && attribute(kAttributeRdmaVirtualMemory) == 0) {
    refuse(ordinal, "has no GPUDirect RDMA for mapped memory");
  }
  prop_.type = kAllocationPinned;
  prop_.location = {kLocationDevice, ordinal};
  prop_.handle_types = kind.exportable ? kHandlePosixFd : 0;
  prop_.flags.gpu_direct_rdma = kind.gpu_direct_rdma ? 1 : 0;
  library_.check("cuDevicePrimaryCtxRetain", library_.cuDevicePrimaryCtxRetain(&context_, device_));
}

DeviceContext::~DeviceContext() {
  if (context_ == nullptr) return;
  Library::give_back([this] { return library_.cuDevicePrimaryCtxRelease(device_); });
}

std::size_t DeviceContext::granularity(int kind) const {
  std::size_t bytes = 0;
  library_.check("cuMemGetAllocationGranularity",
                 library_.cuMemGetAllocationGranularity(&bytes, &prop_, kind));
  return bytes;
}

std::string DeviceContext::name() const {
  char name[kMaxName] = "";
  library_.check("cuDeviceGetName", library_.cuDeviceGetName(name, kMaxName, device_));
  return name;
}

std::string DeviceContext::compute_capability() const {
  return std::to_string(attribute(kAttributeMajor)) + "." +
         std::to_string(attribute(kAttributeMinor));
}

std::size_t DeviceContext::total_bytes() const {
  std::size_t bytes = 0;
  library_.check("cuDeviceTotalMem", library_.cuDeviceTotalMem(&bytes, device_));
  return bytes;
}

int DeviceContext::driver_version() const {
  int version = 0;
  library_.check("cuDriverGetVersion", library_.cuDriverGetVersion(&version));
  return version;
}

int DeviceContext::attribute(int which) const {
  int value = 0;
  library_.check("cuDeviceGetAttribute", library_.cuDeviceGetAttribute(&value, which, device_));
  return value;
}

CurrentContext::CurrentContext(Library& library, Context context) : library_(library) {
  library_.check("cuCtxGetCurrent", library_.cuCtxGetCurrent(&former_));
  if (former_ == context) return;
  library_.check("cuCtxSetCurrent", library_.cuCtxSetCurrent(context));
  is_changed_ = true;
}

CurrentContext::~CurrentContext() {
  if (is_changed_) static_cast<void>(library_.cuCtxSetCurrent(former_));
}

}  // namespace vmalloc::cuda
