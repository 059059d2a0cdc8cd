// kv_arena_assign.cpp: the part of the arena that lets slots go on from others' rows in place.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
//
// try_fork builds a sequence in another slot, because a kernel may still read this one. Whoever
// needs slot i to stay sequence i (a batch that is one strided tensor) waits for the kernels and
// maps other pages at the same addresses. Slots that came from one parent have their first pages in
// common already, so only what differs is mapped anew.
#include <algorithm>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {

bool KVArena::try_assign(const Slots& slots, const Slots& sources, std::size_t num_rows) {
  Lock lock = enter();
  shortage_ = 0;
  check_assign(slots, sources, num_rows);
  wait(lock, [&] {
    const auto in_flight = [this](std::uint32_t slot) { return slots_[slot].in_flight; };
    return std::none_of(slots.begin(), slots.end(), in_flight) &&
           std::none_of(sources.begin(), sources.end(), in_flight);
  });
  if (!try_finish_kernels()) return false;
  for (const std::uint32_t slot : slots) unshare(slot);

  std::size_t num_pages = 0;
  for (const Exchange& exchange : plan_assign(slots, sources, num_rows)) {
    num_pages += exchange.num_own;
  }
  if (!make_room(num_pages)) {
    note_shortage(num_pages);
    return false;
  }
  // Anew: room may have been made out of pages ahead of these very slots.
  std::vector<Exchange> plan = plan_assign(slots, sources, num_rows);
  for (const Exchange& exchange : plan) {
    mark_shared(exchange.source, exchange.region, exchange.shared.size() + exchange.first);
  }
  if (!try_exchange(plan, num_pages)) return false;
  for (const Exchange& exchange : plan) publish(exchange);
  for (const std::uint32_t slot : slots) {
    set_rows(slots_[slot], num_rows);
    update_limits(slots_[slot]);
  }
  for (const std::uint32_t slot : slots) {
    drop_surplus(slot);
    if (num_rows + config_.ahead_rows > slots_[slot].ready_rows) post(slot);
  }
  note_peak();
  return true;
}

void KVArena::check_assign(const Slots& slots, const Slots& sources, std::size_t num_rows) {
  if (sources.size() != slots.size()) {
    throw ConfigError(with_limit("sources", sources.size(),
                                 "one for each of " + std::to_string(slots.size()) + " slots"));
  }
  if (closed_ != epoch_) {
    throw ConfigError("step " + std::to_string(epoch_) +
                      " is open; slots are assigned between steps");
  }
  ++num_calls_;
  for (const std::uint32_t slot : slots) live_slot_once(slot);
  for (const std::uint32_t source : sources) {
    const std::size_t limit = slots_[live_slot(source)].num_rows;
    if (num_rows > limit) {
      throw ConfigError(with_limit(
          "num_rows", num_rows,
          "at most those of slot " + std::to_string(source) + ", " + std::to_string(limit)));
    }
  }
}

/// Wait until no kernel of an earlier step can read a page; false if the device does not say so.
bool KVArena::try_finish_kernels() {
  want_fence(epoch_);
  if (completed_ < epoch_ && driver_->is_async()) driver_->wait_enqueued();
  poll_fences();
  return completed_ >= epoch_;
}

/// What has to change for every slot to hold what its source holds now.
std::vector<KVArena::Exchange> KVArena::plan_assign(const Slots& slots, const Slots& sources,
                                                    std::size_t num_rows) const {
  std::vector<Exchange> plan;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot& entry = slots_[slots[i]];
    const Prefix prefix = prefix_of(sources[i], num_rows);
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const SlotPages& mapped = entry.regions[r];
      const std::vector<PageId>& full = prefix.pages[r];
      const std::size_t needed = pages_needed(r, std::max(num_rows, entry.reserved_rows));
      if (slots[i] == sources[i] && (full.size() >= mapped.num_shared || needed == full.size())) {
        continue;  // it goes on where it is: the pages behind its full ones are its own
      }
      const std::size_t most = std::min(full.size(), mapped.num_held());
      std::size_t first = 0;
      while (first < most && mapped.pages[first] == full[first]) ++first;
      Exchange exchange;
      exchange.slot = slots[i];
      exchange.source = sources[i];
      exchange.region = r;
      exchange.first = first;
      exchange.shared.assign(full.begin() + static_cast<std::ptrdiff_t>(first), full.end());
      exchange.num_own = needed - full.size();
      exchange.tail = prefix.tails[r];
      exchange.tail_bytes = num_rows * regions_[r]->row_bytes() - full.size() * totals_.page_bytes;
      plan.push_back(std::move(exchange));
    }
  }
  return plan;
}

