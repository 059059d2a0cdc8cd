#include "kv_arena.h"

#include <algorithm>
#include <exception>

#include "error.h"

namespace vmalloc {
namespace {

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
  for (const std::size_t row_bytes :
       region_row_bytes(config.layers, config.layers_per_group, config.kv_split)) {
    if (row_bytes == 0) throw ConfigError(with_limit("bytes of a row", 0, "at least 1"));
  }
}

}  // namespace

KVArena::KVArena(std::shared_ptr<Driver> driver, const ArenaConfig& config)
    : driver_(std::move(driver)), config_(config), pool_(driver_, config.max_pages), idle_(0) {
  check_config(config_);
  if (config_.protect_shared && !driver_->can_protect()) {
    throw ConfigError("protect_shared needs pages that can be mapped for reading only; this '" +
                      std::string(driver_->name()) + "' device has none");
  }
  config_.ahead_rows = std::min(config_.ahead_rows, config_.max_rows);
  config_.lookahead_rows = std::min(config_.lookahead_rows, config_.max_rows);
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
  idle_ = IdleSlots(config_.num_slots);
  for (std::uint32_t slot = 0; slot < slots_.size(); ++slot) {
    slots_[slot].regions.resize(regions_.size());
    idle_.insert(slot, 0, 0);
  }
  if (config_.ahead_rows > 0) {
    worker_ = std::make_shared<CommitWorker>([this](std::uint32_t job) { work(job); });
  }
}

KVArena::~KVArena() {
  if (guard_.is_forked_child()) {
    new std::shared_ptr<CommitWorker>(std::move(worker_));  // leaked: its thread is the parent's
    return;
  }
  try {
    close();
  } catch (const std::exception&) {
    // At exit the driver may be gone, and the mappings with it.
  }
}

