#include "page_pool.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace vmalloc {

namespace {
/// Page numbers may outgrow the cap by this factor, so that sequences that grow side by side can
/// each have an extent of their own; numbers cost a few bytes and no memory stands behind them.
constexpr std::size_t kNumbersPerPage = 4;

void check_references(const char* kind, PageId page, std::uint32_t have,
                      const std::vector<std::uint32_t>& counts) {
  const std::uint32_t counted = page < counts.size() ? counts[page] : 0;
  if (have == counted) return;
  throw InvariantError("page " + std::to_string(page) + " has " + std::to_string(have) + " " +
                       kind + " references in the pool, but its users count " +
                       std::to_string(counted));
}
}  // namespace

PagePool::PagePool(std::shared_ptr<Driver> driver, std::size_t max_pages)
    : driver_(std::move(driver)), max_pages_(max_pages) {}

PagePool::~PagePool() {
  if (guard_.is_forked_child()) return;  // the pages are the parent's
  const std::lock_guard<std::mutex> lock(mutex_);
  for (PageId page = 0; page < pages_.size(); ++page) {
    if (absent_.contains(page)) continue;
    give_back_quietly([&] { driver_->destroy_page(pages_[page].handle); });
  }
}

bool PagePool::try_acquire(std::size_t num_pages, PageId after, PageId* pages, bool* any_used,
                           std::size_t* num_created_now) {
  std::vector<PageId> to_create;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!claim(num_pages, after, pages, &to_create, any_used)) return false;
  }
  std::size_t num_created = 0;
  try {
    for (; num_created < to_create.size(); ++num_created) {
      const PageId page = to_create[num_created];
      const std::optional<PageHandle> handle = driver_->try_create_page(page);
      if (!handle) break;
      const std::lock_guard<std::mutex> lock(mutex_);
      pages_[page].handle = *handle;
    }
  } catch (...) {
    undo_claim(pages, num_pages, to_create, num_created);
    throw;
  }
  if (num_created_now != nullptr) *num_created_now = num_created;
  if (num_created == to_create.size()) return true;
  undo_claim(pages, num_pages, to_create, num_created);
  return false;
}

void PagePool::top_up(std::size_t num_free) {
  for (;;) {
    std::vector<PageId> page;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (free_.size() >= num_free || creatable() == 0) return;
      page.push_back(claim_absent(kNoPage));
      ++num_created_;
      pages_[page[0]].live = 1;
      ++num_in_use_;
    }
    std::size_t num_created = 0;
    std::optional<PageHandle> handle;
    try {
      handle = driver_->try_create_page(page[0]);
    } catch (...) {
      undo_claim(page.data(), 1, page, num_created);
      throw;
    }
    if (handle) {
      const std::lock_guard<std::mutex> lock(mutex_);
      pages_[page[0]].handle = *handle;
      ++num_created;
    }
    undo_claim(page.data(), 1, page, num_created);  // a created page becomes a free one
    if (!handle) return;
  }
}

bool PagePool::try_grant(std::size_t num_pages) {
  for (;;) {
    std::vector<PageId> page;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (num_created_ >= std::min(num_pages, max_pages_)) return true;
      // Side by side, so that they can be mapped together.
      page.push_back(claim_absent(pending_.empty() ? kNoPage : pending_.back()));
      ++num_created_;
      pages_[page[0]].live = 1;  // the grant's, so that nobody takes or destroys it meanwhile
      ++num_in_use_;
    }
    std::optional<PageHandle> handle;
    try {
      handle = driver_->try_create_page(page[0]);
    } catch (...) {
      undo_claim(page.data(), 1, page, 0);
      end_grant(granted(), false);
      throw;
    }
    if (!handle) {
      undo_claim(page.data(), 1, page, 0);
      end_grant(granted(), false);
      return false;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    pages_[page[0]].handle = *handle;
    pending_.push_back(page[0]);
  }
}

void PagePool::end_grant(std::size_t num_pages, bool keeps_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  granted_ = num_pages;
  for (const PageId page : pending_) {
    change(page, [](Page& entry) { --entry.live; });
    if (!keeps_pages && free_.contains(page)) give_back_quietly([&] { destroy(page); });
  }
  pending_.clear();
}

std::size_t PagePool::granted() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return granted_;
}

/// Pages that may be created on demand.
std::size_t PagePool::creatable() const {
  const std::size_t limit = std::min(max_pages_, granted_);
  return limit > num_created_ ? limit - num_created_ : 0;
}

