// kv_arena_grow.cpp: the half of the arena that backs rows: plan, acquire and map, publish.
// Owns: nothing of its own.  Thread-safety: see kv_arena.h.
#include <algorithm>
#include <chrono>
#include <exception>

#include "error.h"
#include "kv_arena.h"

namespace vmalloc {
namespace {

/// Adds the time from construction to destruction to `*total_us`.
class StallTimer {
 public:
  explicit StallTimer(double* total_us)
      : total_us_(total_us), start_(std::chrono::steady_clock::now()) {}
  ~StallTimer() {
    const std::chrono::duration<double, std::micro> elapsed =
        std::chrono::steady_clock::now() - start_;
    *total_us_ += elapsed.count();
  }
  StallTimer(const StallTimer&) = delete;
  StallTimer& operator=(const StallTimer&) = delete;

 private:
  double* total_us_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

std::size_t KVArena::plan(std::uint32_t slot, std::size_t num_rows,
                          std::vector<Growth>* plan) const {
  std::size_t total = 0;
  const Prefix* prefix = slots_[slot].prefix;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    // Retired pages at the tail are still mapped, so growth starts after them; publishing takes
    // them back.
    const std::vector<PageId>& pages = slots_[slot].regions[r].pages;
    Growth growth{};
    growth.slot = slot;
    growth.region = r;
    growth.first = pages.size();
    growth.after = pages.empty() ? kNoPage : pages.back();
    if (prefix != nullptr && pages.empty() && !prefix->pages[r].empty()) {
      Growth shared = growth;
      shared.shared = &prefix->pages[r];
      shared.num_pages = prefix->pages[r].size();
      plan->push_back(shared);
      growth.first = shared.num_pages;
      growth.after = prefix->pages[r].back();
    }
    const std::size_t needed = pages_needed(r, num_rows);
    if (needed <= growth.first) continue;
    growth.num_pages = needed - growth.first;
    if (prefix != nullptr && growth.first == prefix->pages[r].size()) {
      growth.copy_from = prefix->tails[r];
      growth.copy_bytes =
          prefix->num_rows * regions_[r]->row_bytes() -
          std::min(prefix->num_rows * regions_[r]->row_bytes(), growth.first * totals_.page_bytes);
    }
    total += growth.num_pages;
    plan->push_back(std::move(growth));
  }
  return total;
}

KVArena::Outcome KVArena::acquire_and_map(std::vector<Growth>& plan) {
  try {
    for (Growth& growth : plan) {
      const Outcome outcome = acquire_and_map_one(growth);
      if (outcome == Outcome::kDone) continue;
      undo(plan);
      return outcome;
    }
    for (Growth& growth : plan) {
      if (try_fill(growth)) continue;
      undo(plan);
      return Outcome::kNoMappings;
    }
  } catch (...) {
    undo(plan);
    throw;
  }
  return Outcome::kDone;
}

KVArena::Outcome KVArena::acquire_and_map_one(Growth& growth) {
  if (growth.shared != nullptr) {
    share_pages(growth);
  } else {
    std::vector<PageId> pages(growth.num_pages);
    bool any_used = false;
    if (!pool_.try_acquire(growth.num_pages, growth.after, pages.data(), &any_used,
                           &growth.num_created)) {
      return Outcome::kNoPages;
    }
    growth.pages = std::move(pages);
    growth.is_zeroed = config_.zero_on_reuse && any_used;
  }
  std::vector<PageHandle> handles;
  for (const PageId page : growth.pages) handles.push_back(pool_.handle(page));
  const bool is_protected = growth.shared != nullptr && config_.protect_shared;
  const std::uint64_t num_enqueued = driver_->num_enqueued();
  growth.is_mapped = driver_->try_map(
      regions_[growth.region]->page_address(growth.slot, growth.first), handles.data(),
      handles.size(), is_protected ? Access::kReadOnly : Access::kReadWrite);
  growth.is_enqueued = driver_->num_enqueued() != num_enqueued;  // by another thread, at worst
  return growth.is_mapped ? Outcome::kDone : Outcome::kNoMappings;
}

/// Clear what another sequence left, and copy the start that the new pages have in common with one.
bool KVArena::try_fill(Growth& growth) {
  if (!growth.is_zeroed && growth.copy_from == kNoPage) return true;
  const Address address = regions_[growth.region]->page_address(growth.slot, growth.first);
  growth.is_enqueued = driver_->is_async();
  if (growth.is_zeroed && !driver_->try_zero(address, growth.num_pages * totals_.page_bytes)) {
    return false;
  }
  return growth.copy_from == kNoPage ||
         driver_->try_copy_page(address, pool_.handle(growth.copy_from), growth.copy_bytes);
}

/// Take a reference to every page that the growth maps a further time.
void KVArena::share_pages(Growth& growth) {
  for (const PageId page : *growth.shared) {
    if (!pool_.try_share(page)) {
      throw ConfigError("page " + std::to_string(page) + " of a prefix is not in use any more");
    }
    growth.pages.push_back(page);
  }
}

/// Unmap and give back. A growth that the driver will not unmap stays mapped, for its slot to keep.
void KVArena::undo(std::vector<Growth>& plan) noexcept {
  for (Growth& growth : plan) {
    try {
      if (growth.is_mapped) {
        if (growth.is_enqueued) driver_->wait_enqueued();
        driver_->unmap(regions_[growth.region]->page_address(growth.slot, growth.first),
                       growth.num_pages);
        growth.is_mapped = false;
      }
    } catch (const DriverError&) {
      continue;
    }
    for (const PageId page : growth.pages) pool_.release(page);
    growth.pages.clear();
  }
}

/// Enter what is mapped into the books: all of a growth that worked, and of one that was undone
/// only what the driver would not unmap. The number of pages.
std::size_t KVArena::publish(const std::vector<Growth>& plan) {
  std::size_t num_pages = 0;
  for (const Growth& growth : plan) {
    if (!growth.is_mapped) continue;
    SlotPages& mapped = slots_[growth.slot].regions[growth.region];
    if (growth.is_enqueued) mapped.enqueued_in = note_enqueued();
    for (std::size_t i = mapped.num_held(); i < mapped.pages.size(); ++i) {
      pool_.restore(mapped.pages[i]);
    }
    mapped.retired_epochs.clear();
    retiring_.erase({growth.slot, growth.region});
    mapped.pages.insert(mapped.pages.end(), growth.pages.begin(), growth.pages.end());
    if (growth.shared != nullptr) {
      mapped.num_shared = mapped.pages.size();
      totals_.aliased_pages += growth.num_pages;
    }
    if (growth.copy_from != kNoPage) ++totals_.cow_copies;
    num_pages += growth.num_pages;
    update_limits(slots_[growth.slot]);
    update_idle(growth.slot);
  }
  return num_pages;
}

/// Take back retired pages that the first `num_rows` rows need; they are still mapped.
void KVArena::restore_retired(std::uint32_t slot, std::size_t num_rows) {
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = slots_[slot].regions[r];
    const std::size_t num_held = mapped.num_held();
    const std::size_t needed = std::min(pages_needed(r, num_rows), mapped.pages.size());
    if (needed <= num_held) continue;
    for (std::size_t i = num_held; i < needed; ++i) pool_.restore(mapped.pages[i]);
    const auto first = mapped.retired_epochs.begin();
    mapped.retired_epochs.erase(first, first + static_cast<std::ptrdiff_t>(needed - num_held));
    if (mapped.retired_epochs.empty()) retiring_.erase({slot, r});
  }
}

bool KVArena::any_in_flight() const {
  return is_creating_ ||
         std::any_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.in_flight; });
}

