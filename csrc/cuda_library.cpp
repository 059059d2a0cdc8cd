#include "cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>

namespace vmalloc::cuda {
namespace {

constexpr const char* kDefaultPath = "libcuda.so.1";

/// cuGetProcAddress as it has been since CUDA 12, and as it was in 11.3.
using GetProcAddress2 = Result (*)(const char*, void**, int, Flags, int*);
using GetProcAddress1 = Result (*)(const char*, void**, int, Flags);

/// Asks the driver for its functions, so that each has the ABI of kAbiVersion whatever the suffix
/// of its symbol.
class Resolver {
 public:
  explicit Resolver(void* library)
      : newer_(reinterpret_cast<GetProcAddress2>(dlsym(library, "cuGetProcAddress_v2"))),
        older_(reinterpret_cast<GetProcAddress1>(dlsym(library, "cuGetProcAddress"))) {
    if (newer_ == nullptr && older_ == nullptr) {
      throw ConfigError("the CUDA driver is too old: it has no cuGetProcAddress (CUDA 11.3)");
    }
  }

  [[nodiscard]] void* find(const char* name) const {
    void* address = nullptr;
    int status = 0;
    const Result result = newer_ != nullptr ? newer_(name, &address, kAbiVersion, 0, &status)
                                            : older_(name, &address, kAbiVersion, 0);
    if (result != kSuccess || address == nullptr) {
      throw ConfigError(std::string("the CUDA driver is too old: it has no ") + name);
    }
    return address;
  }

 private:
  GetProcAddress2 newer_;
  GetProcAddress1 older_;
};

}  // namespace

Library& Library::load(std::string path) {
  if (path.empty()) {
    const char* configured = std::getenv("VMALLOC_LIBCUDA");
    path = configured != nullptr && *configured != '\0' ? configured : kDefaultPath;
  }
  // Never unloaded: drivers may outlive the end of main, and a dlclose would take their functions.
  static auto* mutex = new std::mutex;
  static auto* libraries = new std::map<std::string, std::unique_ptr<Library>>;
  const std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<Library>& library = (*libraries)[path];
  if (library == nullptr) library.reset(new Library(path));
  const Result result = library->cuInit(0);  // again where it failed before: devices may come
  if (result == kNoDevice) throw ConfigError("the CUDA driver sees no device");
  if (result != kSuccess) {
    throw ConfigError("the CUDA driver does not start: " +
                      library->error("cuInit", result, "").name);
  }
  return *library;
}

Library::Library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw ConfigError("no CUDA driver: " + std::string(reason != nullptr ? reason : path));
  }
  const Resolver resolver(library);
#define VMALLOC_CUDA_BIND(name, ...) name.bind(resolver.find(#name));
  VMALLOC_CUDA_FUNCTIONS(VMALLOC_CUDA_BIND)
#undef VMALLOC_CUDA_BIND
  is_stand_in_ = dlsym(library, "fakecuda_version") != nullptr;
}

std::map<std::string, std::uint64_t> Library::calls() const {
  std::map<std::string, std::uint64_t> calls;
#define VMALLOC_CUDA_COUNT(name, ...) calls[#name] = name.calls();
  VMALLOC_CUDA_FUNCTIONS(VMALLOC_CUDA_COUNT)
#undef VMALLOC_CUDA_COUNT
  return calls;
}

std::string Library::error_name(Result result) const {
  const char* name = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) {
    return "CUDA error " + std::to_string(result);
  }
  return name;
}

DriverError Library::error(const char* call, Result result, const std::string& detail) const {
  const char* text = nullptr;
  std::string description;
  if (cuGetErrorString(result, &text) == kSuccess && text != nullptr) description = text;
  if (!detail.empty()) description += description.empty() ? detail : " (" + detail + ")";
  return DriverError(call, result, error_name(result), description);
}

}  // namespace vmalloc::cuda
