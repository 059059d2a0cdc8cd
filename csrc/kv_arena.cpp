#include "kv_arena.h"

#include <algorithm>
#include <chrono>
#include <iterator>

#include "error.h"

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

std::string with_limit(const char* name, std::size_t value, const std::string& rule) {
  return std::string(name) + " is " + std::to_string(value) + "; it must be " + rule;
}

void check_config(const ArenaConfig& config) {
  if (config.layers.empty()) throw ConfigError("layers is empty; an arena needs at least one");
  if (config.layers_per_group == 0 || config.layers_per_group > config.layers.size()) {
    throw ConfigError(
        with_limit("layers_per_group", config.layers_per_group,
                   "between 1 and the number of layers, " + std::to_string(config.layers.size())));
  }
  if (config.num_slots == 0 || config.num_slots > UINT32_MAX / 2) {
    throw ConfigError(with_limit("num_slots", config.num_slots, "between 1 and 2147483647"));
  }
  if (config.max_rows == 0) throw ConfigError(with_limit("max_rows", 0, "at least 1"));
}

}  // namespace

KVArena::KVArena(std::shared_ptr<Driver> driver, const ArenaConfig& config)
    : driver_(std::move(driver)), config_(config), pool_(driver_, config.max_pages) {
  check_config(config_);
  for (const std::size_t row_bytes :
       region_row_bytes(config_.layers, config_.layers_per_group, config_.kv_split)) {
    regions_.push_back(
        std::make_shared<Region>(driver_, row_bytes, config_.num_slots, config_.max_rows));
    row_bytes_ += row_bytes;
    totals_.reserved_bytes += regions_.back()->bytes();
  }
  totals_.page_bytes = driver_->page_bytes();
  const std::size_t min_pages = slot_pages_needed(1) + 1;
  if (config_.max_pages < min_pages) {
    throw ConfigError("the cap holds " + std::to_string(config_.max_pages) + " pages of " +
                      std::to_string(totals_.page_bytes) + " bytes; it must hold at least " +
                      std::to_string(min_pages) + ": one token in each of " +
                      std::to_string(regions_.size()) + " regions, and one scratch page");
  }
  slots_.resize(config_.num_slots);
  for (std::uint32_t slot = 0; slot < slots_.size(); ++slot) {
    slots_[slot].regions.resize(regions_.size());
    idle_.insert({0, slot});
  }
  if (config_.ahead_rows > 0) {
    worker_ = std::make_unique<CommitWorker>([this](std::uint32_t slot) { commit_ahead(slot); });
  }
}

KVArena::~KVArena() {
  if (guard_.is_forked_child()) {
    static_cast<void>(worker_.release());  // its thread stayed in the parent
    return;
  }
  try {
    close();
  } catch (const DriverError&) {
    // At exit the driver may be gone, and the mappings with it.
  }
}

void KVArena::close() {
  guard_.check("this KV arena");
  worker_.reset();  // joins; must not hold the lock, which the worker may want
  const Lock lock(mutex_);
  if (is_closed_) return;
  is_closed_ = true;
  for (std::uint32_t slot = 0; slot < slots_.size(); ++slot) {
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      SlotPages& mapped = slots_[slot].regions[r];
      if (mapped.pages.empty()) continue;
      driver_->unmap(regions_[r]->page_address(slot, 0), mapped.pages.size());
      const std::size_t num_held = mapped.num_held();
      for (std::size_t i = 0; i < mapped.pages.size(); ++i) {
        if (i < num_held) {
          pool_.release(mapped.pages[i]);
        } else {
          pool_.settle(mapped.pages[i]);
        }
      }
      mapped = SlotPages{};
    }
  }
  pool_.trim(0);
}

KVArena::Lock KVArena::enter() const {
  guard_.check("this KV arena");
  Lock lock(mutex_);
  if (is_closed_) throw ClosedError("this KV arena is closed");
  return lock;
}

// ---- geometry

std::size_t KVArena::backed_rows(std::size_t num_rows) const {
  return std::min(num_rows + config_.lookahead_rows, config_.max_rows);
}

