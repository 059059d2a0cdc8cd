// idle_slots.h: slots that no sequence has, found by how many pages they keep warm or by age.
// Owns: the two indexes.  Thread-safety: none; the arena locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

namespace vmalloc {

class IdleSlots {
 public:
  explicit IdleSlots(std::size_t num_slots) : entries_(num_slots) {}

  /// `parked_at` orders slots by age. Requires: not in the set.
  void insert(std::uint32_t slot, std::size_t num_pages, std::uint64_t parked_at) {
    entries_[slot] = {num_pages, parked_at};
    by_size_.insert({num_pages, slot});
    if (num_pages > 0) by_age_.insert({parked_at, slot});
    num_pages_ += num_pages;
  }

  /// True if it was there.
  bool erase(std::uint32_t slot) {
    const std::optional<Entry> entry = entries_[slot];
    if (!entry) return false;
    by_size_.erase({entry->num_pages, slot});
    by_age_.erase({entry->parked_at, slot});
    num_pages_ -= entry->num_pages;
    entries_[slot].reset();
    return true;
  }

  [[nodiscard]] std::size_t size() const { return by_size_.size(); }
  [[nodiscard]] std::size_t num_pages() const { return num_pages_; }  ///< over all slots

  /// True if the slot is here with just so many pages.
  [[nodiscard]] bool holds(std::uint32_t slot, std::size_t num_pages) const {
    return entries_[slot] && entries_[slot]->num_pages == num_pages &&
           by_size_.count({num_pages, slot}) == 1 &&
           by_age_.count({entries_[slot]->parked_at, slot}) == (num_pages > 0 ? 1U : 0U);
  }

  /// The slot with the fewest pages that are at least `num_pages`, else the one with the most.
  /// Requires: not empty.
  [[nodiscard]] std::uint32_t best_fit(std::size_t num_pages) const {
    auto it = by_size_.lower_bound({num_pages, 0});
    if (it == by_size_.end()) --it;
    return it->second;
  }
  [[nodiscard]] std::size_t pages_of(std::uint32_t slot) const { return entries_[slot]->num_pages; }

  /// Call `visit(slot)` for slots, fewest pages first, until it returns false. It may change or
  /// remove the slot it is given.
  template <typename Visit>
  void visit_smallest(Visit visit) {
    std::pair<std::size_t, std::uint32_t> next{0, 0};
    for (auto it = by_size_.begin(); it != by_size_.end(); it = by_size_.upper_bound(next)) {
      next = *it;
      if (!visit(next.second)) return;
    }
  }

  /// Call `visit(slot)` for slots with pages, longest parked first, until it returns false. It may
  /// change or remove the slot it is given.
  template <typename Visit>
  void visit_oldest(Visit visit) {
    std::pair<std::uint64_t, std::uint32_t> next{0, 0};
    for (auto it = by_age_.begin(); it != by_age_.end(); it = by_age_.upper_bound(next)) {
      next = *it;
      if (!visit(next.second)) return;
    }
  }

 private:
  struct Entry {
    std::size_t num_pages;
    std::uint64_t parked_at;
  };
  std::vector<std::optional<Entry>> entries_;
  std::set<std::pair<std::size_t, std::uint32_t>> by_size_;
  std::set<std::pair<std::uint64_t, std::uint32_t>> by_age_;  // only slots with pages
  std::size_t num_pages_ = 0;
};

}  // namespace vmalloc
