// kv_arena.h: slots over reserved address space whose pages come on demand, all regions or none.
// Owns: the regions, the pool, the worker.  Thread-safety: all methods; one mutex. Steps belong to
// one engine thread; others may read and close. Lock order:
// GIL, then arena, then pool, then driver; the worker maps with no lock held.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "commit_worker.h"
#include "driver.h"
#include "error.h"
#include "fork_guard.h"
#include "idle_slots.h"
#include "layer_group.h"
#include "page_map.h"
#include "page_pool.h"
#include "region.h"
#include "slot.h"
#include "swapped_group.h"

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
  std::size_t spare_pages = 0;        ///< free pages that the worker keeps created while rows grow
  bool zero_on_reuse = false;         ///< clear a page before another sequence sees it
  std::size_t swap_bytes = 0;         ///< host memory that swapped-out groups may take
  bool protect_shared = false;        ///< map shared pages read-only, to catch a missed copy
};

struct ArenaStats {
  PoolStats pool;
  DriverCounters driver;
  std::size_t reserved_bytes = 0;
  std::size_t page_bytes = 0;
  std::size_t live_bytes = 0;       ///< rows that hold data; what slots share counts once
  std::size_t logical_bytes = 0;    ///< likewise; what slots share counts for each
  std::size_t committed_pages = 0;  ///< pages those rows need, and what swapped-out groups hold
  std::size_t ahead_pages = 0;      ///< mapped in live slots beyond that
  std::size_t parked_pages = 0;     ///< mapped in idle slots
  std::size_t swapped_bytes = 0;    ///< host memory of swapped-out groups
  std::size_t peak_committed_pages = 0;
  std::size_t peak_live_bytes = 0;
  std::size_t num_live = 0;
  std::size_t peak_live = 0;
  std::uint64_t critical_pages = 0;    ///< mapped while the caller waited
  std::uint64_t critical_creates = 0;  ///< created while the caller waited
  std::uint64_t background_pages = 0;  ///< mapped by the worker
  std::uint64_t adopted_pages = 0;     ///< found mapped already by a new sequence
  std::uint64_t reclaimed_pages = 0;   ///< taken back from ahead and parked
  std::uint64_t aliased_pages = 0;     ///< mapped a further time, instead of filled anew
  std::uint64_t cow_copies = 0;        ///< copied, whole or in part, to be written
  std::uint64_t swap_out_pages = 0;
  std::uint64_t swap_in_pages = 0;
  double stall_us = 0;  ///< time callers waited for pages
  std::uint64_t num_steps = 0;
  double live_byte_steps = 0;       ///< live_bytes summed over the ends of steps
  double committed_byte_steps = 0;  ///< committed bytes, likewise
  std::string worker_error;
};

/// Rows [0, num_rows) of a live slot are mapped in every region; beyond them only pages that were
/// committed ahead, or retired ones whose fence has not passed. Rows from `shared_rows` on are in
/// pages of the slot's own: only those may be written.
class KVArena {
 public:
  /// Throws ConfigError naming the value and the limit.
  KVArena(std::shared_ptr<Driver> driver, const ArenaConfig& config);
  ~KVArena();
  KVArena(const KVArena&) = delete;
  KVArena& operator=(const KVArena&) = delete;

  using Slots = std::vector<std::uint32_t>;

  /// Give `num_slots` slots with `num_rows` backed rows each, or none. Each starts with `prefix` if
  /// there is one; `reserved_rows` stay backed however few hold data.
  /// Throws ConfigError if a page of the prefix is not referred to any more.
  [[nodiscard]] std::optional<Slots> try_admit(std::size_t num_slots, std::size_t num_rows,
                                               std::size_t reserved_rows = 0,
                                               const Prefix* prefix = nullptr);
  [[nodiscard]] bool can_admit(std::size_t num_slots, std::size_t num_rows);

  /// Give `num_children` slots that start with the first `num_rows` rows of `parent`, or none.
  [[nodiscard]] std::optional<Slots> try_fork(std::uint32_t parent, std::size_t num_children,
                                              std::size_t num_rows);

