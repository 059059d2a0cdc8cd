// kv_arena_swap.cpp: the part of the arena that moves groups of slots to host memory and back.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
#include <algorithm>
#include <new>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

std::optional<std::uint64_t> KVArena::try_swap_out(const Slots& slots) {
  Lock lock = enter();
  ++num_calls_;
  for (const std::uint32_t slot : slots) live_slot_once(slot);
  wait_landed(lock);
  SwappedGroup group = pack_group(slots);
  const std::size_t num_bytes = group.copied.size() * totals_.page_bytes;
  if (totals_.swapped_bytes + num_bytes > config_.swap_bytes) return std::nullopt;
  group.copies.reset(new (std::nothrow) char[num_bytes]);
  if (num_bytes > 0 && group.copies == nullptr) return std::nullopt;
  for (std::size_t i = 0; i < group.copied.size(); ++i) {
    driver_->read_page(pool_.handle(group.copied[i]), group.copies.get() + i * totals_.page_bytes);
  }
  for (const PageId page : group.held) {
    check_invariant(pool_.try_share(page), "a live slot has a page that nobody refers to");
  }
  held_pages_ += group.held.size();
  totals_.swapped_bytes += num_bytes;
  totals_.swap_out_pages += group.copied.size();
  const std::uint64_t id = next_group_++;
  swapped_.emplace(id, std::move(group));
  for (const std::uint32_t slot : slots) end_sequence(slot);
  return id;
}

/// Say for every page that rows of the slots need whether it is copied or held, each once.
SwappedGroup KVArena::pack_group(const Slots& slots) const {
  std::map<PageId, std::uint32_t> num_places;
  for (const std::uint32_t slot : slots) {
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const std::size_t needed = pages_needed(r, slots_[slot].committed_rows());
      for (std::size_t i = 0; i < needed; ++i) ++num_places[slots_[slot].regions[r].pages[i]];
    }
  }
  SwappedGroup group;
  std::map<PageId, SwappedPage> packed;
  const auto pack = [&](PageId page) {
    const auto found = packed.find(page);
    if (found != packed.end()) return found->second;
    // Live references from elsewhere: a slot outside the group, or a group swapped out before.
    const bool is_held = pool_.num_live(page) > num_places[page];
    std::vector<PageId>& list = is_held ? group.held : group.copied;
    const SwappedPage entry{is_held, list.size()};
    list.push_back(page);
    packed[page] = entry;
    return entry;
  };
  for (const std::uint32_t slot : slots) {
    const Slot& entry = slots_[slot];
    SwappedSlot swapped{entry.num_rows, entry.reserved_rows, {}};
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      std::vector<SwappedPage> pages;
      const std::size_t needed = pages_needed(r, entry.committed_rows());
      for (std::size_t i = 0; i < needed; ++i) pages.push_back(pack(entry.regions[r].pages[i]));
      swapped.regions.push_back(std::move(pages));
    }
    group.slots.push_back(std::move(swapped));
  }
  return group;
}

std::optional<KVArena::Slots> KVArena::try_swap_in(std::uint64_t id) {
  Lock lock = enter();
  const auto found = find_group(id);
  const SwappedGroup& group = found->second;
  shortage_ = 0;
  poll_fences();
  if (!has_room(group.copied.size(), watermark())) return std::nullopt;
  std::vector<PageId> pages(group.copied.size());
  if (!acquire_group(lock, group, &pages)) return std::nullopt;
  std::vector<Prefix> prefixes;
  std::vector<const Prefix*> starts;
  std::vector<std::size_t> num_rows, reserved_rows;
  for (const SwappedSlot& slot : group.slots) {
    Prefix prefix;
    prefix.num_rows = 0;  // nothing to copy behind the pages: they are all there
    prefix.tails.assign(regions_.size(), kNoPage);
    for (const std::vector<SwappedPage>& region : slot.regions) {
      std::vector<PageId>& list = prefix.pages.emplace_back();
      for (const SwappedPage page : region) {
        list.push_back(page.is_held ? group.held[page.idx] : pages[page.idx]);
      }
    }
    prefixes.push_back(std::move(prefix));
    num_rows.push_back(slot.num_rows);
    reserved_rows.push_back(slot.reserved_rows);
  }
  for (const Prefix& prefix : prefixes) starts.push_back(&prefix);
  const auto let_go = [&] {
    for (const PageId page : pages) pool_.release(page);
  };
  std::optional<Slots> slots;
  try {
    slots = admit(lock, starts, num_rows, reserved_rows);
  } catch (...) {
    let_go();
    throw;
  }
  let_go();  // the slots have references of their own now
  if (!slots) return std::nullopt;
  note_peak();
  totals_.swap_in_pages += pages.size();
  forget_group(swapped_.find(id));
  for (const std::uint32_t slot : *slots) unshare(slot);
  return slots;
}

/// Take new pages for the group's copies and fill them; or none, and false.
bool KVArena::acquire_group(Lock& lock, const SwappedGroup& group, std::vector<PageId>* pages) {
  bool any_used = false;
  wait_landed(lock);
  if (is_closed_) throw ClosedError("this KV arena is closed");
  if (!make_room(pages->size()) ||
      !pool_.try_acquire(pages->size(), kNoPage, pages->data(), &any_used)) {
    const std::size_t available = pool_.available();
    shortage_ = pages->size() > available ? pages->size() - available : 1;
    return false;
  }
  try {
    for (std::size_t i = 0; i < pages->size(); ++i) {
      driver_->write_page(pool_.handle((*pages)[i]), group.copies.get() + i * totals_.page_bytes);
    }
  } catch (...) {
    for (const PageId page : *pages) pool_.release(page);
    throw;
  }
  return true;
}

void KVArena::drop_swapped(std::uint64_t id) {
  const Lock lock = enter();
  forget_group(find_group(id));
}

std::map<std::uint64_t, SwappedGroup>::iterator KVArena::find_group(std::uint64_t id) {
  const auto group = swapped_.find(id);
  if (group == swapped_.end()) {
    throw ConfigError("group " + std::to_string(id) + " is not swapped out; " +
                      std::to_string(swapped_.size()) + " groups are");
  }
  return group;
}

void KVArena::forget_group(std::map<std::uint64_t, SwappedGroup>::iterator group) {
  for (const PageId page : group->second.held) pool_.release(page);
  held_pages_ -= group->second.held.size();
  totals_.swapped_bytes -= group->second.copied.size() * totals_.page_bytes;
  swapped_.erase(group);
}

}  // namespace vmalloc