/// Map what is planned, all or nothing.
bool KVArena::try_exchange(std::vector<Exchange>& plan, std::size_t num_pages) {
  const auto give_up = [&] {
    const bool is_undone = undo(plan);
    for (Exchange& exchange : plan) {
      for (const PageId page : exchange.pages) pool_.release(page);
      exchange.pages.clear();
    }
    if (!is_undone) {
      throw InvariantError(
          "the driver would not map again what was unmapped to assign slots; "
          "rows of these slots are lost");
    }
  };
  bool is_done = false;
  try {
    is_done = std::all_of(plan.begin(), plan.end(),
                          [this](Exchange& exchange) { return try_acquire(exchange); });
    if (!is_done) note_shortage(num_pages);
    is_done = is_done && std::all_of(plan.begin(), plan.end(),
                                     [this](Exchange& exchange) { return try_remap(exchange); });
    // What the copies read is given back below, and what they fill may be shared next.
    if (is_done && driver_->is_async()) driver_->wait_enqueued();
  } catch (...) {
    give_up();
    throw;
  }
  if (!is_done) give_up();
  return is_done;
}

/// Take a reference to every page that will be mapped: those to share, then new ones.
bool KVArena::try_acquire(Exchange& exchange) {
  for (const PageId page : exchange.shared) {
    check_invariant(pool_.try_share(page), "a live slot has a page that nobody refers to");
    exchange.pages.push_back(page);
  }
  if (exchange.num_own == 0) return true;
  std::vector<PageId> own(exchange.num_own);
  bool any_used = false;
  const PageId after = exchange.shared.empty() ? kNoPage : exchange.shared.back();
  if (!pool_.try_acquire(own.size(), after, own.data(), &any_used)) return false;
  exchange.pages.insert(exchange.pages.end(), own.begin(), own.end());
  exchange.is_zeroed = config_.zero_on_reuse && any_used;
  return true;
}

/// Unmap the slot's pages from the first that differs on, and map the others there.
bool KVArena::try_remap(Exchange& exchange) {
  const SlotPages& mapped = slots_[exchange.slot].regions[exchange.region];
  const Region& region = *regions_[exchange.region];
  const std::size_t num_old = mapped.pages.size() - exchange.first;
  if (num_old > 0) {
    driver_->unmap(region.page_address(exchange.slot, exchange.first), num_old);
  }
  exchange.is_unmapped = true;
  const std::size_t num_shared = exchange.shared.size();
  if (!try_map(exchange, 0, num_shared, config_.protect_shared)) return false;
  exchange.num_mapped = num_shared;
  if (!try_map(exchange, num_shared, exchange.num_own, false)) return false;
  exchange.num_mapped += exchange.num_own;
  const Address own = region.page_address(exchange.slot, exchange.first + num_shared);
  if (exchange.is_zeroed && !driver_->try_zero(own, exchange.num_own * totals_.page_bytes)) {
    return false;
  }
  return exchange.tail == kNoPage ||
         driver_->try_copy_page(own, pool_.handle(exchange.tail), exchange.tail_bytes);
}

/// Map `num_pages` of the exchange's pages from its page `begin` on.
bool KVArena::try_map(const Exchange& exchange, std::size_t begin, std::size_t num_pages,
                      bool is_protected) {
  if (num_pages == 0) return true;
  std::vector<PageHandle> handles;
  for (std::size_t i = 0; i < num_pages; ++i) {
    handles.push_back(pool_.handle(exchange.pages[begin + i]));
  }
  return driver_->try_map(
      regions_[exchange.region]->page_address(exchange.slot, exchange.first + begin),
      handles.data(), num_pages, is_protected ? Access::kReadOnly : Access::kReadWrite);
}