  /// Let slots[i] hold the first `num_rows` rows of what sources[i] holds now, for all i or none.
  /// Every slot stays where it is: other pages are mapped at its addresses, as far as they differ,
  /// once no kernel can read them any more. Afterwards all of them may be written from their ends
  /// on. False if pages are short, or the device does not say that it is done.
  /// Throws ConfigError if a step is open, a slot is not live or named twice among `slots`, or a
  /// source has fewer rows; InvariantError if the driver failed twice over and rows are lost.
  [[nodiscard]] bool try_assign(const Slots& slots, const Slots& sources, std::size_t num_rows);

  /// Make rows from the slot's end on writable. A page that is shared is not replaced under a
  /// kernel that may run: the sequence moves to another slot, which is returned.
  [[nodiscard]] std::optional<std::uint32_t> prepare_write(std::uint32_t slot);

  /// Back rows [0, num_rows[i]) of slots[i] for all i, or change nothing and return false.
  /// Throws ConfigError if a slot is not live, a count shrinks, it exceeds max_rows, or the new
  /// rows would lie in shared pages (prepare_write first).
  [[nodiscard]] bool try_extend(const std::int64_t* slots, const std::int64_t* num_rows,
                                std::size_t count);

  /// Drop rows from `num_rows` on and retire the pages they alone needed.
  void truncate(std::uint32_t slot, std::size_t num_rows);

  /// End sequences; pages that nobody shares stay mapped (parked) for the next one.
  void free(const std::int64_t* slots, std::size_t count);

  /// Hint: a sequence of `num_rows` will come; the worker warms an idle slot for it.
  void prefetch(std::size_t num_rows);

  /// Ids of pages `page_idxs[i]` of region `regions[i]` of a slot.
  [[nodiscard]] std::vector<PageId> page_ids(std::uint32_t slot,
                                             const std::vector<std::size_t>& regions,
                                             const std::vector<std::size_t>& page_idxs);
  /// Refer to such pages from outside (the prefix index); they outlive the slot.
  void cache_pages(std::uint32_t slot, const std::vector<std::size_t>& regions,
                   const std::vector<std::size_t>& page_idxs);
  /// Drop such references; the number of pages that nobody needs any more: they are free, now or
  /// once the kernels that may still read them are done.
  std::size_t uncache_pages(const std::vector<PageId>& pages);

  /// Copy the pages of a group of slots to host memory, each once, and free the slots; a name for
  /// the group, or none if the swap space is full or the host has no memory. Pages that other slots
  /// share stay. `with_held`, for who sleeps: but for those and pinned ones, what this group and
  /// earlier ones hold is copied too, so that no page stays.
  [[nodiscard]] std::optional<std::uint64_t> try_swap_out(const Slots& slots,
                                                          bool with_held = false);
  /// Bring a group back, sharing included: its slots in their order, dropped ones left out, or
  /// none.
  [[nodiscard]] std::optional<Slots> try_swap_in(std::uint64_t group);
  /// Forget slot number `idx` of a group, and the group with its last one.
  void drop_swapped(std::uint64_t group, std::size_t idx);

  /// Keep cached pages from eviction; undone by unpin_pages.
  void pin_pages(const std::vector<PageId>& pages);
  void unpin_pages(const std::vector<PageId>& pages);

  /// The step's kernels go to `stream`, as do the driver's copies from now on. Fences are recorded
  /// only where something waits for one: a step that needs no page makes no driver call.
  [[nodiscard]] Epoch begin_step(Stream stream);
  void end_step(Epoch epoch);
  void check_between_steps();  ///< Throws ConfigError if a step is open.

  /// Take back all ahead and parked pages, then destroy free ones beyond `keep_free`; the count.
  std::size_t trim(std::size_t keep_free);
  /// New cap and watermarks. Pages in use beyond the cap leave as they are freed.
  void resize(std::size_t max_pages, std::size_t low_pages, std::size_t high_pages);
  void set_low_pages(std::size_t low_pages);  ///< Move the low watermark alone.
  /// Have so many pages created, and no more without being asked again; see PagePool::try_grant.
  [[nodiscard]] bool try_grant(std::size_t num_pages);
  void end_grant(std::size_t num_pages, bool keeps_pages);

