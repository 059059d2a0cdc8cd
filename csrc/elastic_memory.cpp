#include "elastic_memory.h"

#include <algorithm>
#include <exception>
#include <string>

#include "error.h"

namespace vmalloc {
namespace {

std::shared_ptr<Region> reserve(const std::shared_ptr<Driver>& driver, std::size_t bytes) {
  try {
    return std::make_shared<Region>(driver, 1, 1, bytes);
  } catch (const ConfigError&) {
    throw ConfigError("the address space has no room for a range of " + std::to_string(bytes) +
                      " bytes");
  }
}

/// Call `visit(first, count)` for each run of consecutive numbers.
template <typename Visit>
void for_each_run(const std::vector<std::size_t>& numbers, Visit visit) {
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t count = 1;
    while (i + count < numbers.size() && numbers[i + count] == numbers[i] + count) ++count;
    visit(numbers[i], count);
    i += count;
  }
}

}  // namespace

ElasticMemory::ElasticMemory(std::shared_ptr<Driver> driver, std::size_t num_regions,
                             std::size_t region_bytes, std::size_t max_pages,
                             std::size_t spare_pages, bool zero_on_reuse)
    : driver_(std::move(driver)),
      page_bytes_(driver_->page_bytes()),
      region_bytes_(region_bytes),
      zero_on_reuse_(zero_on_reuse),
      pool_(driver_, max_pages),
      spare_pages_(spare_pages) {
  if (num_regions == 0) throw ConfigError(with_limit("num_regions", 0, "at least 1"));
  if (region_bytes == 0) throw ConfigError(with_limit("region_bytes", 0, "at least 1"));
  for (std::size_t r = 0; r < num_regions; ++r) regions_.push_back(reserve(driver_, region_bytes));
}

ElasticMemory::~ElasticMemory() {
  if (guard_.is_forked_child()) return;
  try {
    close();
  } catch (const std::exception&) {
    // At exit the driver may be gone, and the mappings with it.
  }
}

void ElasticMemory::close() {
  guard_.check("this elastic memory");
  const Lock lock(mutex_);
  if (is_closed_) return;
  is_closed_ = true;
  std::exception_ptr failure;
  const auto attempt = [&failure](auto call) {
    for (int i = 0; i < 2; ++i) {
      try {
        return call();
      } catch (const DriverError&) {
        failure = std::current_exception();  // reported once everything else is given back
      }
    }
  };
  attempt([this] {
    if (driver_->is_async()) driver_->wait_enqueued();  // kernels may read what is unmapped now
  });
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    attempt([this, r] { unmap_all(r); });
  }
  committed_.clear();
  attempt([this] { static_cast<void>(pool_.trim(0)); });
  if (failure) std::rethrow_exception(failure);
}

void ElasticMemory::unmap_all(std::size_t region) {
  std::vector<std::size_t> all;
  for (const auto& [idx, place] : places_) all.push_back(idx);
  settle_region(all, region);
}

ElasticMemory::Lock ElasticMemory::enter() const {
  guard_.check("this elastic memory");
  Lock lock(mutex_);
  if (is_closed_) throw ClosedError("this elastic memory is closed");
  return lock;
}

void ElasticMemory::check_open() const { static_cast<void>(enter()); }

std::shared_ptr<Region> ElasticMemory::region(std::size_t idx) const {
  if (idx >= regions_.size()) {
    throw ConfigError(with_limit("region", idx, "below " + std::to_string(regions_.size())));
  }
  return regions_[idx];
}

// ---- geometry

void ElasticMemory::check_span(ByteSpan span) const {
  if (span.first >= span.end || span.end > region_bytes_) {
    throw ConfigError("bytes " + std::to_string(span.first) + " to " + std::to_string(span.end) +
                      " are no part of a range of " + std::to_string(region_bytes_) + " bytes");
  }
}

/// The places that the bytes lie in: first, and one past the last.
std::pair<std::size_t, std::size_t> ElasticMemory::places_of(ByteSpan span) const {
  return {span.first / page_bytes_, (span.end + page_bytes_ - 1) / page_bytes_};
}

ByteSpan ElasticMemory::bytes_of(std::size_t place) const {
  return {place * page_bytes_, (place + 1) * page_bytes_};
}

Address ElasticMemory::address_of(std::size_t region, std::size_t place) const {
  return regions_[region]->page_address(0, place);
}

// ---- commit

bool ElasticMemory::try_commit(const std::vector<ByteSpan>& spans, Stream stream) {
  const Lock lock = enter();
  for (const ByteSpan span : spans) check_span(span);
  driver_->use_stream(stream);
  poll();
  for (bool may_wait = true;; may_wait = false) {
    const Plan plan = this->plan(spans);
    if (!plan.is_blocked && try_back(plan, spans)) break;
    const std::size_t most = pool_.available() + pool_.stats().num_retired;
    if (!may_wait || plan.missing.size() * regions_.size() > most || !wait_retired()) return false;
  }
  for (const ByteSpan span : spans) committed_.insert(span);
  give_back();
  return true;
}

