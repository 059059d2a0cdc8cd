// page_pool.h: physical pages and who refers to them; the only ledger of free memory.
// Owns: every page created through the driver.  Thread-safety: all methods, one mutex, which is
// not held while the driver creates pages (slow).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "driver.h"
#include "extent_map.h"
#include "fork_guard.h"

namespace vmalloc {

using PageId = std::uint32_t;  ///< index into the pool, never an address
constexpr PageId kNoPage = UINT32_MAX;

struct PoolStats {  // num_created == num_free + num_in_use + num_retired
  std::size_t num_created = 0;
  std::size_t num_free = 0;
  std::size_t num_in_use = 0;   ///< at least one live, held or cached reference
  std::size_t num_held = 0;     ///< of those, held ones without a live reference
  std::size_t num_cached = 0;   ///< of those, with cached references only
  std::size_t num_retired = 0;  ///< only references that wait for a fence
  std::size_t num_extra = 0;    ///< live references beyond the first of each page
  std::size_t max_pages = 0;    ///< cap on num_created
};

/// A page is referred to by live references (a slot that maps it for use), by held ones (a
/// swapped-out group, a pin), by cached ones (the prefix index) and by retired ones (a slot that
/// still maps it only because a running kernel may read it). With none of them it is free. A page
/// with more than one of the first three is shared, and nobody may write it.
class PagePool {
 public:
  PagePool(std::shared_ptr<Driver> driver, std::size_t max_pages);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  /// Take `num_pages` with one live reference each, or none and return false. `after` is the page
  /// mapped just before them (or kNoPage): its successors are preferred, because neighbours
  /// cost the host driver one kernel mapping together. Sets `*any_used` if a page held data before,
  /// and `*num_created`, if given, to how many were created for it.
  [[nodiscard]] bool try_acquire(std::size_t num_pages, PageId after, PageId* pages, bool* any_used,
                                 std::size_t* num_created = nullptr);

  /// Create pages until `num_free` are free, as far as the cap and the driver go.
  void top_up(std::size_t num_free);

  /// Have `num_pages` created, the cap at most, and keep the new ones from use until `end_grant`:
  /// pools that must not run out alone agree on what each has before any of them uses it. False,
  /// and all as before, where the driver has less. One thread at a time.
  [[nodiscard]] bool try_grant(std::size_t num_pages);
  /// Let the new pages be used, or destroy them; no page is created on demand beyond `num_pages`.
  void end_grant(std::size_t num_pages, bool keeps_pages);

  /// Add a live reference; false if the page is not in use.
  [[nodiscard]] bool try_share(PageId page);
  [[nodiscard]] bool try_hold(PageId page);   ///< Likewise, a held reference.
  [[nodiscard]] bool try_cache(PageId page);  ///< Likewise, a cached reference.
  void unhold(PageId page);                   ///< Drop a held reference.
  void uncache_all();                         ///< Drop every cached reference: the index is gone.
  /// Drop a cached reference; true if nobody needs the page any more: it is free, now or once the
  /// kernels that may still read it are done.
  bool uncache(PageId page);

  /// True if somebody else may read the page, or take it back as theirs: there are other references
  /// than the caller's live one (not counting retired ones), or than the caller's retired one.
  [[nodiscard]] bool is_shared(PageId page, bool is_retired) const;
  [[nodiscard]] bool is_in_use(PageId page) const;  ///< It has a reference that is not retired.
  [[nodiscard]] std::uint32_t num_live(PageId page) const;
  /// Whether several live references to the page exist, for each of `num_pages` pages.
  [[nodiscard]] std::vector<bool> has_extra(const PageId* pages, std::size_t num_pages) const;
  /// Live and held references.
  [[nodiscard]] std::uint32_t num_users(PageId page) const;

  void release(PageId page);  ///< Drop a live reference whose mapping is gone already.
  void retire(PageId page);   ///< Turn a live reference into a retired one.
  void restore(PageId page);  ///< Turn a retired reference back into a live one.
  void settle(PageId page);   ///< Drop a retired reference: its fence passed and it is unmapped.

  [[nodiscard]] PageHandle handle(PageId page) const;

  /// Pages that try_acquire could hand out now, if the driver has the memory.
  [[nodiscard]] std::size_t available() const;

  /// Destroy free pages until `keep_free` are left; the number destroyed.
  std::size_t trim(std::size_t keep_free);

  /// Move the cap. Pages in use beyond it are destroyed as they become free.
  void set_max_pages(std::size_t max_pages);

  [[nodiscard]] PoolStats stats() const;

  /// Check the equation above and every page's references against what the caller counted.
  /// Throws InvariantError. The vectors are indexed by PageId and may be shorter.
  void check_invariants(const std::vector<std::uint32_t>& live,
                        const std::vector<std::uint32_t>& held,
                        const std::vector<std::uint32_t>& cached,
                        const std::vector<std::uint32_t>& retired) const;

 private:
  struct Page {
    PageHandle handle = 0;
    std::uint32_t live = 0;
    std::uint32_t held = 0;
    std::uint32_t cached = 0;
    std::uint32_t retired = 0;
    [[nodiscard]] std::uint32_t num_in_use() const { return live + held + cached; }
    bool was_used = false;  // contents are no longer the driver's zeros
  };

  [[nodiscard]] bool claim(std::size_t num_pages, PageId after, PageId* pages,
                           std::vector<PageId>* to_create, bool* any_used);
  [[nodiscard]] PageId claim_free(PageId after);
  [[nodiscard]] PageId claim_absent(PageId after);
  void add_absent_extent();
  void undo_claim(const PageId* pages, std::size_t num_pages, const std::vector<PageId>& to_create,
                  std::size_t num_created);
  [[nodiscard]] std::size_t creatable() const;
  [[nodiscard]] std::size_t granted() const;
  enum class Sign { kOut, kIn };
  void count(const Page& page, Sign sign);
  template <typename Change>
  void change(PageId page, Change change);
  void free_if_unreferenced(PageId page);
  void destroy(PageId page);

  std::shared_ptr<Driver> driver_;
  ForkGuard guard_;
  mutable std::mutex mutex_;
  std::deque<Page> pages_;
  ExtentMap free_;    // created, no reference
  ExtentMap absent_;  // numbers that no created page has
  std::size_t num_created_ = 0, num_in_use_ = 0, num_held_ = 0, num_cached_ = 0, num_retired_ = 0,
              num_extra_ = 0;
  std::size_t max_pages_;
  std::size_t granted_ = SIZE_MAX;  // cap on what is created on demand
  std::vector<PageId> pending_;     // created by a grant that has not ended
};

}  // namespace vmalloc
