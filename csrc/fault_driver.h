// fault_driver.h: a driver that wraps a real one and fails, or holds fences, when a test says so.
// Owns: a share of the wrapped driver.  Thread-safety: all methods.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "driver.h"

namespace vmalloc {

/// What the chosen call does.
enum class Fault { kNone, kOutOfMemory, kError };

class FaultDriver final : public Driver {
 public:
  explicit FaultDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  /// Fail fallible call number `call` from now on (0 is the next): reserve, create and map count.
  void fail_call(std::uint64_t call, Fault fault);

  /// Fallible calls seen since the last fail_call.
  [[nodiscard]] std::uint64_t num_calls() const;

  /// Let call number `call` from now on of those that give back (unmap, destroy), clear or copy
  /// memory throw.
  void fail_release_call(std::uint64_t call);

  /// Wait this long before each mapping, so that other threads meet one under way.
  void delay_maps(unsigned microseconds);

  /// While held, fences recorded do not pass: kernels that are still running, as a GPU has them.
  void hold_fences(bool hold);

  const char* name() const override { return inner_->name(); }
  std::size_t granularity() const override { return inner_->granularity(); }
  std::size_t page_bytes() const override { return inner_->page_bytes(); }
  std::optional<Address> try_reserve(std::size_t bytes) override;
  void release(Address address, std::size_t bytes) override { inner_->release(address, bytes); }
  std::optional<PageHandle> try_create_page(std::uint32_t index) override;
  void destroy_page(PageHandle page) override;
  bool try_map(Address address, const PageHandle* pages, std::size_t num_pages,
               Access access) override;
  void unmap(Address address, std::size_t num_pages) override;
  void protect(Address address, std::size_t num_pages, Access access) override;
  void zero(Address address, std::size_t bytes) override;
  void copy_page(Address to, PageHandle from, std::size_t bytes) override;
  void read_page(PageHandle from, void* to) override;
  void write_page(PageHandle to, const void* from) override;
  Fence record_fence(Stream stream) override;
  bool fence_passed(Fence fence) override;
  MemoryInfo memory_info() const override { return inner_->memory_info(); }
  DriverCounters counters() const override { return inner_->counters(); }

 private:
  /// True if this call must report out of memory; throws if it must report an error.
  bool is_due(const char* call);
  void throw_if_release_due(const char* call);

  std::shared_ptr<Driver> inner_;
  mutable std::mutex mutex_;
  Fault fault_ = Fault::kNone;
  std::uint64_t fail_at_ = 0;
  std::uint64_t num_calls_ = 0;
  std::uint64_t release_fail_at_ = UINT64_MAX;
  std::uint64_t num_release_calls_ = 0;
  std::atomic<unsigned> map_delay_us_{0};
  bool hold_ = false;
  Fence next_fence_ = 1;
  Fence passed_ = 0;
};

}  // namespace vmalloc
