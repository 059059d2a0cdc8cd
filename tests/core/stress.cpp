// stress.cpp: native stress test for sanitizer runs: an engine thread, an observer and the worker.
// With --cuda LIBRARY it runs on the cuda driver over the stand-in, whose kernels still read rows
// after the step that launched them.
// Owns: nothing.  Thread-safety: this is what it tests. Exit status 0 means every check held.
//
// Each round makes an arena, does random admissions, growth, truncation, release, trimming and
// resizing on one thread while another reads statistics and checks invariants, with random pauses
// between (without them the threads rarely meet and a race stays hidden). Rows carry values that
// are compared before a sequence ends, so a page that left its slot too early shows.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_driver.h"
#include "elastic_memory.h"
#include "error.h"
#include "fault_driver.h"
#include "kv_arena.h"
#include "linear.h"
#include "thread_pool.h"

namespace {

using vmalloc::ArenaConfig;
using vmalloc::KVArena;
using Random = std::mt19937;

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kMaxRows = 96;
constexpr std::size_t kNumOperations = 300;
constexpr std::size_t kElasticRow = 1000;  // bytes: rows share pages, and straddle them
constexpr std::size_t kElasticRows = 90;   // of each thread

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::exit(1);
}

std::size_t pick(Random& random, std::size_t below) { return random() % below; }

/// Sometimes nothing, sometimes a yield, sometimes a short sleep.
void jitter(Random& random) {
  switch (pick(random, 8)) {
    case 0:
      std::this_thread::yield();
      break;
    case 1:
      std::this_thread::sleep_for(std::chrono::microseconds(pick(random, 60)));
      break;
    default:
      break;
  }
}

/// Kernels that read rows on the device, when it gets to it: of the stand-in driver only.
class Kernels {
 public:
  explicit Kernels(const std::string& library) : library_(library) {
    if (library.empty()) return;
    setenv("FAKECUDA_GRAN_KB", "4", 1);  // read when it loads
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    require(handle != nullptr, "the stand-in driver does not load");
    touch_ = reinterpret_cast<Touch>(dlsym(handle, "fakecuda_touch"));
    const auto control = reinterpret_cast<int (*)(const char*)>(dlsym(handle, "fakecuda_ctl"));
    require(touch_ != nullptr && control != nullptr, "this is not the stand-in driver");
    // Every third look at unfinished work finds it finished.
    require(control("query_runs=3") == 0, "the stand-in driver does not take its settings");
  }

  [[nodiscard]] std::shared_ptr<vmalloc::Driver> make_driver() const {
    if (library_.empty()) return vmalloc::make_host_driver(kPageBytes);
    vmalloc::CudaOptions options;
    options.page_bytes = kPageBytes;
    options.library = library_;
    options.cpu_tensors = true;
    return vmalloc::make_cuda_driver(options);
  }

  void launch(vmalloc::Address address, std::size_t bytes) const {
    if (touch_ == nullptr || bytes == 0) return;
    require(touch_(0, address, bytes, 0) == 0, "a kernel could not be launched");
  }

 private:
  using Touch = int (*)(std::uintptr_t stream, std::uint64_t address, std::size_t bytes,
                        int is_write);
  std::string library_;
  Touch touch_ = nullptr;
};

ArenaConfig make_config(Random& random) {
  ArenaConfig config{};
  config.layers.assign(5, {3, 40, 40, 4});  // 4,800 bytes a token: rows straddle pages
  config.layers_per_group = 1 + pick(random, 5);
  config.kv_split = pick(random, 2) == 0;
  config.num_slots = 16;
  config.swap_bytes = pick(random, 2) == 0 ? 100 * kPageBytes : 2000 * kPageBytes;
  config.protect_shared = pick(random, 2) == 0;
  config.max_rows = kMaxRows;
  config.spare_pages = pick(random, 2) == 0 ? 0 : 20;
  config.max_pages = 60 + pick(random, 200);
  config.low_pages = pick(random, 10);
  config.high_pages = pick(random, 2) == 0 ? SIZE_MAX : 40;
  config.ahead_rows = 1 + pick(random, 20);
  config.zero_on_reuse = pick(random, 2) == 0;
  return config;
}