/// Back `wanted_rows` of every slot, or change nothing.
bool KVArena::grow(Lock& lock, const std::vector<std::uint32_t>& slots) {
  const StallTimer timer(&totals_.stall_us);
  for (;;) {
    wait(lock, [&] {
      return std::none_of(slots.begin(), slots.end(),
                          [this](std::uint32_t slot) { return slots_[slot].in_flight; });
    });
    // Before planning, never after: settling unmaps retired tails, and a plan starts behind them.
    poll_fences();
    std::vector<Growth> growths;
    std::size_t num_pages = 0;
    for (const std::uint32_t slot : slots) {
      num_pages += plan(slot, slots_[slot].wanted_rows, &growths);
    }
    if (growths.empty()) break;
    const Outcome outcome = try_growths(growths, num_pages);
    if (outcome == Outcome::kDone) {
      totals_.critical_pages += num_pages;
      for (const Growth& growth : growths) totals_.critical_creates += growth.num_created;
      post_spare_pages();
      break;
    }
    // The machine may have less than the cap, or no kernel mappings left: then what is ahead and
    // parked is all there is. And what the worker maps right now can be reclaimed once it landed.
    if (pool_.available() >= num_pages && pool_.stats().num_retired == 0 &&
        reclaim(num_pages) > 0) {
      continue;
    }
    if (!any_in_flight()) {
      // What could be evicted is mapped nowhere: it would make no room for a mapping.
      if (outcome == Outcome::kNoPages) note_shortage(num_pages);
      return false;
    }
    wait_landed(lock);
  }
  for (const std::uint32_t slot : slots) restore_retired(slot, slots_[slot].wanted_rows);
  return true;
}

