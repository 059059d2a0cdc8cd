// swapped_group.h: what is kept of sequences whose pages went to host memory.
// Owns: the copies.  Thread-safety: none; the arena locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "page_pool.h"

namespace vmalloc {

/// A page of a swapped-out group: copied, or held because slots outside the group share it.
struct SwappedPage {
  bool is_held;
  std::size_t idx;  ///< into `held`, or number of the copy
};

struct SwappedSlot {
  bool is_dropped;  ///< it is not wanted back
  std::size_t num_rows;
  std::size_t reserved_rows;
  std::vector<std::vector<SwappedPage>> regions;
};

struct SwappedGroup {
  std::vector<SwappedSlot> slots;
  std::vector<PageId> held;  ///< one held reference each; kNoPage where no slot needs it any more
  /// Likewise null. Groups that held one page share the copy of it.
  std::vector<std::shared_ptr<char[]>> copies;
  std::size_t num_copies = 0;
};

}  // namespace vmalloc