void KVArena::close() {
  guard_.check("this KV arena");
  std::shared_ptr<CommitWorker> worker;
  {
    const Lock lock(mutex_);
    if (is_closed_) return;
    is_closed_ = true;
    worker.swap(worker_);
  }
  worker.reset();  // joins; without the lock, which the worker may want
  const Lock lock(mutex_);
  while (!swapped_.empty()) forget_group(swapped_.begin());
  for (const auto& [page, num_pins] : pinned_) {
    for (std::uint32_t i = 0; i < num_pins; ++i) pool_.unhold(page);
  }
  std::exception_ptr failure;
  try {
    if (driver_->is_async()) driver_->wait_enqueued();  // kernels may read what is unmapped now
  } catch (const DriverError&) {
    failure = std::current_exception();
  }
  for (std::uint32_t slot = 0; slot < slots_.size(); ++slot) {
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      SlotPages& mapped = slots_[slot].regions[r];
      if (mapped.pages.empty()) continue;
      bool is_unmapped = false;
      for (int i = 0; i < 2 && !is_unmapped; ++i) {
        try {
          driver_->unmap(regions_[r]->page_address(slot, 0), mapped.pages.size());
          is_unmapped = true;
        } catch (const DriverError&) {
          failure = std::current_exception();  // reported once everything else is given back
        }
      }
      if (!is_unmapped) continue;
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
  pool_.uncache_all();
  pool_.trim(0);
  if (failure) std::rethrow_exception(failure);
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

/// Distinct pages that rows, swapped-out groups and pins need. Each further live reference to a
/// page is one that was counted before: only pages full of rows are shared.
std::size_t KVArena::num_committed() const {
  const PoolStats pool = pool_.stats();
  return needed_pages_ - pool.num_extra + pool.num_held;
}

/// Bytes of rows, in distinct pages. A page that was cut short where it is shared counts too low.
std::size_t KVArena::num_live_bytes() const {
  const std::size_t logical = live_rows_ * row_bytes_;
  const std::size_t extra = pool_.stats().num_extra * totals_.page_bytes;
  return logical > extra ? logical - extra : 0;
}

/// Recompute how far the slot may grow without a page that is not counted yet, or not mapped yet.
void KVArena::update_limits(Slot& slot) {
  std::size_t commit_rows = config_.max_rows;
  std::size_t ready_rows = config_.max_rows;
  std::size_t shared_rows = 0;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = slot.regions[r];
    const std::size_t needed = pages_needed(r, slot.committed_rows());
    const std::size_t shared_bytes = mapped.num_shared * totals_.page_bytes;
    shared_rows = std::max(
        shared_rows, (shared_bytes + regions_[r]->row_bytes() - 1) / regions_[r]->row_bytes());
    commit_rows = std::min(commit_rows, regions_[r]->rows_in(needed));
    ready_rows = std::min(ready_rows, regions_[r]->rows_in(mapped.num_held()));
    if (slot.state == SlotState::kLive) mapped.num_exposed = std::max(mapped.num_exposed, needed);
  }
  const auto without_lookahead = [this](std::size_t rows) {
    if (rows >= config_.max_rows) return config_.max_rows;
    return rows > config_.lookahead_rows ? rows - config_.lookahead_rows : 0;
  };
  slot.shared_rows = shared_rows;
  slot.commit_rows = without_lookahead(commit_rows);
  slot.ready_rows = without_lookahead(ready_rows);
}

// ---- slots

std::optional<KVArena::Slots> KVArena::try_admit(std::size_t num_slots, std::size_t num_rows,
                                                 std::size_t reserved_rows, const Prefix* prefix) {
  Lock lock = enter();
  if (num_rows > config_.max_rows || reserved_rows > config_.max_rows) {
    throw ConfigError(
        with_limit("num_rows", std::max(num_rows, reserved_rows),
                   "at most the rows of a slot, " + std::to_string(config_.max_rows)));
  }
  if (prefix != nullptr) check_prefix(*prefix, num_rows);
  shortage_ = 0;
  std::size_t needed = num_slots * slot_pages_needed(std::max(num_rows, reserved_rows));
  if (prefix != nullptr) {
    for (const std::vector<PageId>& pages : prefix->pages) needed -= num_slots * pages.size();
    needed += num_unused_pages(*prefix);
  }
  poll_fences();
  if (!has_room(needed, watermark())) return std::nullopt;
  return admit(lock, std::vector<const Prefix*>(num_slots, prefix),
               std::vector<std::size_t>(num_slots, num_rows),
               std::vector<std::size_t>(num_slots, reserved_rows));
}

/// Give slots with so many rows and such a start each, or none.
std::optional<KVArena::Slots> KVArena::admit(Lock& lock, const std::vector<const Prefix*>& prefixes,
                                             const std::vector<std::size_t>& num_rows,
                                             const std::vector<std::size_t>& reserved_rows) {
  Slots taken;
  std::vector<std::size_t> warm;
  const auto give_up = [&] {
    for (const std::uint32_t slot : taken) {
      slots_[slot].prefix = nullptr;
      end_use(slot, slots_[slot].parked_at);
    }
  };
  bool is_backed = false;
  try {
    for (std::size_t i = 0; i < prefixes.size(); ++i) {
      const std::size_t rows = std::max(num_rows[i], reserved_rows[i]);
      if (idle_.size() == 0) break;
      const std::uint32_t slot = prefixes[i] != nullptr ? take_clean_slot() : take_idle_slot(rows);
      if (slot == kNoSlot) break;
      taken.push_back(slot);
      warm.push_back(num_mapped(slots_[slot]));
      slots_[slot].wanted_rows = rows;
      slots_[slot].prefix = prefixes[i];
    }
    is_backed = taken.size() == prefixes.size() && grow(lock, taken);
    if (is_backed && config_.zero_on_reuse) {
      is_backed = std::all_of(taken.begin(), taken.end(),
                              [this](std::uint32_t slot) { return try_scrub(slot); });
    }
  } catch (...) {
    give_up();
    throw;
  }
  if (!is_backed) {
    give_up();
    return std::nullopt;
  }
  for (std::size_t i = 0; i < taken.size(); ++i) {
    slots_[taken[i]].prefix = nullptr;
    slots_[taken[i]].reserved_rows = reserved_rows[i];
    adopt(taken[i], num_rows[i], warm[i]);
  }
  note_peak();
  return taken;
}

bool KVArena::can_admit(std::size_t num_slots, std::size_t num_rows) {
  const Lock lock = enter();
  if (idle_.size() < num_slots || num_rows > config_.max_rows) return false;
  poll_fences();
  return has_room(num_slots * slot_pages_needed(num_rows), watermark());
}

/// All but committed and retired pages can be had: those free, creatable, ahead, parked and cached.
bool KVArena::has_room(std::size_t num_pages, std::size_t num_kept_free) const {
  return num_committed() + pool_.stats().num_retired + num_pages + num_kept_free <=
         config_.max_pages;
}

/// The warm slot that fits best: the smallest with enough pages, else the one with most.
std::uint32_t KVArena::take_idle_slot(std::size_t num_rows) {
  const std::uint32_t slot = idle_.best_fit(slot_pages_needed(num_rows));
  idle_.erase(slot);
  slots_[slot].state = SlotState::kAdmitting;
  return slot;
}

/// A slot that maps nothing, or kNoSlot.
std::uint32_t KVArena::take_clean_slot() {
  std::uint32_t found = kNoSlot;
  idle_.visit_smallest([&](std::uint32_t slot) {
    const Slot& entry = slots_[slot];
    if (entry.in_flight) return true;
    const bool was_warm = num_mapped(entry) > 0;
    if (was_warm && entry.last_use > completed_) return true;  // a kernel may still read it
    if (was_warm) drop_tail(slot, 0, SIZE_MAX);
    const bool is_clean = std::all_of(entry.regions.begin(), entry.regions.end(),
                                      [](const SlotPages& mapped) { return mapped.pages.empty(); });
    if (is_clean) found = slot;
    return !is_clean && !was_warm;  // one warm slot at most is given up
  });
  if (found == kNoSlot) return kNoSlot;
  idle_.erase(found);
  slots_[found].state = SlotState::kAdmitting;
  return found;
}

/// Clear what the slot's last sequence left, in retired pages too: growth takes those back.
bool KVArena::try_scrub(std::uint32_t slot) {
  if (slots_[slot].shared_rows > 0) return true;  // it was clean: nothing but what it starts with
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    SlotPages& mapped = slots_[slot].regions[r];
    const std::size_t num_seen = std::min(mapped.num_exposed, mapped.pages.size());
    if (num_seen == 0) continue;
    if (driver_->is_async()) mapped.enqueued_in = note_enqueued();
    if (!driver_->try_zero(regions_[r]->page_address(slot, 0), num_seen * totals_.page_bytes)) {
      return false;
    }
  }
  return true;
}

