// kv_arena_shrink.cpp: the half of the arena that takes pages back: retire, settle, reclaim, trim.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
#include <algorithm>
#include <iterator>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

void KVArena::truncate(std::uint32_t slot, std::size_t num_rows) {
  Lock lock = enter();
  Slot& entry = slots_[live_slot(slot)];
  if (num_rows > entry.num_rows) {
    throw ConfigError(with_limit(
        "num_rows", num_rows, "at most the rows the slot has, " + std::to_string(entry.num_rows)));
  }
  wait(lock, [&entry] { return !entry.in_flight; });
  set_rows(entry, num_rows);
  drop_surplus(slot);
}

/// Retire what the slot's rows, and those that come soon, do not need.
void KVArena::drop_surplus(std::uint32_t slot) {
  const Slot& entry = slots_[slot];
  // Shared pages are no use as pages ahead: they cannot be written.
  const std::size_t ahead = entry.num_rows < entry.shared_rows ? 0 : config_.ahead_rows;
  const std::size_t num_rows = std::max(entry.num_rows + ahead, entry.committed_rows());
  try {
    drop_tail(slot, std::min(num_rows, config_.max_rows), SIZE_MAX);
  } catch (const DriverError&) {
    // The rows are gone all the same: what could not be unmapped is retired, and settling tries
    // again.
  }
}

/// Retire pages from the slot's tail that rows [0, keep_rows) do not need, at most `max_pages`;
/// the number retired. Those that no kernel can still read are unmapped at once.
std::size_t KVArena::drop_tail(std::uint32_t slot, std::size_t keep_rows, std::size_t max_pages) {
  Slot& entry = slots_[slot];
  const Epoch last_use = entry.state == SlotState::kLive ? epoch_ : entry.last_use;
  std::size_t num_dropped = 0;
  Epoch last_epoch = 0;
  for (std::size_t r = regions_.size(); r-- > 0 && num_dropped < max_pages;) {
    SlotPages& mapped = entry.regions[r];
    const std::size_t num_held = mapped.num_held();
    const std::size_t needed = pages_needed(r, keep_rows);
    if (num_held <= needed) continue;
    const std::size_t num_pages = std::min(num_held - needed, max_pages - num_dropped);
    std::vector<Epoch> epochs(num_pages);
    for (std::size_t i = 0; i < num_pages; ++i) {
      const std::size_t page_idx = num_held - num_pages + i;
      pool_.retire(mapped.pages[page_idx]);
      epochs[i] = std::max(page_idx < mapped.num_exposed ? last_use : 0, mapped.enqueued_in);
      last_epoch = std::max(last_epoch, epochs[i]);
    }
    mapped.retired_epochs.insert(mapped.retired_epochs.begin(), epochs.begin(), epochs.end());
    retiring_.insert({slot, r});
    num_dropped += num_pages;
  }
  if (num_dropped == 0) return 0;
  want_fence(last_epoch);
  update_limits(entry);
  update_idle(slot);
  // Last, because the driver may throw: the books are right with the pages still retired.
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    if (settle_region(slot, r)) retiring_.erase({slot, r});
  }
  finish_drain(slot);
  return num_dropped;
}

/// Unmap and free the region's retired pages whose steps are complete; true if none is left.
bool KVArena::settle_region(std::uint32_t slot, std::size_t region) {
  SlotPages& mapped = slots_[slot].regions[region];
  std::size_t num_pages = 0;
  while (num_pages < mapped.retired_epochs.size() &&
         mapped.retired_epochs[mapped.retired_epochs.size() - 1 - num_pages] <= completed_) {
    ++num_pages;
  }
  if (num_pages > 0) {
    const std::size_t first = mapped.pages.size() - num_pages;
    driver_->unmap(regions_[region]->page_address(slot, first), num_pages);
    const std::vector<PageId> unmapped(mapped.pages.begin() + static_cast<std::ptrdiff_t>(first),
                                       mapped.pages.end());
    mapped.pages.resize(first);
    mapped.retired_epochs.resize(mapped.retired_epochs.size() - num_pages);
    mapped.num_exposed = std::min(mapped.num_exposed, first);
    mapped.num_shared = std::min(mapped.num_shared, first);
    for (const PageId page : unmapped) pool_.settle(page);
    update_limits(slots_[slot]);
  }
  return mapped.retired_epochs.empty();
}