/// The engine thread's half: what it admitted, and the value in every row.
class Engine {
 public:
  Engine(KVArena& arena, vmalloc::FaultDriver& driver, const Kernels& kernels, unsigned seed)
      : arena_(arena), driver_(driver), kernels_(kernels), random_(seed) {}

  void run() {
    for (std::size_t i = 0; i < kNumOperations; ++i) {
      jitter(random_);
      operate();
      if (pick(random_, 4) == 0) arena_.check_invariants(cached_);
    }
    while (!live_.empty()) release(live_.begin()->first);
    while (!swapped_.empty()) {
      if (dropped_.count(swapped_.begin()->first) != 0) {
        swapped_.erase(swapped_.begin());  // left for close() to give back
        continue;
      }
      const std::uint64_t group = swapped_.begin()->first;
      for (std::size_t i = 0; i < swapped_[group].size(); ++i) arena_.drop_swapped(group, i);
      swapped_.erase(group);
    }
    uncache();
  }

 private:
  void operate() {
    switch (pick(random_, 19)) {
      case 0:
      case 1:
        admit();
        break;
      case 2:
        if (!live_.empty()) release(any());
        break;
      case 3:
        if (!live_.empty()) truncate(any());
        break;
      case 4:
        arena_.prefetch(1 + pick(random_, kMaxRows));
        break;
      case 5:
        static_cast<void>(arena_.trim(pick(random_, 8)));
        break;
      case 6:
        arena_.resize(60 + pick(random_, 200), pick(random_, 10), SIZE_MAX);
        break;
      case 7:
        driver_.hold_fences(pick(random_, 2) == 0);
        break;
      case 8:
        if (!live_.empty()) fork(any());
        break;
      case 9:
        swap_out();
        break;
      case 10:
        if (!swapped_.empty()) swap_in();
        break;
      case 11:
        if (!live_.empty()) cache(any());
        break;
      case 12:
        uncache();
        break;
      case 13:
        if (!live_.empty()) assign();
        break;
      case 14:
        grant();
        break;
      default:
        step();
        break;
    }
  }

  /// Have pages created as several pools do together: kept, or given back where another has none.
  void grant() {
    require(arena_.stats().pool.num_created <= most_created_, "a page was created ungranted");
    const std::size_t num_pages = pick(random_, 200);
    const bool is_granted = arena_.try_grant(num_pages);
    const vmalloc::PoolStats pool = arena_.stats().pool;
    require(!is_granted || pool.num_created >= std::min(num_pages, pool.max_pages),
            "granted pages were not created");
    jitter(random_);
    const bool is_last = pick(random_, 3) == 0;  // of those that limit what is created on demand
    const std::size_t limit = is_last ? SIZE_MAX : pick(random_, 2) == 0 ? num_pages : 60;
    arena_.end_grant(limit, is_granted && pick(random_, 2) == 0);
    most_created_ = std::max(limit, arena_.stats().pool.num_created);
  }

  void admit() {
    const std::size_t num_rows = pick(random_, kMaxRows + 1);
    const auto slots = arena_.try_admit(1 + pick(random_, 2), num_rows);
    if (!slots) return;
    for (const std::uint32_t slot : *slots) {
      require(live_.count(slot) == 0, "a live slot was admitted again");
      write(slot, 0, num_rows);
    }
  }

