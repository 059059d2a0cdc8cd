// kv_arena.h: slots over reserved address space whose pages come on demand, all regions or none.
// Owns: the regions, the pool, the worker.  Thread-safety: all methods; one mutex. Steps belong to
// one engine thread; others may read and close. Lock order:
// GIL, then arena, then pool, then driver; the worker maps with no lock held.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "commit_worker.h"
#include "driver.h"
#include "fork_guard.h"
#include "idle_slots.h"
#include "layer_group.h"
#include "page_pool.h"
#include "region.h"
#include "slot.h"

namespace vmalloc {

struct ArenaConfig {
  std::vector<LayerKVSpec> layers;
  std::size_t layers_per_group;
  bool kv_split = false;
  std::size_t num_slots;
  std::size_t max_rows;               ///< most rows of one slot
  std::size_t max_pages;              ///< cap on physical pages
  std::size_t low_pages = 0;          ///< do not admit, nor commit ahead, below this many available
  std::size_t high_pages = SIZE_MAX;  ///< unneeded pages above this go back to the system
  std::size_t ahead_rows = 0;         ///< rows the worker keeps backed past each end; 0: no worker
  std::size_t lookahead_rows = 0;     ///< rows past the end that a kernel may read: always backed
  bool zero_on_reuse = false;         ///< clear a page before another sequence sees it
};

struct ArenaStats {
  PoolStats pool;
  DriverCounters driver;
  std::size_t reserved_bytes = 0;
  std::size_t page_bytes = 0;
  std::size_t live_bytes = 0;       ///< rows that hold data
  std::size_t committed_pages = 0;  ///< pages those rows need
  std::size_t ahead_pages = 0;      ///< mapped in live slots beyond that
  std::size_t parked_pages = 0;     ///< mapped in idle slots
  std::size_t peak_committed_pages = 0;
  std::size_t peak_live_bytes = 0;
  std::size_t num_live = 0;
  std::size_t peak_live = 0;
  std::uint64_t critical_pages = 0;    ///< mapped while the caller waited
  std::uint64_t background_pages = 0;  ///< mapped by the worker
  std::uint64_t adopted_pages = 0;     ///< found mapped already by a new sequence
  std::uint64_t reclaimed_pages = 0;   ///< taken back from ahead and parked
  double stall_us = 0;                 ///< time callers waited for pages
  std::uint64_t num_steps = 0;
  double live_byte_steps = 0;       ///< live_bytes summed over the ends of steps
  double committed_byte_steps = 0;  ///< committed bytes, likewise
  std::string worker_error;
};

/// Rows [0, num_rows) of a live slot are mapped read-write in every region; beyond them only pages
/// that were committed ahead, or retired ones whose fence has not passed.
class KVArena {
 public:
  /// Throws ConfigError naming the value and the limit.
  KVArena(std::shared_ptr<Driver> driver, const ArenaConfig& config);
  ~KVArena();
  KVArena(const KVArena&) = delete;
  KVArena& operator=(const KVArena&) = delete;

  /// Give `num_slots` slots with `num_rows` backed rows each, or none.
  [[nodiscard]] std::optional<std::vector<std::uint32_t>> try_admit(std::size_t num_slots,
                                                                    std::size_t num_rows);
  [[nodiscard]] bool can_admit(std::size_t num_rows);

  /// Back rows [0, num_rows[i]) of slots[i] for all i, or change nothing and return false.
  /// Throws ConfigError if a slot is not live, a count shrinks, or it exceeds max_rows.
  [[nodiscard]] bool try_extend(const std::int64_t* slots, const std::int64_t* num_rows,
                                std::size_t count);

  /// Drop rows from `num_rows` on and retire the pages they alone needed.
  void truncate(std::uint32_t slot, std::size_t num_rows);

  /// End sequences; their pages stay mapped (parked) for the next one.
  void free(const std::int64_t* slots, std::size_t count);

  /// Hint: a sequence of `num_rows` will come; the worker warms an idle slot for it.
  void prefetch(std::size_t num_rows);

  [[nodiscard]] Epoch begin_step();
  void end_step(Epoch epoch, Stream stream);

  /// Take back all ahead and parked pages, then destroy free ones beyond `keep_free`; the count.
  std::size_t trim(std::size_t keep_free);
  /// New cap and watermarks. Pages in use beyond the cap leave as they are freed.
  void resize(std::size_t max_pages, std::size_t low_pages, std::size_t high_pages);

  /// Rows of the slot that are mapped in every region and not retired.
  [[nodiscard]] std::size_t mapped_rows(std::uint32_t slot);
  [[nodiscard]] std::size_t max_slot_rows();  ///< most rows one slot could ever get
  [[nodiscard]] std::shared_ptr<Region> region(std::size_t index) const {
    return regions_.at(index);
  }
  void check_open() const { static_cast<void>(enter()); }  ///< Throws ClosedError.
  [[nodiscard]] std::size_t num_regions() const { return regions_.size(); }
  [[nodiscard]] ArenaStats stats();
  void wait_worker();  ///< Until the worker has nothing to do.
  void check_invariants();

