// kv_arena_report.cpp: what the arena tells of itself, and the recount that proves it.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
#include <algorithm>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

void KVArena::note_peak() {
  totals_.peak_committed_pages = std::max(totals_.peak_committed_pages, num_committed());
  totals_.peak_live_bytes = std::max(totals_.peak_live_bytes, num_live_bytes());
  totals_.peak_live = std::max(totals_.peak_live, num_live_);
}

void KVArena::check_slot(std::uint32_t slot) const {
  if (slot >= slots_.size()) {
    throw ConfigError(
        with_limit("slot", slot, "below the number of slots, " + std::to_string(slots_.size())));
  }
}

std::size_t KVArena::mapped_rows(std::uint32_t slot) {
  const Lock lock = enter();
  check_slot(slot);
  std::size_t num_rows = config_.max_rows;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    num_rows = std::min(num_rows, regions_[r]->rows_in(slots_[slot].regions[r].num_held()));
  }
  return num_rows;
}

std::size_t KVArena::max_pages() {
  const Lock lock = enter();
  return config_.max_pages;
}

std::size_t KVArena::max_slot_rows() {
  const Lock lock = enter();
  std::size_t low = 0, high = config_.max_rows;
  while (low < high) {
    const std::size_t middle = low + (high - low + 1) / 2;
    if (slot_pages_needed(middle) <= config_.max_pages) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

ArenaStats KVArena::stats() {
  const Lock lock = enter();
  note_peak();
  ArenaStats stats = totals_;
  stats.pool = pool_.stats();
  stats.driver = driver_->counters();
  stats.live_bytes = num_live_bytes();
  stats.logical_bytes = live_rows_ * row_bytes_;
  stats.committed_pages = num_committed();
  stats.parked_pages = idle_.num_pages();
  stats.num_live = num_live_;
  // What is left: mapped past the ends of live slots, or being mapped by the worker right now.
  stats.ahead_pages =
      stats.pool.num_in_use - stats.pool.num_cached - stats.committed_pages - idle_.num_pages();
  if (worker_ != nullptr) stats.worker_error = worker_->error();
  return stats;
}

std::vector<SlotMap> KVArena::page_map() {
  const Lock lock = enter();
  std::vector<SlotMap> map;
  for (std::uint32_t id = 0; id < slots_.size(); ++id) {
    const Slot& slot = slots_[id];
    const bool has_pages =
        std::any_of(slot.regions.begin(), slot.regions.end(),
                    [](const SlotPages& mapped) { return !mapped.pages.empty(); });
    if (!has_pages) continue;
    SlotMap entry{id, {}};
    for (std::size_t r = 0; r < regions_.size(); ++r) entry.regions.push_back(page_runs(slot, r));
    map.push_back(std::move(entry));
  }
  return map;
}

/// The pages of one slot in one region, neighbours of a kind together.
std::vector<PageRun> KVArena::page_runs(const Slot& slot, std::size_t region) const {
  const SlotPages& mapped = slot.regions[region];
  const std::size_t num_held = mapped.num_held();
  // A slot that is being admitted has no row yet, and what it maps counts as ahead.
  const bool is_live = slot.state == SlotState::kLive;
  const std::size_t num_needed =
      is_live ? std::min(pages_needed(region, slot.committed_rows()), num_held) : 0;
  const std::size_t num_shared = std::min(mapped.num_shared, num_needed);
  std::vector<PageRun> runs;
  const auto add = [&runs](PageKind kind, std::size_t num_pages) {
    if (num_pages == 0) return;
    if (runs.empty() || runs.back().kind != kind) runs.push_back({kind, 0});
    runs.back().num_pages += num_pages;
  };
  for (const bool is_shared : pool_.has_extra(mapped.pages.data(), num_shared)) {
    add(is_shared ? PageKind::kShared : PageKind::kLive, 1);
  }
  add(PageKind::kLive, num_needed - num_shared);
  const bool is_idle = slot.state == SlotState::kIdle;
  add(is_idle ? PageKind::kParked : PageKind::kAhead, num_held - num_needed);
  add(PageKind::kRetired, mapped.pages.size() - num_held);
  return runs;
}

std::size_t KVArena::last_shortage() {
  const Lock lock = enter();
  return shortage_;
}

std::size_t KVArena::available_pages() {
  const Lock lock = enter();
  return pool_.available() + pool_.stats().num_retired + idle_.num_pages();
}

void KVArena::check_invariants(const std::vector<PageId>& cached) {
  Lock lock = enter();
  wait_landed(lock);
  std::vector<std::uint32_t> live, held, in_index, retired;
  const auto count = [](std::vector<std::uint32_t>& counts, PageId page) {
    if (page >= counts.size()) counts.resize(page + 1, 0);
    ++counts[page];
  };
  std::size_t num_live = 0, live_rows = 0, needed = 0, parked = 0, num_idle = 0;
  std::size_t num_retiring = 0;
  for (std::uint32_t id = 0; id < slots_.size(); ++id) {
    const Slot& slot = slots_[id];
    if (slot.state == SlotState::kLive) {
      ++num_live;
      live_rows += slot.num_rows;
      needed += slot_pages_needed(slot.committed_rows());
      check_invariant(slot.num_rows <= slot.commit_rows && slot.commit_rows <= slot.ready_rows,
                      "rows <= commit_rows <= ready_rows does not hold for a live slot");
    } else if (slot.state == SlotState::kIdle) {
      ++num_idle;
      parked += num_mapped(slot);
      check_invariant(slot.num_rows == 0 && slot.reserved_rows == 0, "an idle slot has rows");
      check_invariant(slot.shared_rows == 0, "an idle slot has shared pages");
      check_invariant(idle_.holds(id, num_mapped(slot)),
                      "the index of idle slots does not know an idle slot as it is");
    } else {
      check_invariant(num_mapped(slot) == 0, "a slot that is being emptied holds pages");
    }
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      check_pages(slot, r);
      const SlotPages& mapped = slot.regions[r];
      for (std::size_t i = 0; i < mapped.pages.size(); ++i) {
        count(i < mapped.num_held() ? live : retired, mapped.pages[i]);
      }
      if (!mapped.retired_epochs.empty()) ++num_retiring;
      check_invariant(retiring_.count({id, r}) == (mapped.retired_epochs.empty() ? 0U : 1U),
                      "the list of retiring pages does not match the slots");
    }
  }
  for (const auto& [id, group] : swapped_) {
    for (const PageId page : group.held) {
      if (page != kNoPage) count(held, page);
    }
  }
  for (const auto& [page, num_pins] : pinned_) {
    for (std::uint32_t i = 0; i < num_pins; ++i) count(held, page);
  }
  for (const PageId page : cached) count(in_index, page);
  check_invariant(num_live == num_live_, "num_live is not the number of live slots");
  check_invariant(live_rows == live_rows_, "live_rows is not the sum of the slots' rows");
  check_invariant(needed == needed_pages_, "the pages that slots need are miscounted");
  check_invariant(parked == idle_.num_pages(), "parked pages are miscounted");
  check_invariant(num_idle == idle_.size(), "the index of idle slots has strangers");
  check_invariant(num_retiring == retiring_.size(), "the list of retiring pages has strangers");
  pool_.check_invariants(live, held, in_index, retired);
}

/// What must hold of the pages of one slot in one region.
void KVArena::check_pages(const Slot& slot, std::size_t region) const {
  const SlotPages& mapped = slot.regions[region];
  check_invariant(mapped.num_held() >= pages_needed(region, slot.committed_rows()),
                  "rows of a live slot are not backed");
  check_invariant(mapped.pages.size() * totals_.page_bytes <= regions_[region]->slot_bytes(),
                  "a slot has more pages than addresses");
  check_invariant(mapped.num_shared <= mapped.pages.size(), "more pages are shared than mapped");
  for (std::size_t i = mapped.num_shared; i < mapped.pages.size(); ++i) {
    const bool is_own = i < mapped.num_held() ? !pool_.is_shared(mapped.pages[i], false)
                                              : !pool_.is_in_use(mapped.pages[i]);
    check_invariant(is_own, "a page is shared that its slot takes for its own");
  }
}

}  // namespace vmalloc
