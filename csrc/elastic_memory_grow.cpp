// elastic_memory_grow.cpp: the half that backs bytes: plan, acquire and map, publish.
// Owns: nothing of its own.  Thread-safety: see elastic_memory.h.
#include <algorithm>
#include <string>

#include "elastic_memory.h"
#include "error.h"

namespace vmalloc {

bool ElasticMemory::try_commit(const std::vector<ByteSpan>& spans, Stream stream) {
  const Lock lock = enter();
  for (const ByteSpan span : spans) check_span(span);
  driver_->use_stream(stream);
  poll();
  bool is_backed = try_spans(spans);
  if (!is_backed && wait_retired_for(spans)) is_backed = try_spans(spans);
  if (is_backed) {
    for (const ByteSpan span : spans) committed_.insert(span);
  }
  give_back();
  return is_backed;
}

bool ElasticMemory::try_spans(const std::vector<ByteSpan>& spans) {
  const Plan plan = this->plan(spans);
  return !plan.is_blocked && plan.missing.size() * regions_.size() <= pool_.available() &&
         try_back(plan, spans);
}

/// Wait for the device if the spans may be had then; false if there is no hope.
bool ElasticMemory::wait_retired_for(const std::vector<ByteSpan>& spans) {
  const std::size_t num_pages = plan(spans).missing.size() * regions_.size();
  return num_pages <= pool_.available() + pool_.stats().num_retired && wait_retired();
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
      // Nor is a page taken back that is mapped elsewhere too: whoever commits anew shares nothing.
      plan.is_blocked |= std::any_of(
          place->second.pages.begin(), place->second.pages.end(),
          [this](PageId page) { return page == kNoPage || pool_.is_shared(page, true); });
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
  try {
    pool_.top_up(num_pages);
  } catch (const DriverError&) {
    keep_free(num_free);
    throw;
  }
  if (pool_.stats().num_free < num_pages) {
    keep_free(num_free);
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

}  // namespace vmalloc