void KVArena::settle() {
  for (auto it = retiring_.begin(); it != retiring_.end();) {
    // An in-flight growth counts on where the slot's pages end; it is settled next time.
    const bool is_done = !slots_[it->first].in_flight && settle_region(it->first, it->second);
    const std::uint32_t slot = it->first;
    it = is_done ? retiring_.erase(it) : std::next(it);
    if (is_done) finish_drain(slot);
  }
}

/// Take pages back until `num_pages` are available: ahead first, which mostly need no fence. For
/// parked ones those that wait for a fence count: a caller that is short only because of them had
/// better try again after the step.
void KVArena::make_available(std::size_t num_pages) {
  const PoolStats pool = pool_.stats();
  // Above the cap, freed pages are destroyed: nothing is gained before the surplus is gone.
  const std::size_t surplus =
      pool.num_created > pool.max_pages ? pool.num_created - pool.max_pages : 0;
  const std::size_t wanted = num_pages + surplus;
  const std::size_t available = pool_.available();
  if (available < wanted) reclaim_ahead(wanted - available);
  const std::size_t coming = pool_.available() + pool_.stats().num_retired;
  if (coming < wanted) reclaim_parked(wanted - coming);
}

/// Take back pages that no live row needs: ahead first, then parked; the number taken.
std::size_t KVArena::reclaim(std::size_t num_pages) {
  const std::size_t num_ahead = reclaim_ahead(num_pages);
  return num_ahead < num_pages ? num_ahead + reclaim_parked(num_pages - num_ahead) : num_ahead;
}

std::size_t KVArena::reclaim_ahead(std::size_t num_pages) {
  std::size_t num_reclaimed = 0;
  for (std::uint32_t slot = 0; slot < slots_.size() && num_reclaimed < num_pages; ++slot) {
    const Slot& entry = slots_[slot];
    if (entry.state == SlotState::kIdle || entry.in_flight) continue;
    num_reclaimed += drop_tail(slot, std::max(entry.committed_rows(), entry.wanted_rows),
                               num_pages - num_reclaimed);
  }
  totals_.reclaimed_pages += num_reclaimed;
  return num_reclaimed;
}

std::size_t KVArena::reclaim_parked(std::size_t num_pages) {
  std::size_t num_reclaimed = 0;
  idle_.visit_oldest([&](std::uint32_t slot) {
    if (num_reclaimed >= num_pages) return false;
    if (slots_[slot].in_flight) return true;
    slots_[slot].wanted_rows = 0;
    num_reclaimed += drop_tail(slot, 0, num_pages - num_reclaimed);
    return true;
  });
  totals_.reclaimed_pages += num_reclaimed;
  return num_reclaimed;
}

/// Make free pages out of ones that nobody is about to need, so that growth need not create any:
/// moving a page is cheaper than making one, and memory follows what is needed at once.
void KVArena::recycle(std::size_t num_pages) {
  const std::size_t num_free = pool_.stats().num_free;
  if (num_pages <= num_free) return;
  const std::size_t missing = num_pages - num_free;
  const std::size_t num_parked = recycle_parked(missing);
  if (num_parked < missing) recycle_surplus(missing - num_parked);
}

