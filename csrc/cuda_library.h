// cuda_library.h: libcuda, found when it is first needed; every call of it is counted.
// Owns: the loaded library, for ever.  Thread-safety: all methods.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>

#include "cuda_abi.h"
#include "error.h"

namespace vmalloc::cuda {

/// One function of the driver, called like the function itself.
template <typename... Args>
class Function {
 public:
  explicit Function(const char* name) : name_(name) {}
  Result operator()(Args... args) const {
    calls_.fetch_add(1, std::memory_order_relaxed);
    return function_(args...);
  }
  [[nodiscard]] const char* name() const { return name_; }
  [[nodiscard]] std::uint64_t calls() const { return calls_.load(std::memory_order_relaxed); }
  void bind(void* address) { function_ = reinterpret_cast<Result (*)(Args...)>(address); }

 private:
  const char* name_;
  Result (*function_)(Args...) = nullptr;
  mutable std::atomic<std::uint64_t> calls_{0};
};

/// The functions are members by their own names: `library.cuMemMap(...)`.
class Library {
 public:
  /// The library of that path, initialised; the same object for the same path. An empty path is
  /// the environment's VMALLOC_LIBCUDA, else libcuda.so.1. Throws ConfigError saying what is
  /// absent.
  static Library& load(std::string path);

#define VMALLOC_CUDA_MEMBER(name, ...) Function<__VA_ARGS__> name{#name};
  VMALLOC_CUDA_FUNCTIONS(VMALLOC_CUDA_MEMBER)
#undef VMALLOC_CUDA_MEMBER

  /// Calls so far, by name of the function.
  [[nodiscard]] std::map<std::string, std::uint64_t> calls() const;

  /// "CUDA_ERROR_INVALID_VALUE", or the number where the driver knows no name.
  [[nodiscard]] std::string error_name(Result result) const;

  [[nodiscard]] DriverError error(const char* call, Result result, const std::string& detail) const;

  /// Throw DriverError unless `result` is success.
  void check(const char* call, Result result, const std::string& detail = "") const {
    if (result != kSuccess) throw error(call, result, detail);
  }

  /// True if it worked, false if memory was lacking; throws otherwise.
  [[nodiscard]] bool try_check(const char* call, Result result,
                               const std::string& detail = "") const {
    if (result == kOutOfMemory) return false;
    check(call, result, detail);
    return true;
  }

  /// Give something back where nobody could be told of an error: twice at most.
  template <typename Call>
  static void give_back(Call call) noexcept {
    if (call() != kSuccess) static_cast<void>(call());
  }

  /// Whether this is the tests' stand-in, whose device memory the CPU can read.
  [[nodiscard]] bool is_stand_in() const { return is_stand_in_; }

 private:
  explicit Library(const std::string& path);

  bool is_stand_in_ = false;
};

}  // namespace vmalloc::cuda