std::size_t KVArena::pages_needed(std::size_t region, std::size_t num_rows) const {
  return num_rows == 0 ? 0 : regions_[region]->pages_for(backed_rows(num_rows));
}

std::size_t KVArena::slot_pages_needed(std::size_t num_rows) const {
  std::size_t num_pages = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) num_pages += pages_needed(r, num_rows);
  return num_pages;
}

std::size_t KVArena::num_mapped(const Slot& slot) const {
  std::size_t num_pages = 0;
  for (const SlotPages& region : slot.regions) num_pages += region.num_held();
  return num_pages;
}

/// Recompute how far the slot may grow without a page that is not counted yet, or not mapped yet.
void KVArena::update_limits(Slot& slot) {
  std::size_t commit_rows = config_.max_rows;
  std::size_t ready_rows = config_.max_rows;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = slot.regions[r];
    const std::size_t needed = pages_needed(r, slot.num_rows);
    commit_rows = std::min(commit_rows, regions_[r]->rows_in(needed));
    ready_rows = std::min(ready_rows, regions_[r]->rows_in(mapped.num_held()));
    if (slot.state == SlotState::kLive) mapped.num_exposed = std::max(mapped.num_exposed, needed);
  }
  const auto without_lookahead = [this](std::size_t rows) {
    if (rows >= config_.max_rows) return config_.max_rows;
    return rows > config_.lookahead_rows ? rows - config_.lookahead_rows : 0;
  };
  slot.commit_rows = without_lookahead(commit_rows);
  slot.ready_rows = without_lookahead(ready_rows);
}

// ---- growth

std::size_t KVArena::plan(std::uint32_t slot, std::size_t num_rows,
                          std::vector<Growth>* plan) const {
  std::size_t total = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    // Retired pages at the tail are still mapped, so growth starts after them; publishing takes
    // them back.
    const std::vector<PageId>& pages = slots_[slot].regions[r].pages;
    const std::size_t needed = pages_needed(r, num_rows);
    if (needed <= pages.size()) continue;
    const PageId after = pages.empty() ? kNoPage : pages.back();
    plan->push_back({slot, r, pages.size(), needed - pages.size(), after, {}, false});
    total += needed - pages.size();
  }
  return total;
}

bool KVArena::acquire_and_map(std::vector<Growth>& plan) {
  try {
    std::vector<PageHandle> handles;
    for (Growth& growth : plan) {
      std::vector<PageId> pages(growth.num_pages);
      bool any_used = false;
      if (!pool_.try_acquire(growth.num_pages, growth.after, pages.data(), &any_used)) {
        undo(plan);
        return false;
      }
      growth.pages = std::move(pages);
      handles.clear();
      for (const PageId page : growth.pages) handles.push_back(pool_.handle(page));
      const Address address = regions_[growth.region]->page_address(growth.slot, growth.first);
      if (!driver_->try_map(address, handles.data(), handles.size(), Access::kReadWrite)) {
        undo(plan);
        return false;
      }
      growth.is_mapped = true;
      if (config_.zero_on_reuse && any_used) {
        driver_->zero(address, growth.num_pages * totals_.page_bytes);
      }
    }
  } catch (...) {
    undo(plan);
    throw;
  }
  return true;
}

void KVArena::undo(std::vector<Growth>& plan) {
  for (Growth& growth : plan) {
    if (growth.is_mapped) {
      driver_->unmap(regions_[growth.region]->page_address(growth.slot, growth.first),
                     growth.num_pages);
    }
    for (const PageId page : growth.pages) pool_.release(page);
    growth.pages.clear();
    growth.is_mapped = false;
  }
}