  /// Unmap everything and give it back; tensors that were handed out keep their addresses.
  /// Idempotent; every other method throws ClosedError from then on.
  void close();

 private:
  /// New pages for one slot in one region.
  struct Growth {
    std::uint32_t slot;
    std::size_t region;
    std::size_t first;  ///< page index of the first new page
    std::size_t num_pages;
    PageId after;  ///< the page mapped just before them
    std::vector<PageId> pages;
    bool is_mapped = false;
  };
  using Lock = std::unique_lock<std::mutex>;
  static constexpr std::uint32_t kNoSlot = UINT32_MAX;

  // Geometry.
  [[nodiscard]] std::size_t backed_rows(std::size_t num_rows) const;
  [[nodiscard]] std::size_t pages_needed(std::size_t region, std::size_t num_rows) const;
  [[nodiscard]] std::size_t slot_pages_needed(std::size_t num_rows) const;
  [[nodiscard]] std::size_t num_mapped(const Slot& slot) const;
  void update_limits(Slot& slot);

  // Growth. All-or-nothing: plan, acquire and map, publish.
  [[nodiscard]] bool grow(Lock& lock, const std::vector<std::uint32_t>& slots);
  [[nodiscard]] std::size_t plan(std::uint32_t slot, std::size_t num_rows,
                                 std::vector<Growth>* plan) const;
  [[nodiscard]] bool acquire_and_map(std::vector<Growth>& plan);
  void undo(std::vector<Growth>& plan) noexcept;
  [[nodiscard]] bool try_growths(std::vector<Growth>& growths, std::size_t num_pages);
  std::size_t publish(const std::vector<Growth>& plan);
  void restore_retired(std::uint32_t slot, std::size_t num_rows);

  // Shrinking.
  std::size_t drop_tail(std::uint32_t slot, std::size_t keep_rows, std::size_t max_pages);
  void settle();
  bool settle_region(std::uint32_t slot, std::size_t region);
  void make_available(std::size_t num_pages);
  std::size_t reclaim(std::size_t num_pages);
  std::size_t reclaim_ahead(std::size_t num_pages);
  std::size_t reclaim_parked(std::size_t num_pages);
  void recycle_parked(std::size_t num_pages);
  [[nodiscard]] bool has_room(std::size_t num_pages) const;
  void give_back_above_high();

  // Slots.
  [[nodiscard]] std::uint32_t take_idle_slot(std::size_t num_rows);
  void make_idle(std::uint32_t slot, std::uint64_t parked_at);
  void adopt(std::uint32_t slot, std::size_t num_rows, std::size_t num_warm_pages);
  void update_idle(std::uint32_t slot);
  std::uint32_t live_slot(std::int64_t slot) const;
  std::uint32_t live_slot_once(std::int64_t slot);
  void scrub(std::uint32_t slot);
  void set_rows(Slot& slot, std::size_t num_rows);
  void post(std::uint32_t slot);
  void commit_ahead(std::uint32_t slot);
  [[nodiscard]] bool any_in_flight() const;
  void wait_landed(Lock& lock);
  void poll_fences();
  void note_peak();
  [[nodiscard]] Lock enter() const;
  void check_slot(std::uint32_t slot) const;

  std::shared_ptr<Driver> driver_;
  ArenaConfig config_;
  ForkGuard guard_;
  std::vector<std::shared_ptr<Region>> regions_;
  std::size_t row_bytes_ = 0;  // one token, all regions
  PagePool pool_;

  mutable std::mutex mutex_;
  std::condition_variable landed_;  // an in-flight growth was published or given up
  std::vector<Slot> slots_;
  IdleSlots idle_;
  std::set<std::pair<std::uint32_t, std::size_t>> retiring_;  // (slot, region) with retired pages
  std::uint32_t warming_ = kNoSlot;  // idle slot that the last prefetch hint chose
  std::size_t num_live_ = 0;
  std::size_t live_rows_ = 0;
  std::size_t committed_pages_ = 0;
  std::uint64_t next_parked_at_ = 1;
  std::uint64_t num_calls_ = 0;  // calls that named slots

  bool is_closed_ = false;
  Epoch epoch_ = 0;      // last step begun
  Epoch closed_ = 0;     // last step ended
  Epoch completed_ = 0;  // last step whose fence, and all before it, passed
  std::deque<std::pair<Epoch, Fence>> fences_;

  ArenaStats totals_;  // the running sums and peaks; the rest is filled in by stats()
  std::shared_ptr<CommitWorker> worker_;  // last: its thread uses all of the above
};

}  // namespace vmalloc
