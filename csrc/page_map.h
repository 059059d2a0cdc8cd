// page_map.h: the pages of every slot, as people look at them.
// Owns: nothing.  Thread-safety: plain values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vmalloc {

/// kLive: rows of a live slot need it. kShared: likewise, and other live slots map it too.
/// kAhead: mapped in a live slot beyond that. kParked: mapped in an idle slot. kRetired: mapped
/// only until the kernels that may still read it are done.
enum class PageKind : std::uint8_t { kLive, kShared, kAhead, kParked, kRetired };

/// So many neighbouring pages of one kind.
struct PageRun {
  PageKind kind;
  std::size_t num_pages;
};

/// One slot that maps pages: per region the runs from its first address on.
struct SlotMap {
  std::uint32_t slot;
  std::vector<std::vector<PageRun>> regions;
};

}  // namespace vmalloc