  /// Rows of the slot that are mapped in every region and not retired.
  [[nodiscard]] std::size_t mapped_rows(std::uint32_t slot);
  [[nodiscard]] std::size_t max_slot_rows();  ///< most rows one slot could ever get
  [[nodiscard]] std::size_t max_pages();      ///< the cap
  /// Pages by which the last call that failed was short; 0 if it failed for another reason.
  [[nodiscard]] std::size_t last_shortage();
  /// Pages that can be had without eviction: free, creatable, parked, or waiting for a fence.
  [[nodiscard]] std::size_t available_pages();
  [[nodiscard]] std::shared_ptr<Region> region(std::size_t index) const {
    return regions_.at(index);
  }
  void check_open() const { static_cast<void>(enter()); }  ///< Throws ClosedError.
  [[nodiscard]] std::size_t num_regions() const { return regions_.size(); }
  [[nodiscard]] ArenaStats stats();
  /// Every slot that maps pages. Once the worker has nothing to do, counted over all of them:
  ///   live + shared - shared_refs + held == committed, ahead == ahead, parked == parked
  /// with what stats() says on the right, shared_refs = pool.num_extra, held = pool.num_held. A
  /// retired page counts once for each slot that still maps it, also if it is in use elsewhere.
  [[nodiscard]] std::vector<SlotMap> page_map();
  void wait_worker();  ///< Until the worker has nothing to do.
  /// From now on the worker's jobs wait for run_worker(); without a worker there are none.
  /// Throws ConfigError where the driver wants a thread of its own for them.
  void pause_worker();
  /// Do at most `max_jobs` of them on the calling thread; how many. Requires: paused.
  std::size_t run_worker(std::size_t max_jobs);
  /// `cached`: all pages that the prefix index refers to, as often as it does.
  void check_invariants(const std::vector<PageId>& cached = {});

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
    PageId after;                                 ///< the page mapped just before them
    const std::vector<PageId>* shared = nullptr;  ///< pages to map a further time; null: new ones
    PageId copy_from = kNoPage;  ///< fill the start of the first new page from this
    std::size_t copy_bytes = 0;
    std::vector<PageId> pages;
    std::size_t num_created = 0;
    bool is_zeroed = false;  ///< another sequence's contents are to be cleared
    bool is_mapped = false;
    bool is_enqueued = false;  ///< the driver may still be clearing or filling the pages
  };
  /// Pages of one slot in one region that are replaced in place.
  struct Exchange {
    std::uint32_t slot;
    std::uint32_t source;
    std::size_t region;
    std::size_t first;           ///< index of the first page that differs
    std::vector<PageId> shared;  ///< the source's full pages from there on
    std::size_t num_own = 0;     ///< new pages behind them
    PageId tail = kNoPage;       ///< fill the start of the first new page from this
    std::size_t tail_bytes = 0;
    std::vector<PageId> pages;  ///< both, with a live reference each
    std::size_t num_mapped = 0;
    bool is_zeroed = false;
    bool is_unmapped = false;  ///< the slot's old pages from `first` on are
  };
  using Lock = std::unique_lock<std::mutex>;
  static constexpr std::uint32_t kNoSlot = UINT32_MAX;
  static constexpr std::uint32_t kSparePages = UINT32_MAX;  // the worker's job that is no slot

  // Geometry.
  [[nodiscard]] std::size_t backed_rows(std::size_t num_rows) const;
  [[nodiscard]] std::size_t pages_needed(std::size_t region, std::size_t num_rows) const;
  [[nodiscard]] std::size_t slot_pages_needed(std::size_t num_rows) const;
  [[nodiscard]] std::size_t num_mapped(const Slot& slot) const;
  [[nodiscard]] std::size_t num_committed() const;
  [[nodiscard]] std::size_t num_live_bytes() const;
  void update_limits(Slot& slot);

  // Growth. All-or-nothing: plan, acquire and map, publish.
  [[nodiscard]] bool grow(Lock& lock, const std::vector<std::uint32_t>& slots);
  [[nodiscard]] std::size_t plan(std::uint32_t slot, std::size_t num_rows,
                                 std::vector<Growth>* plan) const;
  enum class Outcome { kDone, kNoPages, kNoMappings };
  [[nodiscard]] Outcome acquire_and_map(std::vector<Growth>& plan);
  [[nodiscard]] Outcome acquire_and_map_one(Growth& growth);
  [[nodiscard]] bool try_fill(Growth& growth);
  void share_pages(Growth& growth);
  void undo(std::vector<Growth>& plan) noexcept;
  [[nodiscard]] Outcome try_growths(std::vector<Growth>& growths, std::size_t num_pages);
  [[nodiscard]] bool make_room(std::size_t num_pages);
  void note_shortage(std::size_t num_pages);
  std::size_t publish(const std::vector<Growth>& plan);
  void restore_retired(std::uint32_t slot, std::size_t num_rows);

  // Shrinking.
  void drop_surplus(std::uint32_t slot);
  std::size_t drop_tail(std::uint32_t slot, std::size_t keep_rows, std::size_t max_pages);
  void settle();
  bool settle_region(std::uint32_t slot, std::size_t region);
  void make_available(std::size_t num_pages);
  std::size_t reclaim(std::size_t num_pages);
  std::size_t reclaim_ahead(std::size_t num_pages);
  std::size_t reclaim_parked(std::size_t num_pages);
  void recycle(std::size_t num_pages);
  std::size_t recycle_parked(std::size_t num_pages);
  void recycle_surplus(std::size_t num_pages);
  [[nodiscard]] std::size_t rows_to_keep(const Slot& slot) const;
  [[nodiscard]] bool has_room(std::size_t num_pages, std::size_t num_kept_free) const;
  [[nodiscard]] std::size_t watermark() const { return num_live_ > 0 ? config_.low_pages : 0; }
  void give_back_above_cap();
  void give_back_above_high();

  // Sharing.
  [[nodiscard]] Prefix prefix_of(std::uint32_t slot, std::size_t num_rows) const;
  void check_prefix(const Prefix& prefix, std::size_t num_rows) const;
  [[nodiscard]] std::size_t num_unused_pages(const Prefix& prefix) const;
  void mark_shared(std::uint32_t slot, std::size_t region, std::size_t num_pages);
  void unshare(std::uint32_t slot);
  [[nodiscard]] bool try_unprotect(std::uint32_t slot, std::size_t region, std::size_t first);
  void forget_group(std::map<std::uint64_t, SwappedGroup>::iterator group);
  [[nodiscard]] std::optional<std::vector<std::shared_ptr<char[]>>> copy_out(
      const std::vector<PageId>& pages) const;
  void hold_copies(const std::map<PageId, std::shared_ptr<char[]>>& copy_of);
  void hold_copy(SwappedGroup* group, std::size_t idx, std::shared_ptr<char[]> copy);
  void drop_held(SwappedGroup* group, std::size_t idx);
  void drop_copy(SwappedGroup* group, std::size_t idx);
  using Places = std::map<PageId, std::uint32_t>;
  [[nodiscard]] Places count_places(const Slots& slots) const;
  [[nodiscard]] SwappedGroup pack_group(const Slots& slots, const Places& places,
                                        std::vector<PageId>* copied) const;
  [[nodiscard]] std::vector<PageId> held_by_groups_alone(const SwappedGroup& group,
                                                         const Places& places) const;
  [[nodiscard]] Prefix start_of(const SwappedGroup& group, const SwappedSlot& slot,
                                const std::vector<PageId>& pages) const;
  [[nodiscard]] bool acquire_group(Lock& lock, const SwappedGroup& group,
                                   std::vector<PageId>* pages);
  [[nodiscard]] std::map<std::uint64_t, SwappedGroup>::iterator find_group(std::uint64_t id);

  // Assigning in place.
  void check_assign(const Slots& slots, const Slots& sources, std::size_t num_rows);
  [[nodiscard]] bool try_finish_kernels();
  [[nodiscard]] std::vector<Exchange> plan_assign(const Slots& slots, const Slots& sources,
                                                  std::size_t num_rows) const;
  [[nodiscard]] bool try_exchange(std::vector<Exchange>& plan, std::size_t num_pages);
  [[nodiscard]] bool try_acquire(Exchange& exchange);
  [[nodiscard]] bool try_remap(Exchange& exchange);
  [[nodiscard]] bool try_map(const Exchange& exchange, std::size_t begin, std::size_t num_pages,
                             bool is_protected);
  [[nodiscard]] bool undo(const std::vector<Exchange>& plan);
  [[nodiscard]] bool try_put_back(const Exchange& exchange);
  void forget_tail(const Exchange& exchange);
  void publish(const Exchange& exchange);

  // Slots.
  [[nodiscard]] std::optional<Slots> admit(Lock& lock, const std::vector<const Prefix*>& prefixes,
                                           const std::vector<std::size_t>& num_rows,
                                           const std::vector<std::size_t>& reserved_rows);
  [[nodiscard]] std::uint32_t take_clean_slot();
  void end_sequence(std::uint32_t slot);
  void end_use(std::uint32_t slot, std::uint64_t parked_at);
  void finish_drain(std::uint32_t slot);
  [[nodiscard]] std::uint32_t take_idle_slot(std::size_t num_rows);
  void make_idle(std::uint32_t slot, std::uint64_t parked_at);
  void adopt(std::uint32_t slot, std::size_t num_rows, std::size_t num_warm_pages);
  void update_idle(std::uint32_t slot);
  std::uint32_t live_slot(std::int64_t slot) const;
  std::uint32_t live_slot_once(std::int64_t slot);
  [[nodiscard]] bool try_scrub(std::uint32_t slot);
  void set_rows(Slot& slot, std::size_t num_rows);
  void post(std::uint32_t slot);
  void work(std::uint32_t job);
  void commit_ahead(std::uint32_t slot);
  void post_spare_pages();
  void create_spare_pages();
  [[nodiscard]] bool any_in_flight() const;
  template <typename Condition>
  void wait(Lock& lock, Condition condition);
  void wait_landed(Lock& lock);
  void refuse_open_step() const;
  void want_fence(Epoch epoch) noexcept;
  void advance();
  void poll_fences();
  [[nodiscard]] Epoch note_enqueued();
  void note_peak();
  [[nodiscard]] Lock enter() const;
  void check_slot(std::uint32_t slot) const;
  void check_pages(const Slot& slot, std::size_t region) const;
  [[nodiscard]] std::vector<PageRun> page_runs(const Slot& slot, std::size_t region) const;

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
  std::set<std::uint32_t> surplus_;  // live slots that may have more pages than they need soon
  std::uint32_t warming_ = kNoSlot;  // idle slot that the last prefetch hint chose
  bool is_creation_posted_ = false;  // the worker was told to create spare pages
  bool is_creating_ = false;         // ... and does so right now
  std::size_t num_live_ = 0;
  std::size_t live_rows_ = 0;
  std::size_t needed_pages_ = 0;  // of live slots; what they share counts for each
  std::map<PageId, std::uint32_t> pinned_;
  std::map<std::uint64_t, SwappedGroup> swapped_;
  std::uint64_t next_group_ = 1;
  std::size_t shortage_ = 0;
  std::uint64_t next_parked_at_ = 1;
  std::uint64_t num_calls_ = 0;  // calls that named slots

  bool is_closed_ = false;
  Epoch epoch_ = 0;      // last step begun
  Epoch closed_ = 0;     // last step ended
  Epoch completed_ = 0;  // last step whose fence, and all before it, passed
  Epoch wanted_ = 0;     // last step that something waits for
  Epoch fenced_ = 0;     // last step that a recorded fence covers
  std::deque<std::pair<Epoch, Fence>> fences_;

  ArenaStats totals_;  // the running sums and peaks; the rest is filled in by stats()
  std::shared_ptr<CommitWorker> worker_;  // last: its thread uses all of the above
};

/// Until a growth of the worker's landed and `condition` holds. Throws ClosedError if another
/// thread closed the arena meanwhile.
template <typename Condition>
void KVArena::wait(Lock& lock, Condition condition) {
  landed_.wait(lock, condition);
  if (is_closed_) throw ClosedError("this KV arena is closed");
}

}  // namespace vmalloc