std::size_t KVArena::publish(const std::vector<Growth>& plan) {
  std::size_t num_pages = 0;
  for (const Growth& growth : plan) {
    SlotPages& mapped = slots_[growth.slot].regions[growth.region];
    for (std::size_t i = mapped.num_held(); i < mapped.pages.size(); ++i) {
      pool_.restore(mapped.pages[i]);
    }
    mapped.retired_epochs.clear();
    retiring_.erase({growth.slot, growth.region});
    mapped.pages.insert(mapped.pages.end(), growth.pages.begin(), growth.pages.end());
    num_pages += growth.num_pages;
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

/// Back `wanted_rows` of every slot, or change nothing.
bool KVArena::grow(Lock& lock, const std::vector<std::uint32_t>& slots) {
  const StallTimer timer(&totals_.stall_us);
  landed_.wait(lock, [&] {
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
  if (num_pages > 0) {
    if (pool_.available() < num_pages) {
      make_available(num_pages);
      if (pool_.available() < num_pages) return false;
    }
    if (!acquire_and_map(growths)) return false;
    totals_.critical_pages += publish(growths);
  }
  for (const std::uint32_t slot : slots) restore_retired(slot, slots_[slot].wanted_rows);
  return true;
}

bool KVArena::try_extend(const std::int64_t* slots, const std::int64_t* num_rows,
                         std::size_t count) {
  Lock lock = enter();
  growing_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    Slot& slot = slots_[live_slot(slots[i])];
    const auto rows = static_cast<std::size_t>(num_rows[i]);
    if (num_rows[i] < 0 || rows < slot.num_rows || rows > config_.max_rows) {
      throw ConfigError("slot " + std::to_string(slots[i]) + " is extended to " +
                        std::to_string(num_rows[i]) + " rows; it must be between the current " +
                        std::to_string(slot.num_rows) + " and the maximum, " +
                        std::to_string(config_.max_rows));
    }
    if (rows > slot.commit_rows) growing_.push_back(static_cast<std::uint32_t>(slots[i]));
  }
  if (!growing_.empty()) {
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
      is_backed = grow(lock, growing_);
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
  committed_pages_ -= slot_pages_needed(slot.num_rows);
  slot.num_rows = num_rows;
  committed_pages_ += slot_pages_needed(num_rows);
  update_limits(slot);
}

// ---- background

void KVArena::post(std::uint32_t slot) {
  Slot& entry = slots_[slot];
  if (worker_ == nullptr || entry.is_queued || entry.ready_rows >= config_.max_rows) return;
  entry.is_queued = true;
  worker_->post(slot);
}

/// Runs on the worker: back the rows that the slot will need next, if pages are plentiful.
void KVArena::commit_ahead(std::uint32_t slot) {
  Lock lock(mutex_);
  Slot& entry = slots_[slot];
  entry.is_queued = false;
  const std::size_t target = entry.state == SlotState::kLive
                                 ? std::min(entry.num_rows + config_.ahead_rows, config_.max_rows)
                                 : entry.wanted_rows;
  std::vector<Growth> growths;
  const std::size_t num_pages = plan(slot, target, &growths);
  if (num_pages == 0) return;
  // Never below the watermark, and never at the cost of another slot: commit-ahead is a luxury.
  if (pool_.available() < num_pages + config_.low_pages) return;
  entry.in_flight = true;
  lock.unlock();
  bool is_mapped = false;
  std::exception_ptr failure;
  try {
    is_mapped = acquire_and_map(growths);
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  entry.in_flight = false;
  if (is_mapped) {
    totals_.background_pages += publish(growths);
    update_limits(entry);
    if (entry.state == SlotState::kIdle) update_idle_key(slot);
  }
  lock.unlock();
  landed_.notify_all();
  if (failure) std::rethrow_exception(failure);
}

void KVArena::wait_landed(Lock& lock) {
  landed_.wait(lock, [this] {
    return std::none_of(slots_.begin(), slots_.end(),
                        [](const Slot& slot) { return slot.in_flight; });
  });
}

void KVArena::wait_worker() {
  static_cast<void>(enter());  // checks only; the worker needs the lock to finish
  if (worker_ != nullptr) worker_->wait_idle();
}

void KVArena::prefetch(std::size_t num_rows) {
  const Lock lock = enter();
  if (worker_ == nullptr || num_rows == 0 || num_rows > config_.max_rows) return;
  // The same hint may come every step, so one slot is warmed at a time.
  if (warming_ != kNoSlot && slots_[warming_].wanted_rows >= num_rows &&
      slots_[warming_].state == SlotState::kIdle) {
    return;
  }
  const auto fits = idle_.lower_bound({slot_pages_needed(num_rows), 0});
  if (fits != idle_.end() || idle_.empty()) return;  // warm enough already, or nothing to warm
  warming_ = std::prev(fits)->second;
  slots_[warming_].wanted_rows = num_rows;
  post(warming_);
}

// ---- slots

std::optional<std::vector<std::uint32_t>> KVArena::try_admit(std::size_t num_slots,
                                                             std::size_t num_rows) {
  Lock lock = enter();
  if (num_rows > config_.max_rows) {
    throw ConfigError(with_limit(
        "num_rows", num_rows, "at most the rows of a slot, " + std::to_string(config_.max_rows)));
  }
  if (idle_.size() < num_slots) return std::nullopt;
  const std::size_t needed = num_slots * slot_pages_needed(num_rows);
  const std::size_t low = num_live_ > 0 ? config_.low_pages : 0;
  if (pool_.available() + reclaimable() < needed + low) return std::nullopt;

  std::vector<std::uint32_t> taken;
  std::vector<std::size_t> warm;
  for (std::size_t i = 0; i < num_slots; ++i) {
    taken.push_back(take_idle_slot(num_rows));
    warm.push_back(num_mapped(slots_[taken.back()]));
    slots_[taken.back()].wanted_rows = num_rows;
  }
  const auto give_up = [&] {
    for (const std::uint32_t slot : taken) make_idle(slot, slots_[slot].parked_at);
  };
  bool is_backed = false;
  try {
    is_backed = grow(lock, taken);
  } catch (...) {
    give_up();
    throw;
  }
  if (!is_backed) {
    give_up();
    return std::nullopt;
  }
  for (std::size_t i = 0; i < num_slots; ++i) adopt(taken[i], num_rows, warm[i]);
  note_peak();
  return taken;
}

bool KVArena::can_admit(std::size_t num_rows) {
  const Lock lock = enter();
  if (idle_.empty() || num_rows > config_.max_rows) return false;
  const std::size_t low = num_live_ > 0 ? config_.low_pages : 0;
  return pool_.available() + reclaimable() >= slot_pages_needed(num_rows) + low;
}

/// The warm slot that fits best: the smallest with enough pages, else the one with most.
std::uint32_t KVArena::take_idle_slot(std::size_t num_rows) {
  auto it = idle_.lower_bound({slot_pages_needed(num_rows), 0});
  if (it == idle_.end()) --it;
  const std::uint32_t slot = it->second;
  parked_pages_ -= it->first;
  idle_.erase(it);
  slots_[slot].state = SlotState::kAdmitting;
  return slot;
}

void KVArena::adopt(std::uint32_t slot, std::size_t num_rows, std::size_t num_warm_pages) {
  Slot& entry = slots_[slot];
  entry.wanted_rows = 0;
  entry.state = SlotState::kLive;
  entry.num_rows = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = entry.regions[r];
    if (config_.zero_on_reuse && mapped.num_held() > 0 && mapped.num_exposed > 0) {
      driver_->zero(regions_[r]->page_address(slot, 0),
                    std::min(mapped.num_exposed, mapped.num_held()) * totals_.page_bytes);
    }
    if (entry.last_use <= completed_) mapped.num_exposed = 0;
  }
  totals_.adopted_pages += std::min(num_warm_pages, slot_pages_needed(num_rows));
  ++num_live_;
  update_limits(entry);
  set_rows(entry, num_rows);
  if (num_rows + config_.ahead_rows > entry.ready_rows) post(slot);
}

void KVArena::make_idle(std::uint32_t slot, std::uint64_t parked_at) {
  Slot& entry = slots_[slot];
  entry.state = SlotState::kIdle;
  entry.wanted_rows = 0;
  entry.parked_at = parked_at;
  update_limits(entry);
  entry.idle_key = num_mapped(entry);
  parked_pages_ += entry.idle_key;
  idle_.insert({entry.idle_key, slot});
}

void KVArena::update_idle_key(std::uint32_t slot) {
  Slot& entry = slots_[slot];
  if (idle_.erase({entry.idle_key, slot}) == 0) return;
  parked_pages_ -= entry.idle_key;
  entry.idle_key = num_mapped(entry);
  parked_pages_ += entry.idle_key;
  idle_.insert({entry.idle_key, slot});
}

std::uint32_t KVArena::live_slot(std::int64_t slot) const {
  if (slot < 0 || static_cast<std::size_t>(slot) >= slots_.size() ||
      slots_[static_cast<std::size_t>(slot)].state != SlotState::kLive) {
    throw ConfigError("slot " + std::to_string(slot) + " is not live; there are " +
                      std::to_string(slots_.size()) + " slots, " + std::to_string(num_live_) +
                      " of them live");
  }
  return static_cast<std::uint32_t>(slot);
}

void KVArena::truncate(std::uint32_t slot, std::size_t num_rows) {
  Lock lock = enter();
  Slot& entry = slots_[live_slot(slot)];
  if (num_rows > entry.num_rows) {
    throw ConfigError(with_limit(
        "num_rows", num_rows, "at most the rows the slot has, " + std::to_string(entry.num_rows)));
  }
  landed_.wait(lock, [&entry] { return !entry.in_flight; });
  set_rows(entry, num_rows);
  drop_tail(slot, std::min(num_rows + config_.ahead_rows, config_.max_rows), SIZE_MAX);
}

void KVArena::free(const std::int64_t* slots, std::size_t count) {
  Lock lock = enter();
  for (std::size_t i = 0; i < count; ++i) live_slot(slots[i]);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t slot = live_slot(slots[i]);  // again: a slot named twice is an error
    Slot& entry = slots_[slot];
    set_rows(entry, 0);
    entry.last_use = epoch_;
    --num_live_;
    make_idle(slot, next_parked_at_++);
  }
}

// ---- shrinking

/// Retire pages from the slot's tail that rows [0, keep_rows) do not need, at most `max_pages`;
/// the number retired. Those that no kernel can still read are unmapped at once.
std::size_t KVArena::drop_tail(std::uint32_t slot, std::size_t keep_rows, std::size_t max_pages) {
  Slot& entry = slots_[slot];
  const Epoch last_use = entry.state == SlotState::kLive ? epoch_ : entry.last_use;
  std::size_t num_dropped = 0;
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
      epochs[i] = page_idx < mapped.num_exposed ? last_use : 0;
    }
    mapped.retired_epochs.insert(mapped.retired_epochs.begin(), epochs.begin(), epochs.end());
    retiring_.insert({slot, r});
    num_dropped += num_pages;
    if (settle_region(slot, r)) retiring_.erase({slot, r});
  }
  if (num_dropped == 0) return 0;
  update_limits(entry);
  if (entry.state == SlotState::kIdle) update_idle_key(slot);
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
    for (std::size_t i = first; i < mapped.pages.size(); ++i) pool_.settle(mapped.pages[i]);
    mapped.pages.resize(first);
    mapped.retired_epochs.resize(mapped.retired_epochs.size() - num_pages);
    mapped.num_exposed = std::min(mapped.num_exposed, first);
  }
  return mapped.retired_epochs.empty();
}

