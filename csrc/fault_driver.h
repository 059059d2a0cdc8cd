// fault_driver.h: a driver that wraps a real one and fails, or holds fences, when a test says so.
// Owns: a share of the wrapped driver.  Thread-safety: all methods.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "driver.h"

namespace vmalloc {

/// What the chosen call does.
enum class Fault { kNone, kOutOfMemory, kError };

class FaultDriver final : public Driver {
 public:
  explicit FaultDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  /// Fail fallible call number `call` from now on (0 is the next): all that `try_` names counts.
  void fail_call(std::uint64_t call, Fault fault);

  /// Fallible calls seen since the last fail_call.
  [[nodiscard]] std::uint64_t num_calls() const;

  /// Let call number `call` from now on of those that give back (unmap, destroy), protect, clear or
  /// copy memory throw.
  void fail_release_call(std::uint64_t call);

  /// Wait this long before each mapping, so that other threads meet one under way.
  void delay_maps(unsigned microseconds);

  /// While held, fences recorded do not pass: kernels that are still running, as a GPU has them.
  void hold_fences(bool hold);

  /// Fences pass at once whatever still runs: the mistake that fences are there to prevent.
  void ignore_fences(bool ignore) { ignore_ = ignore; }

  const char* name() const override { return inner_->name(); }
  std::size_t granularity() const override { return inner_->granularity(); }
  std::size_t page_bytes() const override { return inner_->page_bytes(); }
  TensorDevice tensor_device() const override { return inner_->tensor_device(); }
  bool is_async() const override { return inner_->is_async(); }
  bool can_protect() const override { return inner_->can_protect(); }
  std::uint64_t num_enqueued() const override { return inner_->num_enqueued(); }
  void attach_thread() override { inner_->attach_thread(); }
  void use_stream(Stream stream) override { inner_->use_stream(stream); }
  std::optional<Address> try_reserve(std::size_t bytes) override;
  void release(Address address, std::size_t bytes) override { inner_->release(address, bytes); }
  std::optional<PageHandle> try_create_page(std::uint32_t index) override;
  void destroy_page(PageHandle page) override;
  bool try_map(Address address, const PageHandle* pages, std::size_t num_pages,
               Access access) override;
  void unmap(Address address, std::size_t num_pages) override;
  void protect(Address address, std::size_t num_pages, Access access) override;
  bool try_zero(Address address, std::size_t bytes) override;
  bool try_copy_page(Address to, PageHandle from, std::size_t bytes) override;
  std::shared_ptr<char[]> try_allocate_host(std::size_t bytes) override;
  bool try_read_pages(const PageHandle* from, char* const* to, std::size_t num_pages) override;
  bool try_write_pages(const PageHandle* to, const char* const* from,
                       std::size_t num_pages) override;
  std::optional<Fence> try_record_fence() override;
  bool fence_passed(Fence fence) override;
  void wait_enqueued() override { inner_->wait_enqueued(); }
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
  std::atomic<bool> ignore_{false};
  Fence next_fence_ = 1;
  Fence passed_ = 0;
  std::deque<std::pair<Fence, Fence>> recorded_;  // ours and the wrapped driver's, not yet passed
};

}  // namespace vmalloc
