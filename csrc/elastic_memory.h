// elastic_memory.h: address ranges of equal size, any bytes of which can be backed, all ranges
// alike. Owns: the ranges, the pool.  Thread-safety: all methods; one mutex. Lock order: GIL, then
// this, then pool, then driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "driver.h"
#include "fork_guard.h"
#include "page_pool.h"
#include "region.h"
#include "slot.h"
#include "span_set.h"

namespace vmalloc {

struct ElasticStats {
  PoolStats pool;
  DriverCounters driver;
  std::size_t reserved_bytes = 0;
  std::size_t page_bytes = 0;
  std::uint64_t aliased_pages = 0;  ///< mapped a further time, instead of created or recycled
};

/// A page stays mapped for as long as one committed byte lies in it. One that no byte needs is
/// retired: it is unmapped, and free, once all work enqueued before it was given up is done.
class ElasticMemory {
 public:
  /// `spare_pages` of what comes free stay created for the next commit; the rest goes back to the
  /// system. With `zero_on_reuse` bytes that are committed anew read as zeros.
  /// Throws ConfigError naming the value and the limit.
  ElasticMemory(std::shared_ptr<Driver> driver, std::size_t num_regions, std::size_t region_bytes,
                std::size_t max_pages, std::size_t spare_pages, bool zero_on_reuse);
  ~ElasticMemory();
  ElasticMemory(const ElasticMemory&) = delete;
  ElasticMemory& operator=(const ElasticMemory&) = delete;

  /// Back the spans in every region, or change nothing and return false. What is backed stays as it
  /// is. Work on `stream` finds the memory; if only pages are missing that work on the device may
  /// still read, the call waits for it.
  /// Throws ConfigError if a span is empty or leaves the range.
  [[nodiscard]] bool try_commit(const std::vector<ByteSpan>& spans, Stream stream);

  /// Give the spans up in every region; what was not committed does not matter. Work enqueued on
  /// `stream` so far may go on reading them. Throws ConfigError as try_commit does.
  void decommit(const std::vector<ByteSpan>& spans, Stream stream);

  /// Map the pages behind a committed span a further time, from byte `target` on, and commit those
  /// bytes; false if nothing was changed for lack of kernel mappings.
  /// Throws ConfigError unless both are whole pages, the one committed and the other not.
  [[nodiscard]] bool try_alias(ByteSpan source, std::size_t target, Stream stream);

  /// Create pages until `num_pages` are free and keep so many from now on; false, having created
  /// none, if the cap or the machine has not so many.
  [[nodiscard]] bool try_create_spare(std::size_t num_pages);

  /// Wait for what is retired, then give free pages beyond `keep_free` back; the number given.
  std::size_t trim(std::size_t keep_free);
  /// New cap. Pages in use beyond it leave as they come free. If the driver throws, the cap is the
  /// new one all the same.
  void resize(std::size_t max_pages);

  [[nodiscard]] ElasticStats stats();
  void check_invariants();
  /// Unmap and give back everything; only the addresses stay, for tensors that are left.
  void close();
  void check_open() const;

  [[nodiscard]] std::size_t num_regions() const { return regions_.size(); }
  [[nodiscard]] std::shared_ptr<Region> region(std::size_t idx) const;

 private:
  using Lock = std::unique_lock<std::mutex>;

  /// One page's width of every region. Retired ones may be half unmapped, if the driver failed.
  struct Place {
    std::vector<PageId> pages;  ///< per region; kNoPage where nothing is mapped
    Epoch retired_in = 0;       ///< 0: a committed byte needs it
  };
  /// Pages to be mapped side by side in one region.
  struct Run {
    std::size_t region;
    std::size_t first;  ///< index of the first place
    std::vector<PageId> pages;
    bool any_used = false;  ///< a page may hold what was written before
    bool is_mapped = false;
  };
  struct Plan {
    std::vector<std::size_t> missing;  ///< places where nothing is mapped, in order
    std::vector<std::size_t> retired;  ///< places that only need be taken back
    bool is_blocked = false;           ///< a place is wanted that must be unmapped first
  };

  [[nodiscard]] Lock enter() const;
  void check_span(ByteSpan span) const;
  [[nodiscard]] bool try_spans(const std::vector<ByteSpan>& spans);
  [[nodiscard]] bool wait_retired_for(const std::vector<ByteSpan>& spans);
  [[nodiscard]] Plan plan(const std::vector<ByteSpan>& spans) const;
  [[nodiscard]] bool try_back(const Plan& plan, const std::vector<ByteSpan>& spans);
  [[nodiscard]] std::vector<Run> cut_runs(const std::vector<std::size_t>& places) const;
  [[nodiscard]] bool try_map(Run& run);
  [[nodiscard]] bool try_clear(const std::vector<Run>& runs, const std::vector<ByteSpan>& spans);
  [[nodiscard]] bool try_clear_old(ByteSpan span);
  void undo(std::vector<Run>& runs) noexcept;
  void publish(const std::vector<Run>& runs, const Plan& plan);
  [[nodiscard]] bool try_share(ByteSpan source, std::size_t target);
  void retire(std::size_t idx);
  void poll();
  bool wait_retired();
  void settle();
  void settle_region(const std::vector<std::size_t>& due, std::size_t region);
  void unmap_all(std::size_t region);
  void give_back() noexcept;
  void keep_free(std::size_t num_pages) noexcept;
  [[nodiscard]] std::pair<std::size_t, std::size_t> places_of(ByteSpan span) const;
  [[nodiscard]] ByteSpan bytes_of(std::size_t place) const;
  [[nodiscard]] Address address_of(std::size_t region, std::size_t place) const;

  std::shared_ptr<Driver> driver_;
  ForkGuard guard_;
  std::size_t page_bytes_;
  std::size_t region_bytes_;
  bool zero_on_reuse_;
  std::vector<std::shared_ptr<Region>> regions_;
  PagePool pool_;

  mutable std::mutex mutex_;
  std::size_t spare_pages_;
  std::map<std::size_t, Place> places_;
  std::set<std::size_t> retired_;  // indices of places
  SpanSet committed_;
  bool is_closed_ = false;
  std::uint64_t num_aliased_ = 0;
  Epoch epoch_ = 0;      // last time that pages were retired
  Epoch fenced_ = 0;     // last such that a recorded fence covers
  Epoch completed_ = 0;  // last such whose fence passed
  std::deque<std::pair<Epoch, Fence>> fences_;
};

}  // namespace vmalloc