void KVArena::settle() {
  for (auto it = retiring_.begin(); it != retiring_.end();) {
    // An in-flight growth counts on where the slot's pages end; it is settled next time.
    const bool is_done = !slots_[it->first].in_flight && settle_region(it->first, it->second);
    it = is_done ? retiring_.erase(it) : std::next(it);
  }
}

/// Take pages back until `num_pages` are available, counting those that wait for a fence: a caller
/// that is short only because of them had better try again after the step.
void KVArena::make_available(std::size_t num_pages) {
  const std::size_t coming = pool_.available() + pool_.stats().num_retired;
  if (coming >= num_pages) return;
  const std::size_t missing = num_pages - coming;
  const std::size_t num_ahead = reclaim_ahead(missing);
  if (num_ahead < missing) reclaim_parked(missing - num_ahead);
}

std::size_t KVArena::reclaim_ahead(std::size_t num_pages) {
  std::size_t num_reclaimed = 0;
  for (std::uint32_t slot = 0; slot < slots_.size() && num_reclaimed < num_pages; ++slot) {
    const Slot& entry = slots_[slot];
    if (entry.state == SlotState::kIdle || entry.in_flight) continue;
    num_reclaimed +=
        drop_tail(slot, std::max(entry.num_rows, entry.wanted_rows), num_pages - num_reclaimed);
  }
  totals_.reclaimed_pages += num_reclaimed;
  return num_reclaimed;
}

