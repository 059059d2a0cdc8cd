// elastic_memory_shrink.cpp: the half that takes pages back: retire, settle, trim.
// Owns: nothing of its own.  Thread-safety: see elastic_memory.h.
#include "elastic_memory.h"
#include "error.h"

namespace vmalloc {

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
void ElasticMemory::give_back() noexcept { keep_free(spare_pages_); }

void ElasticMemory::keep_free(std::size_t num_pages) noexcept {
  try {
    static_cast<void>(pool_.trim(num_pages));
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
  pool_.set_max_pages(max_pages);
  poll();  // what comes free now and is beyond the cap goes at once
}

}  // namespace vmalloc