/// Parked pages, but for those of the slot that a coming sequence is promised, and those that a
/// kernel may still read; the number taken.
std::size_t KVArena::recycle_parked(std::size_t num_pages) {
  std::size_t num_recycled = 0;
  idle_.visit_oldest([&](std::uint32_t slot) {
    if (num_recycled >= num_pages) return false;
    const Slot& entry = slots_[slot];
    if (!entry.in_flight && entry.wanted_rows == 0 && entry.last_use <= completed_) {
      num_recycled += drop_tail(slot, 0, num_pages - num_recycled);
    }
    return true;
  });
  totals_.reclaimed_pages += num_recycled;
  return num_recycled;
}

/// What warm slots have beyond the commit-ahead of the sequences that adopted them.
void KVArena::recycle_surplus(std::size_t num_pages) {
  std::size_t num_recycled = 0;
  for (auto it = surplus_.begin(); it != surplus_.end() && num_recycled < num_pages;) {
    const Slot& entry = slots_[*it];
    if (entry.in_flight) {
      ++it;
      continue;
    }
    std::size_t num_dropped = 0;
    const std::size_t missing = num_pages - num_recycled;
    if (entry.state == SlotState::kLive) {
      num_dropped = drop_tail(*it, rows_to_keep(entry), missing);
    }
    num_recycled += num_dropped;
    if (num_dropped < missing) it = surplus_.erase(it);  // it has no more
  }
  totals_.reclaimed_pages += num_recycled;
}

/// Rows that the slot needs backed now, and soon.
std::size_t KVArena::rows_to_keep(const Slot& slot) const {
  const std::size_t num_rows = std::max(slot.committed_rows(), slot.wanted_rows);
  return std::min(num_rows + config_.ahead_rows, config_.max_rows);
}

/// After a resize to less: parked pages leave first.
void KVArena::give_back_above_cap() {
  const PoolStats pool = pool_.stats();
  if (pool.num_created > pool.max_pages + pool.num_retired) {
    reclaim_parked(pool.num_created - pool.max_pages - pool.num_retired);
  }
}

void KVArena::give_back_above_high() {
  give_back_above_cap();
  if (config_.high_pages >= config_.max_pages) return;
  const std::size_t num_free = pool_.stats().num_free;
  if (num_free + idle_.num_pages() <= config_.high_pages) return;
  const std::size_t surplus = num_free + idle_.num_pages() - config_.high_pages;
  if (surplus > num_free) reclaim_parked(surplus - num_free);
  const std::size_t now_free = pool_.stats().num_free;
  pool_.trim(now_free > surplus ? now_free - surplus : 0);
}

std::size_t KVArena::trim(std::size_t keep_free) {
  Lock lock = enter();
  wait_landed(lock);
  reclaim(SIZE_MAX);
  // Not on the step path: what only waits for the device comes back now, not after the next step.
  if (driver_->is_async() && !retiring_.empty()) driver_->wait_enqueued();
  poll_fences();
  return pool_.trim(keep_free);
}

void KVArena::resize(std::size_t max_pages, std::size_t low_pages, std::size_t high_pages) {
  Lock lock = enter();
  const std::size_t min_pages = slot_pages_needed(1) + 1;
  if (max_pages < min_pages) {
    throw ConfigError(
        with_limit("the new cap in pages", max_pages, "at least " + std::to_string(min_pages)));
  }
  config_.max_pages = max_pages;
  config_.low_pages = low_pages;
  config_.high_pages = high_pages;
  pool_.set_max_pages(max_pages);
  const PoolStats pool = pool_.stats();
  if (pool.num_created <= max_pages) return;
  wait_landed(lock);
  poll_fences();
  reclaim(pool.num_created - max_pages);
}

bool KVArena::try_grant(std::size_t num_pages) {
  {
    const Lock lock = enter();
  }  // not held while the driver creates pages
  return pool_.try_grant(num_pages);
}

void KVArena::end_grant(std::size_t num_pages, bool keeps_pages) {
  const Lock lock = enter();
  pool_.end_grant(num_pages, keeps_pages);
}

void KVArena::set_low_pages(std::size_t low_pages) {
  const Lock lock = enter();
  config_.low_pages = low_pages;
}

}  // namespace vmalloc
