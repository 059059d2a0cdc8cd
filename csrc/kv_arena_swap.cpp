// kv_arena_swap.cpp: the part of the arena that moves groups of slots to host memory and back.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
#include <algorithm>
#include <new>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

std::optional<std::uint64_t> KVArena::try_swap_out(const Slots& slots, bool with_held) {
  Lock lock = enter();
  ++num_calls_;
  for (const std::uint32_t slot : slots) live_slot_once(slot);
  wait_landed(lock);
  const Places places = count_places(slots);
  std::vector<PageId> copied;
  SwappedGroup group = pack_group(slots, places, &copied);
  group.num_copies = copied.size();
  if (with_held) {
    const std::vector<PageId> held = held_by_groups_alone(group, places);
    copied.insert(copied.end(), held.begin(), held.end());
  }
  const std::size_t num_bytes = copied.size() * totals_.page_bytes;
  if (totals_.swapped_bytes + num_bytes > config_.swap_bytes) return std::nullopt;
  auto copies = copy_out(copied);
  if (!copies) return std::nullopt;
  // Nothing fails from here on.
  const auto end_own = copies->begin() + static_cast<std::ptrdiff_t>(group.num_copies);
  group.copies.assign(copies->begin(), end_own);
  std::map<PageId, std::shared_ptr<char[]>> copy_of;
  for (std::size_t i = group.num_copies; i < copied.size(); ++i) copy_of[copied[i]] = (*copies)[i];
  for (const PageId page : group.held) {
    check_invariant(pool_.try_hold(page), "a live slot has a page that nobody refers to");
  }
  totals_.swapped_bytes += num_bytes;
  totals_.swap_out_pages += copied.size();
  const std::uint64_t id = next_group_++;
  swapped_.emplace(id, std::move(group));
  for (const std::uint32_t slot : slots) end_sequence(slot);
  hold_copies(copy_of);
  return id;
}

/// How often rows of the slots need each page.
KVArena::Places KVArena::count_places(const Slots& slots) const {
  Places places;
  for (const std::uint32_t slot : slots) {
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const std::size_t needed = pages_needed(r, slots_[slot].committed_rows());
      for (std::size_t i = 0; i < needed; ++i) ++places[slots_[slot].regions[r].pages[i]];
    }
  }
  return places;
}

