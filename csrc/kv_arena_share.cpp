// kv_arena_share.cpp: the part of the arena that maps one page into several slots.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
//
// Only whole pages are shared; rows that reach into a page which is not full are copied to a page
// of the new slot's own. So a sequence that only grows never meets a shared page at its end, and
// prepare_write has work only after a truncate.
#include <algorithm>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

/// The slot's first rows as the start of another slot. Requires: that many rows.
Prefix KVArena::prefix_of(std::uint32_t slot, std::size_t num_rows) const {
  Prefix prefix;
  prefix.num_rows = num_rows;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    const std::vector<PageId>& pages = slots_[slot].regions[r].pages;
    const std::size_t num_bytes = num_rows * regions_[r]->row_bytes();
    const std::size_t num_full = num_bytes / totals_.page_bytes;
    prefix.pages.emplace_back(pages.begin(), pages.begin() + static_cast<std::ptrdiff_t>(num_full));
    prefix.tails.push_back(num_bytes % totals_.page_bytes != 0 ? pages[num_full] : kNoPage);
  }
  return prefix;
}

void KVArena::check_prefix(const Prefix& prefix, std::size_t num_rows) const {
  if (prefix.num_rows > num_rows) {
    throw ConfigError(with_limit("rows of the prefix", prefix.num_rows,
                                 "at most those of the sequence, " + std::to_string(num_rows)));
  }
  if (prefix.pages.size() != regions_.size() || prefix.tails.size() != regions_.size()) {
    throw ConfigError(with_limit("regions of the prefix", prefix.pages.size(),
                                 "those of the arena, " + std::to_string(regions_.size())));
  }
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    const std::size_t num_bytes = prefix.num_rows * regions_[r]->row_bytes();
    const std::size_t num_full = num_bytes / totals_.page_bytes;
    const bool has_tail = num_bytes % totals_.page_bytes != 0;
    if (prefix.pages[r].size() != num_full || (prefix.tails[r] != kNoPage) != has_tail) {
      throw ConfigError("a prefix of " + std::to_string(prefix.num_rows) + " rows has " +
                        std::to_string(prefix.pages[r].size()) + " pages in region " +
                        std::to_string(r) + "; it must have " + std::to_string(num_full) +
                        (has_tail ? " and a tail" : " and no tail"));
    }
    if (has_tail && !pool_.is_in_use(prefix.tails[r])) {
      throw ConfigError("page " + std::to_string(prefix.tails[r]) +
                        " of a prefix is not in use any more");
    }
  }
}

/// Pages of the prefix that only the prefix index refers to: using them uses up room.
std::size_t KVArena::num_unused_pages(const Prefix& prefix) const {
  std::size_t num_unused = 0;
  for (const std::vector<PageId>& pages : prefix.pages) {
    for (const PageId page : pages) num_unused += pool_.num_users(page) == 0 ? 1U : 0U;
  }
  return num_unused;
}

/// Others may refer to the first `num_pages` pages of the slot from now on.
void KVArena::mark_shared(std::uint32_t slot, std::size_t region, std::size_t num_pages) {
  SlotPages& mapped = slots_[slot].regions[region];
  if (num_pages <= mapped.num_shared) return;
  if (config_.protect_shared) {
    // Kernels that were launched may not have written the last rows yet, nor have pages been
    // cleared.
    if (driver_->is_async()) driver_->wait_enqueued();
    driver_->protect(regions_[region]->page_address(slot, mapped.num_shared),
                     num_pages - mapped.num_shared, Access::kReadOnly);
  }
  mapped.num_shared = num_pages;
  update_limits(slots_[slot]);
}

/// Take back as the slot's own what nobody shares any more, from the end of its shared pages on.
void KVArena::unshare(std::uint32_t slot) {
  Slot& entry = slots_[slot];
  if (entry.shared_rows == 0) return;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = entry.regions[r];
    std::size_t num_shared = mapped.num_shared;
    while (num_shared > 0 &&
           !pool_.is_shared(mapped.pages[num_shared - 1], num_shared > mapped.num_held())) {
      --num_shared;
    }
    if (num_shared == mapped.num_shared) continue;
    if (config_.protect_shared && !try_unprotect(slot, r, num_shared)) continue;
    mapped.num_shared = num_shared;
  }
  update_limits(entry);
}

