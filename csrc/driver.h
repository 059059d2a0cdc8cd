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

struct MemoryInfo {
  std::size_t free_bytes;
  std::size_t total_bytes;
};

/// Driver calls made so far; they only ever grow.
struct DriverCounters {
  std::uint64_t map_calls = 0;
  std::uint64_t unmap_calls = 0;
  std::uint64_t create_calls = 0;
  std::uint64_t destroy_calls = 0;
};

/// One page size per driver object. `try_` methods report lack of memory (or of mappings) as a
/// value and change nothing then; any other failure throws DriverError.
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

  /// Take `bytes` (a page multiple) of address space, aligned to a page. Reading rows that are not
  /// mapped yields 0.0 where the device allows it (host); writing them faults.
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

  /// Fill mapped writable memory with zeros before anything later on any stream reads it.
  virtual void zero(Address address, std::size_t bytes) = 0;

  /// Copy the first `bytes` of a page, mapped or not, to mapped writable memory: after what was
  /// enqueued so far on any stream may have written it, before anything later reads the copy.
  virtual void copy_page(Address to, PageHandle from, std::size_t bytes) = 0;

  /// Copy a whole page to host memory or back, in the same order; done when the call returns.
  virtual void read_page(PageHandle from, void* to) = 0;
  virtual void write_page(PageHandle to, const void* from) = 0;

  /// A fence that passes once all work enqueued on `stream` so far is done.
  [[nodiscard]] virtual Fence record_fence(Stream stream) = 0;
  [[nodiscard]] virtual bool fence_passed(Fence fence) = 0;

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