/// Make room for the planned growths, map and publish them; or none.
KVArena::Outcome KVArena::try_growths(std::vector<Growth>& growths, std::size_t num_pages) {
  if (!make_room(num_pages)) return Outcome::kNoPages;
  Outcome outcome{};
  try {
    outcome = acquire_and_map(growths);
  } catch (...) {
    publish(growths);
    throw;
  }
  publish(growths);
  return outcome;
}

/// Note by how many pages a call is short that needs `num_pages`: those that may not be created, or
/// that the driver would not create.
void KVArena::note_shortage(std::size_t num_pages) {
  const std::size_t available = pool_.available();
  const std::size_t num_free = pool_.stats().num_free;
  shortage_ = num_pages - std::min(num_pages, num_pages > available ? available : num_free);
}

/// Have so many pages free or creatable, at the cost of what is parked and ahead.
bool KVArena::make_room(std::size_t num_pages) {
  recycle(num_pages);
  if (pool_.available() < num_pages) make_available(num_pages);
  return pool_.available() >= num_pages;
}

bool KVArena::try_extend(const std::int64_t* slots, const std::int64_t* num_rows,
                         std::size_t count) {
  Lock lock = enter();
  std::vector<std::uint32_t> growing;
  ++num_calls_;
  shortage_ = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Slot& slot = slots_[live_slot_once(slots[i])];
    const auto rows = static_cast<std::size_t>(num_rows[i]);
    if (num_rows[i] < 0 || rows < slot.num_rows || rows > config_.max_rows) {
      throw ConfigError("slot " + std::to_string(slots[i]) + " is extended to " +
                        std::to_string(num_rows[i]) + " rows; it must be between the current " +
                        std::to_string(slot.num_rows) + " and the maximum, " +
                        std::to_string(config_.max_rows));
    }
    if (slot.num_rows < slot.shared_rows && rows > slot.num_rows) {
      throw ConfigError("slot " + std::to_string(slots[i]) + " has " +
                        std::to_string(slot.num_rows) + " rows, and pages up to row " +
                        std::to_string(slot.shared_rows) + " may be shared: prepare_write first");
    }
    if (rows > slot.commit_rows) growing.push_back(static_cast<std::uint32_t>(slots[i]));
  }
  if (!growing.empty()) {
    for (std::size_t i = 0; i < count; ++i) {
      Slot& slot = slots_[static_cast<std::size_t>(slots[i])];
      slot.wanted_rows = std::max(slot.wanted_rows, static_cast<std::size_t>(num_rows[i]));
    }
    const auto forget = [&] {
      for (std::size_t i = 0; i < count; ++i) {
        slots_[static_cast<std::size_t>(slots[i])].wanted_rows = 0;
      }
    };
    bool is_backed = false;
    try {
      is_backed = grow(lock, growing);
    } catch (...) {
      forget();
      throw;
    }
    forget();
    if (!is_backed) return false;
  }
  for (std::size_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::uint32_t>(slots[i]);
    Slot& slot = slots_[id];
    set_rows(slot, std::max(slot.num_rows, static_cast<std::size_t>(num_rows[i])));
    if (slot.num_rows + config_.ahead_rows > slot.ready_rows) post(id);
  }
  note_peak();
  return true;
}

void KVArena::set_rows(Slot& slot, std::size_t num_rows) {
  live_rows_ += num_rows - slot.num_rows;  // unsigned, so a shrink wraps twice and comes out right
  if (num_rows <= slot.commit_rows && num_rows >= slot.num_rows) {
    slot.num_rows = num_rows;
    return;
  }
  needed_pages_ -= slot_pages_needed(slot.committed_rows());
  slot.num_rows = num_rows;
  needed_pages_ += slot_pages_needed(slot.committed_rows());
  update_limits(slot);
}