std::size_t KVArena::reclaim_parked(std::size_t num_pages) {
  std::vector<std::uint32_t> parked;
  for (auto it = idle_.rbegin(); it != idle_.rend() && it->first > 0; ++it) {
    if (!slots_[it->second].in_flight) parked.push_back(it->second);
  }
  std::sort(parked.begin(), parked.end(), [this](std::uint32_t a, std::uint32_t b) {
    return slots_[a].parked_at < slots_[b].parked_at;
  });
  std::size_t num_reclaimed = 0;
  for (const std::uint32_t slot : parked) {
    if (num_reclaimed >= num_pages) break;
    slots_[slot].wanted_rows = 0;
    num_reclaimed += drop_tail(slot, 0, num_pages - num_reclaimed);
  }
  totals_.reclaimed_pages += num_reclaimed;
  return num_reclaimed;
}

/// Pages in use that no live row needs: committed ahead, or parked.
std::size_t KVArena::reclaimable() const { return pool_.stats().num_in_use - committed_pages_; }

void KVArena::give_back_above_high() {
  if (config_.high_pages >= config_.max_pages) return;
  const std::size_t num_free = pool_.stats().num_free;
  if (num_free + parked_pages_ <= config_.high_pages) return;
  const std::size_t surplus = num_free + parked_pages_ - config_.high_pages;
  if (surplus > num_free) reclaim_parked(surplus - num_free);
  const std::size_t now_free = pool_.stats().num_free;
  pool_.trim(now_free > surplus ? now_free - surplus : 0);
}

