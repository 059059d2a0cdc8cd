// cuda_device.h: one GPU as the driver describes it, and its primary context.
// Owns: a reference to the primary context.  Thread-safety: all methods.
#pragma once

#include <cstddef>
#include <string>

#include "cuda_library.h"

namespace vmalloc::cuda {

/// What is asked of every page of a driver object: it changes the granularity.
struct PageKind {
  bool exportable = false;       ///< a file descriptor can be had for it
  bool gpu_direct_rdma = false;  ///< network cards may reach it
};

class DeviceContext {
 public:
  /// Throws ConfigError if there is no such device, or if it has no virtual memory management or
  /// not what `kind` asks for.
  DeviceContext(Library& library, int ordinal, const PageKind& kind);
  ~DeviceContext();
  DeviceContext(const DeviceContext&) = delete;
  DeviceContext& operator=(const DeviceContext&) = delete;

  [[nodiscard]] int ordinal() const { return ordinal_; }
  [[nodiscard]] Context context() const { return context_; }
  [[nodiscard]] const AllocationProp& prop() const { return prop_; }
  [[nodiscard]] std::size_t granularity(int kind) const;
  [[nodiscard]] std::string name() const;
  [[nodiscard]] std::string compute_capability() const;
  [[nodiscard]] std::size_t total_bytes() const;
  [[nodiscard]] int driver_version() const;

  /// Leave the context to the end of the process: the driver is gone, or it is another process's.
  void forget() { context_ = nullptr; }

 private:
  [[nodiscard]] int attribute(int which) const;

  Library& library_;
  int ordinal_;
  Device device_ = 0;
  Context context_ = nullptr;
  AllocationProp prop_{};
};

/// Makes a context current in this thread, and the former one again at the end.
class CurrentContext {
 public:
  /// Throws DriverError.
  CurrentContext(Library& library, Context context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  Library& library_;
  Context former_ = nullptr;
  bool is_changed_ = false;
};

}  // namespace vmalloc::cuda