/// Map again what was unmapped; false if the driver will not: then the slot has lost those rows.
bool KVArena::undo(const std::vector<Exchange>& plan) {
  bool is_undone = true;
  for (const Exchange& exchange : plan) {
    if (!exchange.is_unmapped) continue;
    bool is_back = false;
    try {
      if (driver_->is_async()) driver_->wait_enqueued();
      is_back = try_put_back(exchange);
    } catch (const DriverError&) {
      is_back = false;
    }
    if (is_back) continue;
    is_undone = false;
    forget_tail(exchange);
  }
  return is_undone;
}

bool KVArena::try_put_back(const Exchange& exchange) {
  const SlotPages& mapped = slots_[exchange.slot].regions[exchange.region];
  const Region& region = *regions_[exchange.region];
  if (exchange.num_mapped > 0) {
    driver_->unmap(region.page_address(exchange.slot, exchange.first), exchange.num_mapped);
  }
  std::vector<PageHandle> handles;
  for (std::size_t i = exchange.first; i < mapped.pages.size(); ++i) {
    handles.push_back(pool_.handle(mapped.pages[i]));
  }
  const std::size_t num_protected =
      config_.protect_shared ? std::max(mapped.num_shared, exchange.first) - exchange.first : 0;
  const Address address = region.page_address(exchange.slot, exchange.first);
  const std::size_t num_rest = handles.size() - num_protected;
  if (num_protected > 0 &&
      !driver_->try_map(address, handles.data(), num_protected, Access::kReadOnly)) {
    return false;
  }
  if (num_rest == 0 ||
      driver_->try_map(address + num_protected * totals_.page_bytes, handles.data() + num_protected,
                       num_rest, Access::kReadWrite)) {
    return true;
  }
  if (num_protected > 0) driver_->unmap(address, num_protected);
  return false;
}

/// The slot's pages from the first that differs on are gone: cut it to the rows that are left.
void KVArena::forget_tail(const Exchange& exchange) {
  Slot& entry = slots_[exchange.slot];
  SlotPages& mapped = entry.regions[exchange.region];
  for (std::size_t i = exchange.first; i < mapped.pages.size(); ++i) {
    pool_.release(mapped.pages[i]);
  }
  mapped.pages.resize(exchange.first);
  mapped.num_shared = std::min(mapped.num_shared, exchange.first);
  mapped.num_exposed = std::min(mapped.num_exposed, exchange.first);
  needed_pages_ -= slot_pages_needed(entry.committed_rows());
  const std::size_t rows = regions_[exchange.region]->rows_in(exchange.first);
  const std::size_t kept =
      std::min(entry.num_rows, rows > config_.lookahead_rows ? rows - config_.lookahead_rows : 0);
  live_rows_ -= entry.num_rows - kept;
  entry.num_rows = kept;
  entry.reserved_rows = std::min(entry.reserved_rows, kept);
  needed_pages_ += slot_pages_needed(entry.committed_rows());
  update_limits(entry);
}

/// Enter into the books what was exchanged.
void KVArena::publish(const Exchange& exchange) {
  SlotPages& mapped = slots_[exchange.slot].regions[exchange.region];
  check_invariant(mapped.retired_epochs.empty(), "a page retires in a slot that is assigned");
  const std::vector<PageId> old(mapped.pages.begin() + static_cast<std::ptrdiff_t>(exchange.first),
                                mapped.pages.end());
  mapped.pages.resize(exchange.first);
  mapped.pages.insert(mapped.pages.end(), exchange.pages.begin(), exchange.pages.end());
  mapped.num_shared = exchange.first + exchange.shared.size();
  mapped.num_exposed = std::min(mapped.num_exposed, exchange.first);
  for (const PageId page : old) pool_.release(page);
  totals_.aliased_pages += exchange.shared.size();
  totals_.critical_pages += exchange.num_own;
  if (exchange.tail != kNoPage) ++totals_.cow_copies;
}

}  // namespace vmalloc