ElasticMemory::Plan ElasticMemory::plan(const std::vector<ByteSpan>& spans) const {
  std::set<std::size_t> wanted;
  for (const ByteSpan span : spans) {
    const auto [first, end] = places_of(span);
    for (std::size_t idx = first; idx < end; ++idx) wanted.insert(wanted.end(), idx);
  }
  Plan plan;
  for (const std::size_t idx : wanted) {
    const auto place = places_.find(idx);
    if (place == places_.end()) {
      plan.missing.push_back(idx);
    } else if (place->second.retired_in != 0) {
      const std::vector<PageId>& pages = place->second.pages;
      if (std::find(pages.begin(), pages.end(), kNoPage) != pages.end()) plan.is_blocked = true;
      plan.retired.push_back(idx);
    }
  }
  return plan;
}

/// Map, clear and enter what the plan says, or change nothing.
bool ElasticMemory::try_back(const Plan& plan, const std::vector<ByteSpan>& spans) {
  std::vector<Run> runs = cut_runs(plan.missing);
  bool is_done = true;
  try {
    for (std::size_t i = 0; i < runs.size() && is_done; ++i) is_done = try_map(runs[i]);
    is_done = is_done && try_clear(runs, spans);
  } catch (...) {
    undo(runs);
    throw;
  }
  if (!is_done) {
    undo(runs);
    return false;
  }
  publish(runs, plan);
  return true;
}

std::vector<ElasticMemory::Run> ElasticMemory::cut_runs(
    const std::vector<std::size_t>& places) const {
  std::vector<Run> runs;
  for (std::size_t r = 0; r < regions_.size(); ++r) {
    for_each_run(places, [&](std::size_t first, std::size_t count) {
      Run run{};
      run.region = r;
      run.first = first;
      run.pages.assign(count, kNoPage);
      runs.push_back(std::move(run));
    });
  }
  return runs;
}

/// Get pages for the run, unless it has some already, and map them.
bool ElasticMemory::try_map(Run& run) {
  if (run.pages[0] == kNoPage) {
    PageId after = kNoPage;
    const auto before = run.first > 0 ? places_.find(run.first - 1) : places_.end();
    if (before != places_.end()) after = before->second.pages[run.region];
    std::vector<PageId> pages(run.pages.size());
    if (!pool_.try_acquire(pages.size(), after, pages.data(), &run.any_used)) return false;
    run.pages = std::move(pages);
  }
  std::vector<PageHandle> handles;
  for (const PageId page : run.pages) handles.push_back(pool_.handle(page));
  run.is_mapped = driver_->try_map(address_of(run.region, run.first), handles.data(),
                                   handles.size(), Access::kReadWrite);
  return run.is_mapped;
}

/// Clear what earlier rows left in the bytes that are committed anew.
bool ElasticMemory::try_clear(const std::vector<Run>& runs, const std::vector<ByteSpan>& spans) {
  if (!zero_on_reuse_) return true;
  for (const Run& run : runs) {
    if (run.any_used &&
        !driver_->try_zero(address_of(run.region, run.first), run.pages.size() * page_bytes_)) {
      return false;
    }
  }
  for (const ByteSpan span : spans) {
    for (const ByteSpan gap : committed_.missing(span)) {
      if (!try_clear_old(gap)) return false;
    }
  }
  return true;
}

/// Clear those of the bytes that were mapped before, but for pages that are mapped elsewhere too.
bool ElasticMemory::try_clear_old(ByteSpan span) {
  const auto [first, end] = places_of(span);
  for (auto it = places_.lower_bound(first); it != places_.end() && it->first < end; ++it) {
    const ByteSpan bytes{std::max(span.first, bytes_of(it->first).first),
                         std::min(span.end, bytes_of(it->first).end)};
    for (std::size_t r = 0; r < regions_.size(); ++r) {
      const PageId page = it->second.pages[r];
      if (pool_.is_shared(page, it->second.retired_in != 0)) continue;
      if (!driver_->try_zero(address_of(r, 0) + bytes.first, bytes.end - bytes.first)) return false;
    }
  }
  return true;
}