void KVArena::post(std::uint32_t slot) {
  Slot& entry = slots_[slot];
  if (worker_ == nullptr || entry.is_queued || entry.ready_rows >= config_.max_rows) return;
  entry.is_queued = true;
  worker_->post(slot);
}

/// Runs on the worker.
void KVArena::work(std::uint32_t job) {
  driver_->attach_thread();
  if (job == kSparePages) {
    create_spare_pages();
  } else {
    commit_ahead(job);
  }
}

/// Have the worker create pages ahead of need, so that growth finds them.
void KVArena::post_spare_pages() {
  if (worker_ == nullptr || is_creation_posted_) return;
  if (pool_.stats().num_free >= config_.spare_pages) return;
  is_creation_posted_ = true;
  worker_->post(kSparePages);
}

void KVArena::create_spare_pages() {
  {
    const Lock lock(mutex_);
    is_creation_posted_ = false;
    is_creating_ = true;
  }
  std::exception_ptr failure;
  try {
    pool_.top_up(config_.spare_pages);
  } catch (...) {
    failure = std::current_exception();
  }
  {
    const Lock lock(mutex_);
    is_creating_ = false;
  }
  landed_.notify_all();
  if (failure) std::rethrow_exception(failure);
}

/// Runs on the worker: back the rows that the slot will need next, if pages are plentiful.
void KVArena::commit_ahead(std::uint32_t slot) {
  Lock lock(mutex_);
  Slot& entry = slots_[slot];
  entry.is_queued = false;
  if (entry.num_rows < entry.shared_rows || entry.state == SlotState::kDraining) return;
  const std::size_t target = entry.state == SlotState::kLive
                                 ? std::min(entry.num_rows + config_.ahead_rows, config_.max_rows)
                                 : entry.wanted_rows;
  std::vector<Growth> growths;
  const std::size_t num_pages = plan(slot, target, &growths);
  if (num_pages == 0) return;
  recycle(num_pages);
  // Never at a live slot's cost: commit-ahead is a luxury. What is below the watermark is there for
  // live slots to grow, so they may have it ahead of need; a slot that is warmed may not.
  const std::size_t reserve = entry.state == SlotState::kLive ? 0 : config_.low_pages;
  const std::size_t available = pool_.available();
  if (available < num_pages || available + idle_.num_pages() < num_pages + reserve) return;
  entry.in_flight = true;
  lock.unlock();
  std::exception_ptr failure;
  try {
    static_cast<void>(acquire_and_map(growths));
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  entry.in_flight = false;
  totals_.background_pages += publish(growths);
  post_spare_pages();
  lock.unlock();
  landed_.notify_all();
  if (failure) std::rethrow_exception(failure);
}

void KVArena::wait_landed(Lock& lock) {
  wait(lock, [this] { return !any_in_flight(); });
}

void KVArena::wait_worker() {
  std::shared_ptr<CommitWorker> worker;
  {
    const Lock lock = enter();
    worker = worker_;
  }
  if (worker != nullptr) worker->wait_idle();  // without the lock, which the worker needs to finish
}

void KVArena::pause_worker() {
  std::shared_ptr<CommitWorker> worker;
  {
    const Lock lock = enter();
    if (driver_->is_async()) {
      throw ConfigError("the worker of a '" + std::string(driver_->name()) +
                        "' driver cannot be paused; its calls need a thread of their own");
    }
    worker = worker_;
  }
  if (worker != nullptr) worker->pause();
}

std::size_t KVArena::run_worker(std::size_t max_jobs) {
  std::shared_ptr<CommitWorker> worker;
  {
    const Lock lock = enter();
    worker = worker_;
  }
  return worker == nullptr ? 0 : worker->run(max_jobs);
}

void KVArena::prefetch(std::size_t num_rows) {
  const Lock lock = enter();
  if (worker_ == nullptr || num_rows == 0 || num_rows > config_.max_rows) return;
  // The same hint may come every step: one slot at a time is promised to a coming sequence.
  if (warming_ != kNoSlot) {
    Slot& last = slots_[warming_];
    if (last.is_queued || last.in_flight) return;
    if (last.state == SlotState::kIdle) last.wanted_rows = 0;
  }
  if (idle_.size() == 0) return;
  const std::size_t needed = slot_pages_needed(num_rows);
  warming_ = idle_.best_fit(needed);
  slots_[warming_].wanted_rows = num_rows;
  if (idle_.pages_of(warming_) < needed) post(warming_);
}

}  // namespace vmalloc