void KVArena::adopt(std::uint32_t slot, std::size_t num_rows, std::size_t num_warm_pages) {
  Slot& entry = slots_[slot];
  entry.wanted_rows = 0;
  entry.state = SlotState::kLive;
  entry.num_rows = 0;
  if (entry.last_use <= completed_) {
    for (SlotPages& mapped : entry.regions) mapped.num_exposed = 0;
  }
  totals_.adopted_pages += std::min(num_warm_pages, slot_pages_needed(num_rows));
  needed_pages_ += slot_pages_needed(entry.committed_rows());
  ++num_live_;
  update_limits(entry);
  set_rows(entry, num_rows);
  if (num_mapped(entry) > slot_pages_needed(rows_to_keep(entry)) && entry.last_use <= completed_) {
    surplus_.insert(slot);
  }
  if (num_rows + config_.ahead_rows > entry.ready_rows) post(slot);
}

void KVArena::make_idle(std::uint32_t slot, std::uint64_t parked_at) {
  Slot& entry = slots_[slot];
  entry.state = SlotState::kIdle;
  entry.wanted_rows = 0;
  entry.parked_at = parked_at;
  update_limits(entry);
  idle_.insert(slot, num_mapped(entry), parked_at);
}

/// Tell the index of idle slots how many pages the slot has by now.
void KVArena::update_idle(std::uint32_t slot) {
  if (idle_.erase(slot)) idle_.insert(slot, num_mapped(slots_[slot]), slots_[slot].parked_at);
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

std::uint32_t KVArena::live_slot_once(std::int64_t slot) {
  const std::uint32_t id = live_slot(slot);
  if (slots_[id].named_in == num_calls_) {
    throw ConfigError("slot " + std::to_string(slot) + " is named twice in one call");
  }
  slots_[id].named_in = num_calls_;
  return id;
}

void KVArena::free(const std::int64_t* slots, std::size_t count) {
  Lock lock = enter();
  ++num_calls_;
  for (std::size_t i = 0; i < count; ++i) live_slot_once(slots[i]);
  // A slot with shared pages is emptied, and nothing may come to lie behind them meanwhile.
  wait(lock, [&] {
    return std::none_of(slots, slots + count, [this](std::int64_t slot) {
      const Slot& entry = slots_[static_cast<std::size_t>(slot)];
      return entry.in_flight && entry.shared_rows > 0;
    });
  });
  for (std::size_t i = 0; i < count; ++i) end_sequence(static_cast<std::uint32_t>(slots[i]));
  try {
    give_back_above_cap();
  } catch (const DriverError&) {
    // The sequences have ended all the same; the next step tries again, and reports it.
  }
}

/// Requires: live, and not in flight if it has shared pages.
void KVArena::end_sequence(std::uint32_t slot) {
  Slot& entry = slots_[slot];
  set_rows(entry, 0);
  needed_pages_ -= slot_pages_needed(entry.reserved_rows);
  entry.reserved_rows = 0;
  entry.last_use = epoch_;
  want_fence(epoch_);
  --num_live_;
  end_use(slot, next_parked_at_++);
}

/// Park the slot, or empty it if others share its pages: nobody may write those.
void KVArena::end_use(std::uint32_t slot, std::uint64_t parked_at) {
  Slot& entry = slots_[slot];
  entry.wanted_rows = 0;
  unshare(slot);
  if (entry.shared_rows == 0) return make_idle(slot, parked_at);
  entry.state = SlotState::kDraining;
  entry.parked_at = parked_at;
  try {
    drop_tail(slot, 0, SIZE_MAX);
  } catch (const DriverError&) {
    // The books are right: what could not be unmapped is retired, and settling tries again.
  }
  finish_drain(slot);
}

/// A slot that was emptied is idle once its last page is unmapped.
void KVArena::finish_drain(std::uint32_t slot) {
  const Slot& entry = slots_[slot];
  if (entry.state != SlotState::kDraining) return;
  for (const SlotPages& mapped : entry.regions) {
    if (!mapped.pages.empty()) return;
  }
  make_idle(slot, entry.parked_at);
}

// ---- steps

Epoch KVArena::begin_step(Stream stream) {
  const Lock lock = enter();
  refuse_open_step();
  driver_->use_stream(stream);
  return ++epoch_;
}

void KVArena::check_between_steps() {
  const Lock lock = enter();
  refuse_open_step();
}

void KVArena::refuse_open_step() const {
  if (closed_ == epoch_) return;
  throw ConfigError("step " + std::to_string(epoch_) + " is still open; end it first");
}

void KVArena::end_step(Epoch epoch) {
  const Lock lock = enter();
  if (epoch != epoch_ || closed_ == epoch_) {
    throw ConfigError("step " + std::to_string(epoch) + " is not open; the last one begun is " +
                      std::to_string(epoch_));
  }
  closed_ = epoch;
  ++totals_.num_steps;
  note_peak();
  totals_.live_byte_steps += static_cast<double>(num_live_bytes());
  totals_.committed_byte_steps += static_cast<double>(num_committed() * totals_.page_bytes);
  poll_fences();
  give_back_above_high();
}

/// Something waits until no kernel of this step, or of one before it, runs any more.
void KVArena::want_fence(Epoch epoch) noexcept {
  wanted_ = std::max(wanted_, epoch);
  if (std::min(wanted_, closed_) <= fenced_) return;  // covered, or the step is still open
  try {
    advance();
  } catch (const DriverError&) {
    // The next poll tries again, and reports it.
  }
}

/// Record the fence that is wanted, if any, and see how far the device has come.
void KVArena::advance() {
  if (std::min(wanted_, closed_) > fenced_) {
    if (const std::optional<Fence> fence = driver_->try_record_fence()) {
      fences_.emplace_back(closed_, *fence);
      fenced_ = closed_;
    }
  }
  while (!fences_.empty() && driver_->fence_passed(fences_.front().second)) {
    completed_ = fences_.front().first;
    fences_.pop_front();
  }
}

void KVArena::poll_fences() {
  advance();
  settle();
}

/// The driver enqueued work just now; the epoch that it belongs to. Where no fence to come would
/// stand for it, it gets an epoch of its own. The next poll records the fence, so that the pages
/// are known to be done with by the time somebody wants them back.
Epoch KVArena::note_enqueued() {
  if (closed_ == epoch_ && fenced_ == epoch_) closed_ = ++epoch_;
  wanted_ = epoch_;
  return epoch_;
}

}  // namespace vmalloc