/// Unmap and give back. What the driver will not unmap waits among the retired.
void ElasticMemory::undo(std::vector<Run>& runs) noexcept {
  bool is_stuck = false;
  for (const Run& run : runs) {
    if (run.pages[0] == kNoPage) continue;
    bool is_mapped = run.is_mapped;
    try {
      if (is_mapped) {
        if (driver_->is_async()) driver_->wait_enqueued();  // it may have been cleared just now
        driver_->unmap(address_of(run.region, run.first), run.pages.size());
        is_mapped = false;
      }
    } catch (const DriverError&) {
      is_stuck = true;
    }
    for (std::size_t i = 0; i < run.pages.size(); ++i) {
      if (!is_mapped) {
        pool_.release(run.pages[i]);
        continue;
      }
      Place& place = places_[run.first + i];
      place.pages.resize(regions_.size(), kNoPage);
      place.pages[run.region] = run.pages[i];
      place.retired_in = epoch_ + 1;
      retired_.insert(run.first + i);
      pool_.retire(run.pages[i]);
    }
  }
  if (is_stuck) ++epoch_;
}

void ElasticMemory::publish(const std::vector<Run>& runs, const Plan& plan) {
  for (const Run& run : runs) {
    for (std::size_t i = 0; i < run.pages.size(); ++i) {
      Place& place = places_[run.first + i];
      place.pages.resize(regions_.size(), kNoPage);
      place.pages[run.region] = run.pages[i];
    }
  }
  for (const std::size_t idx : plan.retired) {
    Place& place = places_.at(idx);
    for (const PageId page : place.pages) pool_.restore(page);
    place.retired_in = 0;
    retired_.erase(idx);
  }
}

bool ElasticMemory::try_create_spare(std::size_t num_pages) {
  const Lock lock = enter();
  if (!wait_retired()) poll();
  const std::size_t num_free = pool_.stats().num_free;
  pool_.top_up(num_pages);
  if (pool_.stats().num_free < num_pages) {
    pool_.trim(num_free);
    return false;
  }
  spare_pages_ = std::max(spare_pages_, num_pages);
  return true;
}

// ---- aliases

bool ElasticMemory::try_alias(ByteSpan source, std::size_t target, Stream stream) {
  const Lock lock = enter();
  check_span(source);
  const std::size_t num_bytes = source.end - source.first;
  if (source.first % page_bytes_ != 0 || num_bytes % page_bytes_ != 0 ||
      target % page_bytes_ != 0) {
    throw ConfigError("bytes " + std::to_string(source.first) + " to " +
                      std::to_string(source.end) + " cannot be mapped at " +
                      std::to_string(target) + " too: all three must be multiples of the page, " +
                      std::to_string(page_bytes_) + " bytes");
  }
  check_span({target, target + num_bytes});
  if (!committed_.missing(source).empty()) {
    throw ConfigError("bytes " + std::to_string(source.first) + " to " +
                      std::to_string(source.end) + " are not all committed; an alias needs them");
  }
  if (committed_.meets({target, target + num_bytes})) {
    throw ConfigError("bytes from " + std::to_string(target) +
                      " on are committed already; an alias cannot replace them");
  }
  driver_->use_stream(stream);
  poll();
  const auto [first, end] = places_of({target, target + num_bytes});
  const auto is_taken = [this, first = first, end = end] {
    const auto it = places_.lower_bound(first);
    return it != places_.end() && it->first < end;
  };
  if (is_taken()) wait_retired();  // what was there may be read still
  if (is_taken() || !try_share(source, target)) return false;
  committed_.insert({target, target + num_bytes});
  return true;
}

bool ElasticMemory::try_share(ByteSpan source, std::size_t target) {
  const auto [first, end] = places_of(source);
  std::vector<std::size_t> at;
  for (std::size_t i = 0; i < end - first; ++i) at.push_back(target / page_bytes_ + i);
  std::vector<Run> runs = cut_runs(at);
  for (Run& run : runs) {
    for (std::size_t i = 0; i < run.pages.size(); ++i) {
      run.pages[i] = places_.at(first + i).pages[run.region];
      check_invariant(pool_.try_share(run.pages[i]), "a committed page is not in use");
    }
  }
  bool is_done = true;
  try {
    for (std::size_t i = 0; i < runs.size() && is_done; ++i) is_done = try_map(runs[i]);
  } catch (...) {
    undo(runs);
    throw;
  }
  if (!is_done) {
    undo(runs);
    return false;
  }
  publish(runs, {});
  num_aliased_ += at.size() * regions_.size();
  return true;
}

// ---- decommit