bool PagePool::claim(std::size_t num_pages, PageId after, PageId* pages,
                     std::vector<PageId>* to_create, bool* any_used) {
  if (num_pages > free_.size() + creatable()) return false;
  for (std::size_t i = 0; i < num_pages; ++i) {
    PageId page = claim_free(after);
    if (page == kNoPage) {
      page = claim_absent(after);
      to_create->push_back(page);
      ++num_created_;
    }
    Page& entry = pages_[page];
    if (entry.was_used) *any_used = true;
    entry.live = 1;
    ++num_in_use_;
    pages[i] = after = page;
  }
  for (std::size_t i = 0; i < num_pages; ++i) pages_[pages[i]].was_used = true;
  return true;
}

PageId PagePool::claim_free(PageId after) {
  std::size_t page = ExtentMap::kNone;
  if (after != kNoPage && free_.contains(after + 1)) page = after + 1;
  if (page == ExtentMap::kNone) page = free_.find_whole_extent();
  if (page == ExtentMap::kNone) page = free_.find_any();
  if (page == ExtentMap::kNone) return kNoPage;
  free_.erase(page);
  return static_cast<PageId>(page);
}

PageId PagePool::claim_absent(PageId after) {
  std::size_t page = ExtentMap::kNone;
  if (after != kNoPage) {
    if (after + 1 == pages_.size() && pages_.size() < kNumbersPerPage * max_pages_) {
      add_absent_extent();
    }
    if (absent_.contains(after + 1)) page = after + 1;
  }
  if (page == ExtentMap::kNone) page = absent_.find_whole_extent();
  if (page == ExtentMap::kNone &&
      (pages_.size() < kNumbersPerPage * max_pages_ || absent_.size() == 0)) {
    page = pages_.size();
    add_absent_extent();
  }
  if (page == ExtentMap::kNone) page = absent_.find_any();
  absent_.erase(page);
  return static_cast<PageId>(page);
}

void PagePool::add_absent_extent() {
  for (std::size_t i = 0; i < ExtentMap::kExtent; ++i) {
    absent_.insert(pages_.size());
    pages_.emplace_back();
  }
}

void PagePool::undo_claim(const PageId* pages, std::size_t num_pages,
                          const std::vector<PageId>& to_create, std::size_t num_created) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t i = num_created; i < to_create.size(); ++i) {
    pages_[to_create[i]] = Page{};
    absent_.insert(to_create[i]);
    --num_created_;
    --num_in_use_;
  }
  for (std::size_t i = 0; i < num_pages; ++i) {
    if (absent_.contains(pages[i])) continue;
    change(pages[i], [](Page& entry) { --entry.live; });
  }
}

/// Enter the page into the sums, or take it out before it changes.
void PagePool::count(const Page& page, Sign sign) {
  const std::size_t one = sign == Sign::kIn ? 1 : static_cast<std::size_t>(-1);  // sums wrap
  if (page.live > 0) {
    num_in_use_ += one;
    num_extra_ += one * (page.live - 1);
  } else if (page.held > 0) {
    num_in_use_ += one;
    num_held_ += one;
  } else if (page.cached > 0) {
    num_in_use_ += one;
    num_cached_ += one;
  } else if (page.retired > 0) {
    num_retired_ += one;
  }
}

template <typename Change>
void PagePool::change(PageId page, Change change) {
  Page& entry = pages_[page];
  count(entry, Sign::kOut);
  change(entry);
  count(entry, Sign::kIn);
  free_if_unreferenced(page);
}

void PagePool::release(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(pages_[page].live > 0, "a page is released that nobody holds");
  change(page, [](Page& entry) { --entry.live; });
}

void PagePool::retire(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(pages_[page].live > 0, "a page is retired that nobody holds");
  change(page, [](Page& entry) {
    --entry.live;
    ++entry.retired;
  });
}

void PagePool::restore(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(pages_[page].retired > 0, "a page is restored that was not retired");
  change(page, [](Page& entry) {
    --entry.retired;
    ++entry.live;
  });
}

void PagePool::settle(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(pages_[page].retired > 0, "a page is settled that was not retired");
  change(page, [](Page& entry) { --entry.retired; });
}

bool PagePool::try_share(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (page >= pages_.size() || pages_[page].num_in_use() == 0) return false;
  change(page, [](Page& entry) { ++entry.live; });
  return true;
}

bool PagePool::try_hold(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (page >= pages_.size() || pages_[page].num_in_use() == 0) return false;
  change(page, [](Page& entry) { ++entry.held; });
  return true;
}

bool PagePool::try_cache(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (page >= pages_.size() || pages_[page].num_in_use() == 0) return false;
  change(page, [](Page& entry) { ++entry.cached; });
  return true;
}

void PagePool::unhold(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(page < pages_.size() && pages_[page].held > 0,
                  "a page is let go that is not held");
  change(page, [](Page& entry) { --entry.held; });
}