  void step() {
    const vmalloc::Epoch epoch = arena_.begin_step(0);
    if (!prepare_writes()) return arena_.end_step(epoch);
    std::vector<std::int64_t> slots, rows;
    for (const auto& [slot, values] : live_) {
      slots.push_back(slot);
      rows.push_back(
          static_cast<std::int64_t>(std::min(kMaxRows, values.size() + pick(random_, 4))));
    }
    jitter(random_);
    if (arena_.try_extend(slots.data(), rows.data(), slots.size())) {
      for (std::size_t i = 0; i < slots.size(); ++i) {
        const auto slot = static_cast<std::uint32_t>(slots[i]);
        write(slot, live_[slot].size(), static_cast<std::size_t>(rows[i]));
      }
    }
    for (const auto& [slot, values] : live_) {
      for (std::size_t r = 0; r < arena_.num_regions(); ++r) {
        const auto region = arena_.region(r);
        kernels_.launch(region->page_address(slot, 0), values.size() * region->row_bytes());
      }
    }
    arena_.end_step(epoch);
  }

  void truncate(std::uint32_t slot) {
    std::vector<float>& values = live_[slot];
    values.resize(pick(random_, values.size() + 1));
    arena_.truncate(slot, values.size());
    cut_.insert(slot);
  }

  /// What was cut short may end in a shared page: let it move to a slot of its own.
  bool prepare_writes() {
    while (!cut_.empty()) {
      const std::uint32_t slot = *cut_.begin();
      if (live_.count(slot) != 0) {
        const auto moved = arena_.prepare_write(slot);
        if (!moved) return false;
        if (*moved != slot) {
          require(live_.count(*moved) == 0, "a sequence moved into a live slot");
          live_[*moved] = std::move(live_[slot]);
          live_.erase(slot);
        }
      }
      cut_.erase(slot);
    }
    return true;
  }

  void fork(std::uint32_t parent) {
    const std::size_t num_rows = pick(random_, live_[parent].size() + 1);
    const auto children = arena_.try_fork(parent, 1 + pick(random_, 2), num_rows);
    if (!children) return;
    for (const std::uint32_t child : *children) {
      require(live_.count(child) == 0, "a live slot was given to a child");
      live_[child].assign(live_[parent].begin(),
                          live_[parent].begin() + static_cast<std::ptrdiff_t>(num_rows));
      check(child);
    }
  }