std::size_t KVArena::trim(std::size_t keep_free) {
  Lock lock = enter();
  wait_landed(lock);
  poll_fences();
  reclaim_ahead(SIZE_MAX);
  reclaim_parked(SIZE_MAX);
  return pool_.trim(keep_free);
}

void KVArena::resize(std::size_t max_pages) {
  Lock lock = enter();
  const std::size_t min_pages = slot_pages_needed(1) + 1;
  if (max_pages < min_pages) {
    throw ConfigError(
        with_limit("the new cap in pages", max_pages, "at least " + std::to_string(min_pages)));
  }
  config_.max_pages = max_pages;
  pool_.set_max_pages(max_pages);
  const PoolStats pool = pool_.stats();
  if (pool.num_created <= max_pages) return;
  wait_landed(lock);
  poll_fences();
  const std::size_t surplus = pool.num_created - max_pages;
  const std::size_t num_ahead = reclaim_ahead(surplus);
  if (num_ahead < surplus) reclaim_parked(surplus - num_ahead);
}

// ---- steps

Epoch KVArena::begin_step() {
  const Lock lock = enter();
  if (closed_ != epoch_) {
    throw ConfigError("step " + std::to_string(epoch_) + " is still open; end it first");
  }
  return ++epoch_;
}

void KVArena::end_step(Epoch epoch, Stream stream) {
  const Lock lock = enter();
  if (epoch != epoch_ || closed_ == epoch_) {
    throw ConfigError("step " + std::to_string(epoch) + " is not open; the last one begun is " +
                      std::to_string(epoch_));
  }
  closed_ = epoch;
  fences_.emplace_back(epoch, driver_->record_fence(stream));
  poll_fences();
  ++totals_.num_steps;
  totals_.live_byte_steps += static_cast<double>(live_rows_ * row_bytes_);
  totals_.committed_byte_steps += static_cast<double>(committed_pages_ * totals_.page_bytes);
  give_back_above_high();
}