void ElasticMemory::decommit(const std::vector<ByteSpan>& spans, Stream stream) {
  const Lock lock = enter();
  for (const ByteSpan span : spans) check_span(span);
  driver_->use_stream(stream);
  for (const ByteSpan span : spans) committed_.erase(span);
  bool any_retired = false;
  for (const ByteSpan span : spans) {
    const auto [first, end] = places_of(span);
    for (auto it = places_.lower_bound(first); it != places_.end() && it->first < end; ++it) {
      if (it->second.retired_in != 0 || committed_.meets(bytes_of(it->first))) continue;
      for (const PageId page : it->second.pages) pool_.retire(page);
      it->second.retired_in = epoch_ + 1;
      retired_.insert(it->first);
      any_retired = true;
    }
  }
  if (any_retired) ++epoch_;
  try {
    poll();
  } catch (const DriverError&) {
    // The bytes are given up all the same; the next call tries again, and reports it.
  }
  give_back();
}

/// See how far the device has come, and unmap what nobody can read any more.
void ElasticMemory::poll() {
  if (fenced_ < epoch_) {
    if (const std::optional<Fence> fence = driver_->try_record_fence()) {
      fences_.emplace_back(epoch_, *fence);
      fenced_ = epoch_;
    }
  }
  while (!fences_.empty() && driver_->fence_passed(fences_.front().second)) {
    completed_ = fences_.front().first;
    fences_.pop_front();
  }
  settle();
}

/// Wait until nothing reads what is retired; false if nothing is.
bool ElasticMemory::wait_retired() {
  if (retired_.empty()) return false;
  driver_->wait_enqueued();
  poll();
  return true;
}

void ElasticMemory::settle() {
  std::vector<std::size_t> due;
  for (const std::size_t idx : retired_) {
    if (places_.at(idx).retired_in <= completed_) due.push_back(idx);
  }
  if (due.empty()) return;
  for (std::size_t r = 0; r < regions_.size(); ++r) settle_region(due, r);
  for (const std::size_t idx : due) {
    places_.erase(idx);
    retired_.erase(idx);
  }
}

/// Unmap the places in one region, and drop what they refer to there.
void ElasticMemory::settle_region(const std::vector<std::size_t>& due, std::size_t region) {
  std::vector<std::size_t> mapped;
  for (const std::size_t idx : due) {
    if (places_.at(idx).pages[region] != kNoPage) mapped.push_back(idx);
  }
  for_each_run(mapped, [&](std::size_t first, std::size_t count) {
    driver_->unmap(address_of(region, first), count);
    for (std::size_t idx = first; idx < first + count; ++idx) {
      Place& place = places_.at(idx);
      const PageId page = std::exchange(place.pages[region], kNoPage);
      place.retired_in != 0 ? pool_.settle(page) : pool_.release(page);
    }
  });
}

/// Free pages that need not be kept go back to the system.
void ElasticMemory::give_back() noexcept {
  try {
    static_cast<void>(pool_.trim(spare_pages_));
  } catch (const DriverError&) {
    // They stay free; whoever trims tries again and hears of it.
  }
}

std::size_t ElasticMemory::trim(std::size_t keep_free) {
  const Lock lock = enter();
  if (!wait_retired()) poll();
  return pool_.trim(keep_free);
}

void ElasticMemory::resize(std::size_t max_pages) {
  const Lock lock = enter();
  poll();
  pool_.set_max_pages(max_pages);
}

// ---- reports

ElasticStats ElasticMemory::stats() {
  const Lock lock = enter();
  ElasticStats stats;
  stats.pool = pool_.stats();
  stats.driver = driver_->counters();
  for (const auto& region : regions_) stats.reserved_bytes += region->bytes();
  stats.page_bytes = page_bytes_;
  stats.aliased_pages = num_aliased_;
  return stats;
}

void ElasticMemory::check_invariants() {
  const Lock lock = enter();
  std::vector<std::uint32_t> live, retired;
  std::size_t num_retired = 0;
  for (const auto& [idx, place] : places_) {
    const bool is_retired = place.retired_in != 0;
    if (is_retired) ++num_retired;
    check_invariant(committed_.meets(bytes_of(idx)) != is_retired,
                    "a place is live that no committed byte lies in, or the reverse");
    check_invariant(retired_.count(idx) == (is_retired ? 1U : 0U),
                    "the list of retired places does not match the places");
    for (const PageId page : place.pages) {
      check_invariant(is_retired || page != kNoPage, "a committed byte is not mapped everywhere");
      if (page == kNoPage) continue;
      std::vector<std::uint32_t>& counts = is_retired ? retired : live;
      if (page >= counts.size()) counts.resize(page + 1, 0);
      ++counts[page];
    }
  }
  check_invariant(num_retired == retired_.size(), "the list of retired places has strangers");
  for (const ByteSpan span : committed_.spans()) {
    const auto [first, end] = places_of(span);
    for (std::size_t idx = first; idx < end; ++idx) {
      check_invariant(places_.count(idx) == 1, "a committed byte has no page");
    }
  }
  pool_.check_invariants(live, {}, {}, retired);
}

}  // namespace vmalloc