  /// Some sequences go on from others' rows, in their own slots.
  void assign() {
    KVArena::Slots slots, sources;
    std::size_t num_rows = kMaxRows;
    for (const auto& entry : live_) {
      if (pick(random_, 2) == 0) continue;
      slots.push_back(entry.first);
      sources.push_back(any());
      num_rows = std::min(num_rows, live_[sources.back()].size());
    }
    if (slots.empty()) return;
    num_rows = pick(random_, num_rows + 1);
    if (!arena_.try_assign(slots, sources, num_rows)) return;
    const auto before = live_;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      const std::vector<float>& source = before.at(sources[i]);
      live_[slots[i]].assign(source.begin(),
                             source.begin() + static_cast<std::ptrdiff_t>(num_rows));
    }
    for (const std::uint32_t slot : slots) check(slot);
  }

  void swap_out() {
    KVArena::Slots slots;
    for (const auto& entry : live_) {
      if (pick(random_, 2) == 0) slots.push_back(entry.first);
    }
    for (const std::uint32_t slot : slots) check(slot);
    if (slots.empty()) return;
    const auto group = arena_.try_swap_out(slots);
    if (!group) return;
    for (const std::uint32_t slot : slots) {
      swapped_[*group].push_back(live_[slot]);
      live_.erase(slot);
      cut_.erase(slot);
    }
    std::vector<std::vector<float>>& values = swapped_[*group];
    if (values.size() > 1 && pick(random_, 2) == 0) {  // one of them is aborted meanwhile
      arena_.drop_swapped(*group, 1);
      values.erase(values.begin() + 1);
      dropped_.insert(*group);
    }
  }

  void swap_in() {
    const std::uint64_t group = swapped_.begin()->first;
    const auto slots = arena_.try_swap_in(group);
    if (!slots) return;
    for (std::size_t i = 0; i < slots->size(); ++i) {
      const std::uint32_t slot = (*slots)[i];
      require(live_.count(slot) == 0, "a group came back into a live slot");
      live_[slot] = swapped_[group][i];
      cut_.insert(slot);  // it may have been cut before it went
      check(slot);
    }
    swapped_.erase(group);
  }

  /// Refer to the first whole pages of a slot from outside, as the prefix index does.
  void cache(std::uint32_t slot) {
    for (std::size_t r = 0; r < arena_.num_regions(); ++r) {
      const auto region = arena_.region(r);
      const std::size_t num_full = live_[slot].size() * region->row_bytes() / kPageBytes;
      for (std::size_t i = 0; i < std::min<std::size_t>(num_full, 3); ++i) {
        cached_.push_back(arena_.page_ids(slot, {r}, {i})[0]);
        arena_.cache_pages(slot, {r}, {i});
      }
    }
  }

  void uncache() {
    static_cast<void>(arena_.uncache_pages(cached_));
    cached_.clear();
  }

  void check(std::uint32_t slot) {
    const std::vector<float>& values = live_[slot];
    for (std::size_t row = 0; row < values.size(); ++row) {
      for_each_cell(slot, row, [&](const float* cell) {
        require(*cell == values[row], "a row of a live sequence changed");
      });
    }
  }

  void release(std::uint32_t slot) {
    check(slot);
    const std::int64_t id = slot;
    arena_.free(&id, 1);
    live_.erase(slot);
    cut_.erase(slot);
  }

  std::uint32_t any() {
    auto it = live_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(pick(random_, live_.size())));
    return it->first;
  }

  void write(std::uint32_t slot, std::size_t first, std::size_t end) {
    std::vector<float>& values = live_[slot];
    for (std::size_t row = first; row < end; ++row) {
      values.push_back(next_value_++);
      for_each_cell(slot, row, [&](float* cell) { *cell = values[row]; });
    }
  }

  /// First and last float of the row in every region.
  template <typename Visit>
  void for_each_cell(std::uint32_t slot, std::size_t row, Visit visit) {
    for (std::size_t r = 0; r < arena_.num_regions(); ++r) {
      const auto region = arena_.region(r);
      auto* cells =
          reinterpret_cast<float*>(region->page_address(slot, 0) + row * region->row_bytes());
      visit(cells);
      visit(cells + region->row_bytes() / sizeof(float) - 1);
    }
  }

  KVArena& arena_;
  vmalloc::FaultDriver& driver_;
  const Kernels& kernels_;
  Random random_;
  std::map<std::uint32_t, std::vector<float>> live_;
  std::set<std::uint32_t> cut_;  // truncated since they were last written
  std::map<std::uint64_t, std::vector<std::vector<float>>> swapped_;
  std::set<std::uint64_t> dropped_;  // groups that lost their second member
  std::vector<vmalloc::PageId> cached_;
  std::size_t most_created_ = SIZE_MAX;  // pages, by the last grant
  float next_value_ = 1;
};

void observe(KVArena& arena, const std::atomic<bool>& stop, unsigned seed) {
  Random random(seed);
  while (!stop.load()) {
    const vmalloc::ArenaStats stats = arena.stats();
    require(stats.pool.num_created ==
                stats.pool.num_free + stats.pool.num_in_use + stats.pool.num_retired,
            "created == free + in_use + retired does not hold");
    for (const vmalloc::SlotMap& slot : arena.page_map()) {
      require(std::any_of(slot.regions.begin(), slot.regions.end(),
                          [](const auto& runs) { return !runs.empty(); }),
              "the page map has a slot without pages");
    }
    static_cast<void>(arena.can_admit(1, pick(random, kMaxRows)));
    static_cast<void>(arena.mapped_rows(static_cast<std::uint32_t>(pick(random, 16))));
    jitter(random);
  }
}

