// slot.h: the books of one sequence slot: which pages back it, and which of those are still needed.
// Owns: nothing; page references are counted in the pool.  Thread-safety: none; the arena locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "page_pool.h"

namespace vmalloc {

/// Number of an engine step, or of what the driver enqueued between two; monotonic, 0 is before
/// all.
using Epoch = std::uint64_t;

/// kAdmitting: chosen for a new sequence whose rows are not backed yet; lasts for one call.
/// kDraining: its sequence ended, but pages that others share are still mapped in it; it is idle
/// once no kernel can read them there.
enum class SlotState : std::uint8_t { kIdle, kAdmitting, kLive, kDraining };

/// What a new slot starts with: pages that exist already. One entry a region.
struct Prefix {
  std::size_t num_rows = 0;
  std::vector<std::vector<PageId>> pages;  ///< to be shared, from the first row on
  std::vector<PageId> tails;  ///< to copy the rest of the rows from; kNoPage if there is no rest
};

/// The pages of one slot in one region, mapped side by side from the slot's first address on.
struct SlotPages {
  std::vector<PageId> pages;          ///< held ones first, then retired ones
  std::vector<Epoch> retired_epochs;  ///< when each retired page was last readable
  std::size_t num_exposed = 0;        ///< pages that a kernel may have read since they were mapped
  std::size_t num_shared = 0;         ///< leading pages, at most, that others may refer to
  Epoch enqueued_in = 0;              ///< when the driver last enqueued work on any of the pages

  [[nodiscard]] std::size_t num_held() const { return pages.size() - retired_epochs.size(); }
};

struct Slot {
  SlotState state = SlotState::kIdle;
  bool in_flight = false;          ///< the worker maps pages for it right now, outside the lock
  bool is_queued = false;          ///< waits in the worker's queue
  const Prefix* prefix = nullptr;  ///< what it starts with, while it is admitted
  std::size_t num_rows = 0;        ///< rows of a live slot that hold data
  std::size_t reserved_rows = 0;   ///< rows that stay backed for it whether they hold data or not
  std::size_t shared_rows = 0;     ///< rows below this may lie in pages that others refer to
  std::size_t wanted_rows = 0;  ///< rows that reclaim must leave backed, or the worker should back
  std::size_t commit_rows = 0;  ///< num_rows may grow to this without needing another page
  std::size_t ready_rows = 0;   ///< ... and to this without needing one that is not mapped
  Epoch last_use = 0;           ///< of an idle slot: last step whose kernels may read its pages
  std::uint64_t parked_at = 0;  ///< order in which slots became idle
  std::uint64_t named_in = 0;   ///< last call that named the slot: naming one twice is an error
  std::vector<SlotPages> regions;

  [[nodiscard]] std::size_t committed_rows() const {
    return num_rows > reserved_rows ? num_rows : reserved_rows;
  }
};

}  // namespace vmalloc