/// Say for every page that rows of the slots need whether it is copied or held, each once.
SwappedGroup KVArena::pack_group(const Slots& slots, const Places& places,
                                 std::vector<PageId>* copied) const {
  SwappedGroup group;
  std::map<PageId, SwappedPage> packed;
  const auto pack = [&](PageId page) {
    const auto found = packed.find(page);
    if (found != packed.end()) return found->second;
    // References from elsewhere: a slot outside the group, or a group swapped out before.
    const bool is_held = pool_.num_users(page) > places.at(page);
    std::vector<PageId>& list = is_held ? group.held : *copied;
    const SwappedPage entry{is_held, list.size()};
    list.push_back(page);
    packed[page] = entry;
    return entry;
  };
  for (const std::uint32_t slot : slots) {
    const Slot& entry = slots_[slot];
    SwappedSlot swapped{false, entry.num_rows, entry.reserved_rows, {}};
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

/// What a new group and those before it would hold for nobody but each other, each once: no pin
/// keeps it, and no slot but the new group's, which have it in so many `places`.
std::vector<PageId> KVArena::held_by_groups_alone(const SwappedGroup& group,
                                                  const Places& places) const {
  std::set<PageId> pages(group.held.begin(), group.held.end());
  for (const auto& [id, other] : swapped_) pages.insert(other.held.begin(), other.held.end());
  pages.erase(kNoPage);
  std::vector<PageId> alone;
  for (const PageId page : pages) {
    const auto found = places.find(page);
    const std::uint32_t num_places = found == places.end() ? 0 : found->second;
    if (pinned_.count(page) == 0 && pool_.num_live(page) == num_places) alone.push_back(page);
  }
  return alone;
}

std::optional<KVArena::Slots> KVArena::try_swap_in(std::uint64_t id) {
  Lock lock = enter();
  const auto found = find_group(id);
  const SwappedGroup& group = found->second;
  shortage_ = 0;
  poll_fences();
  if (!has_room(group.num_copies, watermark())) return std::nullopt;
  std::vector<PageId> pages(group.copies.size(), kNoPage);  // by number of the copy
  if (!acquire_group(lock, group, &pages)) return std::nullopt;
  std::vector<Prefix> prefixes;
  std::vector<const Prefix*> starts;
  std::vector<std::size_t> num_rows, reserved_rows;
  prefixes.reserve(group.slots.size());
  for (const SwappedSlot& slot : group.slots) {
    if (slot.is_dropped) continue;
    starts.push_back(&prefixes.emplace_back(start_of(group, slot, pages)));
    num_rows.push_back(slot.num_rows);
    reserved_rows.push_back(slot.reserved_rows);
  }
  const auto let_go = [&] {
    for (const PageId page : pages) {
      if (page != kNoPage) pool_.release(page);
    }
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
  totals_.swap_in_pages += group.num_copies;
  forget_group(swapped_.find(id));
  for (const std::uint32_t slot : *slots) unshare(slot);
  return slots;
}

/// The pages of a swapped slot, for a new slot to start with: all it needs.
Prefix KVArena::start_of(const SwappedGroup& group, const SwappedSlot& slot,
                         const std::vector<PageId>& pages) const {
  Prefix prefix;
  prefix.num_rows = 0;  // nothing to copy behind the pages
  prefix.tails.assign(regions_.size(), kNoPage);
  for (const std::vector<SwappedPage>& region : slot.regions) {
    std::vector<PageId>& list = prefix.pages.emplace_back();
    for (const SwappedPage page : region) {
      list.push_back(page.is_held ? group.held[page.idx] : pages[page.idx]);
    }
  }
  return prefix;
}

/// Take new pages for the group's copies and fill them; or none, and false.
bool KVArena::acquire_group(Lock& lock, const SwappedGroup& group, std::vector<PageId>* pages) {
  bool any_used = false;
  std::size_t num_created = 0;
  std::vector<PageId> acquired(group.num_copies);
  wait_landed(lock);
  if (!make_room(acquired.size()) ||
      !pool_.try_acquire(acquired.size(), kNoPage, acquired.data(), &any_used, &num_created)) {
    note_shortage(acquired.size());
    return false;
  }
  totals_.critical_creates += num_created;
  std::vector<PageHandle> handles;
  std::vector<const char*> contents;
  for (std::size_t i = 0; i < group.copies.size(); ++i) {
    if (group.copies[i] == nullptr) continue;
    (*pages)[i] = acquired[handles.size()];
    handles.push_back(pool_.handle((*pages)[i]));
    contents.push_back(group.copies[i].get());
  }
  const auto let_go = [&] {
    for (const PageId page : acquired) pool_.release(page);
  };
  try {
    if (driver_->try_write_pages(handles.data(), contents.data(), handles.size())) return true;
  } catch (...) {
    let_go();
    throw;
  }
  let_go();
  return false;
}

void KVArena::drop_swapped(std::uint64_t id, std::size_t idx) {
  const Lock lock = enter();
  const auto found = find_group(id);
  SwappedGroup& group = found->second;
  if (idx >= group.slots.size() || group.slots[idx].is_dropped) {
    throw ConfigError(with_limit("slot of the group", idx,
                                 "one of " + std::to_string(group.slots.size()) + " not dropped"));
  }
  group.slots[idx].is_dropped = true;
  group.slots[idx].regions.clear();
  std::vector<bool> is_held(group.held.size()), is_copied(group.copies.size());
  bool any_left = false;
  for (const SwappedSlot& slot : group.slots) {
    any_left = any_left || !slot.is_dropped;
    for (const std::vector<SwappedPage>& region : slot.regions) {
      for (const SwappedPage page : region) (page.is_held ? is_held : is_copied)[page.idx] = true;
    }
  }
  if (!any_left) return forget_group(found);
  for (std::size_t i = 0; i < is_held.size(); ++i) {
    if (!is_held[i]) drop_held(&group, i);
  }
  for (std::size_t i = 0; i < is_copied.size(); ++i) {
    if (!is_copied[i]) drop_copy(&group, i);
  }
}

/// The contents of pages in host memory; none if there is no memory for all of them.
std::optional<std::vector<std::shared_ptr<char[]>>> KVArena::copy_out(
    const std::vector<PageId>& pages) const {
  std::vector<std::shared_ptr<char[]>> copies;
  std::vector<PageHandle> handles;
  std::vector<char*> targets;
  for (const PageId page : pages) {
    std::shared_ptr<char[]> copy = driver_->try_allocate_host(totals_.page_bytes);
    if (copy == nullptr) return std::nullopt;
    handles.push_back(pool_.handle(page));
    targets.push_back(copy.get());
    copies.push_back(std::move(copy));
  }
  if (!driver_->try_read_pages(handles.data(), targets.data(), handles.size())) return std::nullopt;
  return copies;
}

/// Let every group have the copies of these pages instead of the pages.
void KVArena::hold_copies(const std::map<PageId, std::shared_ptr<char[]>>& copy_of) {
  for (auto& [id, group] : swapped_) {
    for (std::size_t i = 0; i < group.held.size(); ++i) {
      const auto found = copy_of.find(group.held[i]);
      if (found != copy_of.end()) hold_copy(&group, i, found->second);
    }
  }
}

/// Let the group have a copy of a page instead of the page.
void KVArena::hold_copy(SwappedGroup* group, std::size_t idx, std::shared_ptr<char[]> copy) {
  for (SwappedSlot& slot : group->slots) {
    for (std::vector<SwappedPage>& region : slot.regions) {
      for (SwappedPage& page : region) {
        if (page.is_held && page.idx == idx) page = {false, group->copies.size()};
      }
    }
  }
  group->copies.push_back(std::move(copy));
  ++group->num_copies;
  drop_held(group, idx);
}

void KVArena::drop_held(SwappedGroup* group, std::size_t idx) {
  if (group->held[idx] == kNoPage) return;
  pool_.unhold(group->held[idx]);
  group->held[idx] = kNoPage;
}

void KVArena::drop_copy(SwappedGroup* group, std::size_t idx) {
  if (group->copies[idx] == nullptr) return;
  if (group->copies[idx].use_count() == 1) totals_.swapped_bytes -= totals_.page_bytes;
  group->copies[idx].reset();
  --group->num_copies;
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
  for (std::size_t i = 0; i < group->second.held.size(); ++i) drop_held(&group->second, i);
  for (std::size_t i = 0; i < group->second.copies.size(); ++i) drop_copy(&group->second, i);
  swapped_.erase(group);
}

}  // namespace vmalloc
