// cuda_window.h: addresses of the driver's own at which pages are reached that no slot maps.
// Owns: address ranges, and the mappings in them.  Thread-safety: none; the driver locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "cuda_library.h"
#include "driver.h"

namespace vmalloc::cuda {

/// One place for each page number, taken when a copy first needs it and kept until the page goes:
/// a page that is copied once is often copied again, and mapping costs more than copying.
class PageWindow {
 public:
  PageWindow(Library& library, std::size_t page_bytes, AccessDesc access)
      : library_(library), page_bytes_(page_bytes), access_(access) {}
  PageWindow(const PageWindow&) = delete;
  PageWindow& operator=(const PageWindow&) = delete;

  /// Map a page in its place; the address, or none if memory is lacking.
  [[nodiscard]] std::optional<Address> try_map(std::uint32_t page_idx, Handle handle);
  void unmap(Address address);

  /// Give the addresses back, as far as the driver still answers. Requires: nothing is mapped.
  void close() noexcept;

 private:
  static constexpr std::uint32_t kPagesPerRange = 512;

  Library& library_;
  std::size_t page_bytes_;
  AccessDesc access_;
  std::map<std::uint32_t, Address> ranges_;  // by number of the range
};

}  // namespace vmalloc::cuda
