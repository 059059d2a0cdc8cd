// driver.h: what a source of physical pages must do; one conformance suite runs over every driver.
// Owns: nothing.  Thread-safety: every method may be called from any thread at any time, but no two
// calls may touch the same addresses at once; that is the arena's duty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

namespace vmalloc {

using Address = std::uintptr_t;
using PageHandle = std::uint64_t;  ///< the driver's name for one physical page
using Stream = std::uint64_t;      ///< the engine's stream handle, 0 where there are no streams
using Fence = std::uint64_t;       ///< a point in a stream; 0 has always passed

enum class Access { kReadWrite, kReadOnly };

/// Where tensors over a driver's memory are, in DLPack's numbers.
struct TensorDevice {
  std::int32_t type;
  std::int32_t id;
};

struct MemoryInfo {
  std::size_t free_bytes;
  std::size_t total_bytes;
};

/// Driver calls made so far; they only ever grow.
struct DriverCounters {
  std::uint64_t map_calls = 0;     ///< runs of pages mapped
  std::uint64_t unmap_calls = 0;   ///< runs unmapped
  std::uint64_t access_calls = 0;  ///< calls that made mapped pages accessible, where that is one
  std::uint64_t create_calls = 0;
  std::uint64_t destroy_calls = 0;
  std::uint64_t wait_calls = 0;  ///< times a caller waited for the device
};

/// One page size per driver object. `try_` methods report lack of memory (or of mappings) as a
/// value and change nothing then; any other failure throws DriverError.
///
/// Where the device works on its own (is_async), zeroing and copying are enqueued: in the order of
/// the calls, after all work that was enqueued on the driver's stream before, ahead of what comes
/// after. Nothing that they touch may be unmapped before a fence recorded later has passed.
class Driver {
 public:
  Driver() = default;
  virtual ~Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  [[nodiscard]] virtual const char* name() const = 0;

  /// Smallest unit the device maps; `page_bytes()` is a multiple of it.
  [[nodiscard]] virtual std::size_t granularity() const = 0;
  [[nodiscard]] virtual std::size_t page_bytes() const = 0;
  [[nodiscard]] virtual TensorDevice tensor_device() const = 0;
  [[nodiscard]] virtual bool is_async() const = 0;
  /// Whether pages can be mapped for reading only.
  [[nodiscard]] virtual bool can_protect() const = 0;
  /// Pieces of work that this driver enqueued so far, mapping new pages included; only ever grows.
  [[nodiscard]] virtual std::uint64_t num_enqueued() const = 0;

  /// The calling thread is one that the arena made for driver calls: spare it what every call does
  /// to leave a thread as it was.
  virtual void attach_thread() = 0;

  /// Enqueue on `stream` from now on, after whatever was enqueued on the stream before it.
  virtual void use_stream(Stream stream) = 0;

  /// Take `bytes` (a page multiple) of address space, aligned to a page whose size is a power of
  /// two, else to the granularity. Reading rows that are not mapped yields 0.0 where the device
  /// allows it (host) and faults elsewhere; writing them faults.
  [[nodiscard]] virtual std::optional<Address> try_reserve(std::size_t bytes) = 0;

  /// Requires: the whole of a reservation, nothing mapped in it.
  virtual void release(Address address, std::size_t bytes) = 0;

  /// Create one page of zeros. `index` is the caller's number for it: pages with neighbouring
  /// numbers map to neighbouring addresses most cheaply. Requires: no live page has this index.
  [[nodiscard]] virtual std::optional<PageHandle> try_create_page(std::uint32_t index) = 0;

  /// Give a page back to the system. Requires: mapped nowhere.
  virtual void destroy_page(PageHandle page) = 0;

  /// Map `num_pages` pages side by side from `address` on, all or none. A page may be mapped at
  /// several addresses. Requires: the range is reserved and unmapped.
  [[nodiscard]] virtual bool try_map(Address address, const PageHandle* pages,
                                     std::size_t num_pages, Access access) = 0;

  /// Requires: every page of the range is mapped, by whole earlier try_map pages.
  virtual void unmap(Address address, std::size_t num_pages) = 0;

  /// Change how mapped pages may be accessed. Requires: as for unmap.
  virtual void protect(Address address, std::size_t num_pages, Access access) = 0;

  /// Fill mapped writable memory with zeros.
  [[nodiscard]] virtual bool try_zero(Address address, std::size_t bytes) = 0;

  /// Copy the first `bytes` of a page, mapped or not, to mapped writable memory.
  [[nodiscard]] virtual bool try_copy_page(Address to, PageHandle from, std::size_t bytes) = 0;

  /// Host memory that pages are copied to and from fastest; null if there is none.
  [[nodiscard]] virtual std::shared_ptr<char[]> try_allocate_host(std::size_t bytes) = 0;

  /// Copy whole pages to host memory or back, after what was enqueued so far; done when the call
  /// returns.
  [[nodiscard]] virtual bool try_read_pages(const PageHandle* from, char* const* to,
                                            std::size_t num_pages) = 0;
  [[nodiscard]] virtual bool try_write_pages(const PageHandle* to, const char* const* from,
                                             std::size_t num_pages) = 0;

  /// A fence that passes once all work enqueued on the stream so far is done.
  [[nodiscard]] virtual std::optional<Fence> try_record_fence() = 0;
  [[nodiscard]] virtual bool fence_passed(Fence fence) = 0;

  /// Wait until all work enqueued on the stream so far is done: for errors and endings, never for
  /// a step.
  virtual void wait_enqueued() = 0;

  [[nodiscard]] virtual MemoryInfo memory_info() const = 0;
  [[nodiscard]] virtual DriverCounters counters() const = 0;
};

/// Pages in a memfd, mapped with mmap(MAP_FIXED). Throws ConfigError on a bad page size.
[[nodiscard]] std::shared_ptr<Driver> make_host_driver(std::size_t page_bytes);

/// Counts pages and maps nothing: for simulations far larger than the machine.
[[nodiscard]] std::shared_ptr<Driver> make_null_driver(std::size_t page_bytes);

/// Throws ConfigError unless `page_bytes` is a positive multiple of `granularity`.
void check_page_bytes(const char* driver, std::size_t page_bytes, std::size_t granularity);

}  // namespace vmalloc