void KVArena::poll_fences() {
  while (!fences_.empty() && driver_->fence_passed(fences_.front().second)) {
    completed_ = fences_.front().first;
    fences_.pop_front();
  }
  settle();
}

// ---- reports

void KVArena::note_peak() {
  totals_.peak_committed_pages = std::max(totals_.peak_committed_pages, committed_pages_);
  totals_.peak_live_bytes = std::max(totals_.peak_live_bytes, live_rows_ * row_bytes_);
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
  ArenaStats stats = totals_;
  stats.pool = pool_.stats();
  stats.driver = driver_->counters();
  stats.live_bytes = live_rows_ * row_bytes_;
  stats.committed_pages = committed_pages_;
  stats.parked_pages = parked_pages_;
  stats.num_live = num_live_;
  // What is left: mapped past the ends of live slots, or being mapped by the worker right now.
  stats.ahead_pages = stats.pool.num_in_use - committed_pages_ - parked_pages_;
  if (worker_ != nullptr) stats.worker_error = worker_->error();
  return stats;
}

void KVArena::check_invariants() {
  Lock lock = enter();
  wait_landed(lock);
  std::vector<std::uint32_t> live, retired;
  const auto count = [](std::vector<std::uint32_t>& counts, PageId page) {
    if (page >= counts.size()) counts.resize(page + 1, 0);
    ++counts[page];
  };
  std::size_t num_live = 0, live_rows = 0, committed = 0, parked = 0, num_idle = 0;
  std::size_t num_retiring = 0;
  for (std::uint32_t id = 0; id < slots_.size(); ++id) {
    const Slot& slot = slots_[id];
    if (slot.state == SlotState::kLive) {
      ++num_live;
      live_rows += slot.num_rows;
      committed += slot_pages_needed(slot.num_rows);
      check_invariant(slot.num_rows <= slot.commit_rows && slot.commit_rows <= slot.ready_rows,
                      "rows <= commit_rows <= ready_rows does not hold for a live slot");
    } else if (slot.state == SlotState::kIdle) {
      ++num_idle;
      parked += num_mapped(slot);
      check_invariant(slot.num_rows == 0, "an idle slot has rows");
      check_invariant(idle_.count({num_mapped(slot), id}) == 1,
                      "the index of idle slots does not know an idle slot as it is");
    }
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const SlotPages& mapped = slot.regions[r];
      const std::size_t num_held = mapped.num_held();
      check_invariant(num_held >= pages_needed(r, slot.num_rows),
                      "rows of a live slot are not backed");
      check_invariant(mapped.pages.size() * totals_.page_bytes <= regions_[r]->slot_bytes(),
                      "a slot has more pages than addresses");
      for (std::size_t i = 0; i < mapped.pages.size(); ++i) {
        count(i < num_held ? live : retired, mapped.pages[i]);
      }
      if (!mapped.retired_epochs.empty()) ++num_retiring;
      check_invariant(retiring_.count({id, r}) == (mapped.retired_epochs.empty() ? 0U : 1U),
                      "the list of retiring pages does not match the slots");
    }
  }
  check_invariant(num_live == num_live_, "num_live is not the number of live slots");
  check_invariant(live_rows == live_rows_, "live_rows is not the sum of the slots' rows");
  check_invariant(committed == committed_pages_, "committed pages are miscounted");
  check_invariant(parked == parked_pages_, "parked pages are miscounted");
  check_invariant(num_idle == idle_.size(), "the index of idle slots has strangers");
  check_invariant(num_retiring == retiring_.size(), "the list of retiring pages has strangers");
  pool_.check_invariants(live, retired);
}

}  // namespace vmalloc