void run_arena_round(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  const std::shared_ptr<vmalloc::Driver> inner = kernels.make_driver();
  auto driver = std::make_shared<vmalloc::FaultDriver>(inner);
  {
    KVArena arena(driver, make_config(random));
    driver->delay_maps(pick(random, 2) == 0 ? 0 : static_cast<unsigned>(pick(random, 100)));
    std::atomic<bool> stop{false};
    std::thread observer([&] { observe(arena, stop, seed + 1); });
    Engine(arena, *driver, kernels, seed + 2).run();
    stop = true;
    observer.join();
    arena.check_invariants();
    if (seed % 2 == 0) arena.close();
  }
  require(inner->counters().create_calls == inner->counters().destroy_calls, "a page leaked");
}

/// Commits, writes, compares and gives up rows of its own half, which share pages with each other
/// and, at the border, with the other half.
void use_elastic_rows(vmalloc::ElasticMemory& memory, vmalloc::Driver& driver,
                      const Kernels& kernels, std::size_t first_row, unsigned seed) {
  driver.attach_thread();  // for the launches
  Random random(seed);
  std::map<std::size_t, float> rows;
  float next_value = 1;
  const auto for_each_cell = [&](std::size_t row, auto visit) {
    for (std::size_t r = 0; r < memory.num_regions(); ++r) {
      auto* cells = reinterpret_cast<float*>(memory.region(r)->address() + row * kElasticRow);
      visit(cells);
      visit(cells + kElasticRow / sizeof(float) - 1);
    }
  };
  for (std::size_t i = 0; i < kNumOperations; ++i) {
    jitter(random);
    const std::size_t first = first_row + pick(random, kElasticRows);
    const std::size_t end = std::min(first + 1 + pick(random, 30), first_row + kElasticRows);
    const vmalloc::ByteSpan span{first * kElasticRow, end * kElasticRow};
    if (pick(random, 2) == 0) {
      if (!memory.try_commit({span}, 0)) continue;
      for (std::size_t row = first; row < end; ++row) {
        rows[row] = next_value++;
        for_each_cell(row, [&](float* cell) { *cell = rows[row]; });
      }
      kernels.launch(memory.region(0)->address() + span.first, span.end - span.first);
    } else {
      for (std::size_t row = first; row < end; ++row) {
        if (rows.count(row) == 0) continue;
        for_each_cell(row, [&](const float* cell) {
          require(*cell == rows[row], "an elastic row is not as it was written");
        });
        rows.erase(row);
      }
      memory.decommit({span}, 0);
    }
  }
}

void run_elastic_round(const Kernels& kernels, unsigned seed) {
  Random random(seed);
  const std::shared_ptr<vmalloc::Driver> inner = kernels.make_driver();
  auto driver = std::make_shared<vmalloc::FaultDriver>(inner);
  {
    vmalloc::ElasticMemory memory(driver, 1 + pick(random, 3), 2 * kElasticRows * kElasticRow,
                                  20 + pick(random, 60), pick(random, 20), pick(random, 2) == 0);
    driver->delay_maps(pick(random, 2) == 0 ? 0 : static_cast<unsigned>(pick(random, 100)));
    std::atomic<bool> stop{false};
    std::thread observer([&] {
      Random local(seed + 1);
      while (!stop.load()) {
        const vmalloc::PoolStats pool = memory.stats().pool;
        require(pool.num_created == pool.num_free + pool.num_in_use + pool.num_retired,
                "created == free + in_use + retired does not hold");
        memory.check_invariants();
        if (pick(local, 20) == 0) static_cast<void>(memory.trim(0));
        if (pick(local, 20) == 0) static_cast<void>(memory.try_create_spare(pick(local, 40)));
        if (pick(local, 20) == 0) memory.resize(20 + pick(local, 60));
        jitter(local);
      }
    });
    std::thread other([&] { use_elastic_rows(memory, *inner, kernels, 0, seed + 2); });
    use_elastic_rows(memory, *inner, kernels, kElasticRows, seed + 3);
    other.join();
    stop = true;
    observer.join();
    memory.check_invariants();
    if (seed % 2 == 0) memory.close();
  }
  require(inner->counters().create_calls == inner->counters().destroy_calls, "a page leaked");
}

