#include "elastic_memory.h"

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