bool PagePool::uncache(PageId page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(page < pages_.size() && pages_[page].cached > 0,
                  "a page is uncached that is not cached");
  change(page, [](Page& entry) { --entry.cached; });
  return pages_[page].num_in_use() == 0;
}

void PagePool::uncache_all() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (PageId page = 0; page < pages_.size(); ++page) {
    if (pages_[page].cached > 0) change(page, [](Page& entry) { entry.cached = 0; });
  }
}

bool PagePool::is_shared(PageId page, bool is_retired) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Page& entry = pages_[page];
  return entry.num_in_use() + (is_retired ? entry.retired : 0) > 1;
}

bool PagePool::is_in_use(PageId page) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return page < pages_.size() && pages_[page].num_in_use() > 0;
}

std::uint32_t PagePool::num_live(PageId page) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return page < pages_.size() ? pages_[page].live : 0;
}

std::vector<bool> PagePool::has_extra(const PageId* pages, std::size_t num_pages) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<bool> result(num_pages);
  for (std::size_t i = 0; i < num_pages; ++i) result[i] = pages_[pages[i]].live > 1;
  return result;
}

std::uint32_t PagePool::num_users(PageId page) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return page < pages_.size() ? pages_[page].live + pages_[page].held : 0;
}

void PagePool::free_if_unreferenced(PageId page) {
  const Page& entry = pages_[page];
  if (entry.num_in_use() > 0 || entry.retired > 0) return;
  free_.insert(page);
  if (num_created_ <= max_pages_) return;
  try {
    destroy(page);
  } catch (const DriverError&) {
    // It stays free; whoever trims tries again and hears of it.
  }
}

/// Requires: free. The page stays free if the driver throws.
void PagePool::destroy(PageId page) {
  driver_->destroy_page(pages_[page].handle);
  free_.erase(page);
  pages_[page] = Page{};
  absent_.insert(page);
  --num_created_;
}

PageHandle PagePool::handle(PageId page) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return pages_[page].handle;
}

std::size_t PagePool::available() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_.size() + (max_pages_ > num_created_ ? max_pages_ - num_created_ : 0);
}

std::size_t PagePool::trim(std::size_t keep_free) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t num_destroyed = 0;
  while (free_.size() > keep_free) {
    destroy(static_cast<PageId>(free_.find_any()));
    ++num_destroyed;
  }
  return num_destroyed;
}

void PagePool::set_max_pages(std::size_t max_pages) {
  std::size_t surplus = 0;
  std::size_t num_free = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    max_pages_ = max_pages;
    num_free = free_.size();
    surplus = num_created_ > max_pages ? num_created_ - max_pages : 0;
  }
  trim(num_free > surplus ? num_free - surplus : 0);
}

PoolStats PagePool::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {num_created_, free_.size(), num_in_use_, num_held_,
          num_cached_,  num_retired_, num_extra_,  max_pages_};
}

void PagePool::check_invariants(const std::vector<std::uint32_t>& live,
                                const std::vector<std::uint32_t>& held,
                                const std::vector<std::uint32_t>& cached,
                                const std::vector<std::uint32_t>& retired) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_invariant(num_created_ == free_.size() + num_in_use_ + num_retired_,
                  "created == free + in_use + retired does not hold");
  check_invariant(num_created_ + absent_.size() == pages_.size(),
                  "created + absent is not the number of page numbers");
  std::size_t num_in_use = 0, num_held = 0, num_cached = 0, num_retired = 0, num_extra = 0;
  for (PageId page = 0; page < pages_.size(); ++page) {
    const Page& entry = pages_[page];
    check_references("live", page, entry.live, live);
    check_references("held", page, entry.held, held);
    check_references("cached", page, entry.cached, cached);
    check_references("retired", page, entry.retired, retired);
    const bool is_in_use = entry.num_in_use() > 0;
    if (is_in_use) ++num_in_use;
    if (entry.live == 0 && entry.held > 0) ++num_held;
    if (entry.live + entry.held == 0 && entry.cached > 0) ++num_cached;
    if (entry.live > 1) num_extra += entry.live - 1;
    if (!is_in_use && entry.retired > 0) ++num_retired;
    check_invariant(
        free_.contains(page) + absent_.contains(page) + (is_in_use || entry.retired > 0) == 1,
        "a page is not in exactly one of free, absent and referenced");
  }
  check_invariant(num_in_use == num_in_use_, "in_use is not the number of pages in use");
  check_invariant(num_held == num_held_, "held is not the number of pages only held");
  check_invariant(num_cached == num_cached_, "cached is not the number of pages only cached");
  check_invariant(num_retired == num_retired_, "retired is not the number of retired pages");
  check_invariant(num_extra == num_extra_, "extra is not the number of further references");
}

}  // namespace vmalloc