void run_thread_pool_round(unsigned seed) {
  Random random(seed);
  vmalloc::set_num_threads(1 + pick(random, 4));
  // Two callers at once: one gets the workers, the other runs alone.
  const auto caller = [](unsigned caller_seed) {
    Random local(caller_seed);
    std::optional<vmalloc::AwakeWorkers> awake;
    for (int i = 0; i < 20; ++i) {
      if (pick(local, 4) == 0) {
        awake.reset();
        if (pick(local, 2) == 0) awake.emplace();
      }
      std::vector<std::atomic<int>> done(pick(local, 50));
      auto body = [&](std::size_t task, std::size_t) { ++done[task]; };
      vmalloc::parallel_for(done.size(), 1 + pick(local, 5), body);
      for (const auto& count : done) require(count == 1, "a task did not run exactly once");
      jitter(local);
    }
  };
  std::thread other(caller, seed + 1);
  caller(seed + 2);
  other.join();
}

// Products by several threads and by one have the same bits; what they read ends where the rows do.
void run_linear_round(unsigned seed) {
  Random random(seed);
  const auto num_rows = static_cast<std::int64_t>(1 + pick(random, 40));
  const auto in_features = static_cast<std::int64_t>(1 + pick(random, 300));
  const auto out_features = static_cast<std::int64_t>(1 + pick(random, 400));
  const auto values = [&](std::int64_t rows, std::int64_t columns) {
    std::vector<float> result(static_cast<std::size_t>(rows * columns));
    for (float& value : result) value = static_cast<float>(random() % 1000) / 500.0F - 1.0F;
    return result;
  };
  const std::vector<float> x = values(num_rows, in_features);
  const std::vector<float> gate = values(out_features, in_features);
  const std::vector<float> up = values(out_features, in_features);
  const std::vector<float> bias = values(out_features, 1);
  const auto products = [&](std::size_t threads) {
    vmalloc::set_num_threads(threads);
    std::vector<float> outs[] = {values(num_rows, out_features), values(num_rows, out_features)};
    vmalloc::LinearCall calls[2];
    for (int i = 0; i < 2; ++i) {
      calls[i].x = x.data();
      calls[i].x_stride = in_features;
      calls[i].weight = {gate.data(), in_features, bias.data(), out_features, in_features};
      calls[i].up = {up.data(), in_features, nullptr, out_features, in_features};
      calls[i].out = outs[i].data();
      calls[i].out_stride = out_features;
    }
    calls[1].epilogue = vmalloc::LinearEpilogue::kSiluGate;
    vmalloc::linear(calls, 2, num_rows);
    outs[0].insert(outs[0].end(), outs[1].begin(), outs[1].end());
    return outs[0];
  };
  require(products(1) == products(2 + pick(random, 4)), "threads changed a product's bits");
}

}  // namespace

int main(int argc, char** argv) {
  unsigned num_rounds = 100;
  std::string library;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--rounds") == 0) {
      num_rounds = static_cast<unsigned>(std::strtoul(argv[i + 1], nullptr, 10));
    } else if (std::strcmp(argv[i], "--cuda") == 0) {
      library = argv[i + 1];
    } else {
      argc = 0;
    }
  }
  if (argc % 2 == 0) {
    std::fprintf(stderr, "usage: core_stress [--rounds N] [--cuda LIBRARY]\n");
    return 2;
  }
  const Kernels kernels(library);
  for (unsigned round = 0; round < num_rounds; ++round) {
    run_arena_round(kernels, round);
    run_elastic_round(kernels, round);
    run_thread_pool_round(round);
    run_linear_round(round);
  }
  std::printf("stress: %u rounds passed\n", num_rounds);
  return 0;
}