/// Make the slot's pages from `first` to its last shared one writable again. If the driver will
/// not, they go on counting as shared, and are copied before they are written.
bool KVArena::try_unprotect(std::uint32_t slot, std::size_t region, std::size_t first) {
  const std::size_t num_pages = slots_[slot].regions[region].num_shared - first;
  try {
    driver_->protect(regions_[region]->page_address(slot, first), num_pages, Access::kReadWrite);
  } catch (const DriverError&) {
    return false;
  }
  return true;
}

std::optional<KVArena::Slots> KVArena::try_fork(std::uint32_t parent, std::size_t num_children,
                                                std::size_t num_rows) {
  Lock lock = enter();
  shortage_ = 0;
  const std::size_t parent_rows = slots_[live_slot(parent)].num_rows;
  if (num_rows > parent_rows) {
    throw ConfigError(
        with_limit("num_rows", num_rows, "at most the parent's, " + std::to_string(parent_rows)));
  }
  const Prefix prefix = prefix_of(parent, num_rows);
  // Before the children map them: a worker that maps pages for the parent is not in the way.
  for (std::size_t r = 0; r < regions_.size(); ++r) mark_shared(parent, r, prefix.pages[r].size());
  return admit(lock, std::vector<const Prefix*>(num_children, &prefix),
               std::vector<std::size_t>(num_children, num_rows),
               std::vector<std::size_t>(num_children, 0));
}

std::optional<std::uint32_t> KVArena::prepare_write(std::uint32_t slot) {
  Lock lock = enter();
  shortage_ = 0;
  Slot& entry = slots_[live_slot(slot)];
  if (entry.num_rows >= entry.shared_rows) return slot;
  wait(lock, [&entry] { return !entry.in_flight; });
  poll_fences();
  unshare(slot);
  if (entry.num_rows >= entry.shared_rows) return slot;
  const Prefix prefix = prefix_of(slot, entry.num_rows);
  for (std::size_t r = 0; r < regions_.size(); ++r) mark_shared(slot, r, prefix.pages[r].size());
  const std::optional<Slots> moved =
      admit(lock, {&prefix}, {entry.num_rows}, {entry.reserved_rows});
  if (!moved) return std::nullopt;
  end_sequence(slot);
  return moved->front();
}

std::vector<PageId> KVArena::page_ids(std::uint32_t slot, const std::vector<std::size_t>& regions,
                                      const std::vector<std::size_t>& page_idxs) {
  const Lock lock = enter();
  const Slot& entry = slots_[live_slot(slot)];
  std::vector<PageId> pages;
  for (std::size_t i = 0; i < regions.size(); ++i) {
    const std::size_t needed = pages_needed(regions[i], entry.num_rows);
    if (page_idxs[i] >= needed) {
      throw ConfigError(with_limit("page", page_idxs[i],
                                   "below those that hold rows, " + std::to_string(needed)));
    }
    pages.push_back(entry.regions[regions[i]].pages[page_idxs[i]]);
  }
  return pages;
}

void KVArena::cache_pages(std::uint32_t slot, const std::vector<std::size_t>& regions,
                          const std::vector<std::size_t>& page_idxs) {
  const std::vector<PageId> pages = page_ids(slot, regions, page_idxs);
  const Lock lock = enter();
  // The driver may throw while pages are marked, so no reference is taken before that is done.
  for (std::size_t i = 0; i < pages.size(); ++i) mark_shared(slot, regions[i], page_idxs[i] + 1);
  for (const PageId page : pages) {
    check_invariant(pool_.try_cache(page), "a live slot has a page that nobody refers to");
  }
}

std::size_t KVArena::uncache_pages(const std::vector<PageId>& pages) {
  const Lock lock = enter();
  std::size_t num_unneeded = 0;
  for (const PageId page : pages) num_unneeded += pool_.uncache(page) ? 1U : 0U;
  return num_unneeded;
}

void KVArena::pin_pages(const std::vector<PageId>& pages) {
  const Lock lock = enter();
  for (const PageId page : pages) {
    check_invariant(pool_.try_hold(page), "a page is pinned that nobody refers to");
    ++pinned_[page];
  }
  note_peak();
}

void KVArena::unpin_pages(const std::vector<PageId>& pages) {
  const Lock lock = enter();
  for (const PageId page : pages) {
    const auto pin = pinned_.find(page);
    check_invariant(pin != pinned_.end(), "a page is unpinned that is not pinned");
    if (--pin->second == 0) pinned_.erase(pin);
    pool_.unhold(page);
  }
}

}  // namespace vmalloc
