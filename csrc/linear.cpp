// linear.cpp: cuts products into chunks, a share for each thread, and runs them.
// Owns: per calling thread, the plan's memory, which only grows.  Thread-safety: see linear.h.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu_isa.h"
#include "linear_check.h"
#include "linear_kernel.h"
#include "thread_pool.h"

namespace vmalloc {
namespace {

constexpr std::size_t kMaxShares = 64;
// About ten microseconds of one core; below, a second one costs more than it gains.
constexpr std::int64_t kWorthSharing = 1 << 19;
// Reading a weight costs as much as multiplying it with this many rows.
constexpr std::int64_t kRowsPerRead = 4;

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

bool is_gate(const LinearCall& call) {
  return call.epilogue == LinearEpilogue::kSiluGate || call.epilogue == LinearEpilogue::kGeluGate;
}

std::int64_t cost_of(const LinearCall& call, std::int64_t num_rows) {
  const std::int64_t weights = call.weight.out_features * call.weight.in_features;
  return weights * (is_gate(call) ? 2 : 1) * (num_rows + kRowsPerRead);
}

// One call's chunks: by columns first, so that the rows that use a weight follow each other.
struct CallPlan {
  const LinearCall* call;
  std::int64_t rows_per_chunk;
  std::int64_t columns_per_chunk;
  std::int64_t chunks_per_column;
  std::int64_t first_chunk;
  std::int64_t end_chunk;
  std::int64_t chunk_cost;
};

CallPlan plan_of(const LinearCall& call, std::int64_t num_rows, std::int64_t threads,
                 std::int64_t first_chunk) {
  CallPlan plan;
  plan.call = &call;
  plan.chunks_per_column = divided_up(num_rows, kChunkRows);
  plan.rows_per_chunk = divided_up(num_rows, plan.chunks_per_column);
  // As many chunks for each thread, of nearly equal size.
  const std::int64_t columns = call.weight.out_features;
  const std::int64_t pieces = threads * divided_up(columns, threads * kChunkColumns);
  plan.columns_per_chunk =
      divided_up(divided_up(columns, pieces), kColumnMultiple) * kColumnMultiple;
  const std::int64_t chunks = divided_up(columns, plan.columns_per_chunk) * plan.chunks_per_column;
  plan.first_chunk = first_chunk;
  plan.end_chunk = first_chunk + chunks;
  plan.chunk_cost = std::max<std::int64_t>(1, cost_of(call, num_rows) / chunks);
  return plan;
}

LinearChunk chunk_of(const CallPlan& plan, std::int64_t index, std::int64_t num_rows) {
  const std::int64_t in_call = index - plan.first_chunk;
  LinearChunk chunk;
  chunk.first_row = in_call % plan.chunks_per_column * plan.rows_per_chunk;
  chunk.num_rows = std::min(plan.rows_per_chunk, num_rows - chunk.first_row);
  chunk.first_column = in_call / plan.chunks_per_column * plan.columns_per_chunk;
  chunk.num_columns =
      std::min(plan.columns_per_chunk, plan.call->weight.out_features - chunk.first_column);
  return chunk;
}

// Consecutive chunks that nobody has taken yet. The owner takes the first, so that it walks memory
// in address order; the others help from the end.
class alignas(64) Share {
 public:
  void set(std::int64_t first, std::int64_t end) {
    left_.store(packed(first, end), std::memory_order_relaxed);
  }

  // The chunk's index, or -1.
  std::int64_t take(bool is_owner) {
    std::uint64_t left = left_.load(std::memory_order_relaxed);
    for (;;) {
      const auto first = static_cast<std::int64_t>(left >> 32);
      const auto end = static_cast<std::int64_t>(left & 0xffffffffU);
      if (first >= end) return -1;
      const std::uint64_t rest = is_owner ? packed(first + 1, end) : packed(first, end - 1);
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        return is_owner ? first : end - 1;
      }
    }
  }

 private:
  static std::uint64_t packed(std::int64_t first, std::int64_t end) {
    return static_cast<std::uint64_t>(first) << 32 | static_cast<std::uint64_t>(end);
  }

  std::atomic<std::uint64_t> left_{0};
};

LinearKernel kernel() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kLinearAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kLinearAvx2;
#endif
  return kLinearPortable;
}

class Run {
 public:
  Run(const std::vector<CallPlan>& plans, std::int64_t num_rows, std::size_t num_shares)
      : plans_(plans), num_rows_(num_rows), num_shares_(num_shares), kernel_(kernel()) {
    std::int64_t total = 0;
    for (const CallPlan& plan : plans)
      total += (plan.end_chunk - plan.first_chunk) * plan.chunk_cost;
    std::int64_t first = 0;
    for (std::size_t i = 0; i < num_shares; ++i) {
      const auto done = static_cast<std::int64_t>(i) + 1;
      const std::int64_t end = chunks_within(total * done / static_cast<std::int64_t>(num_shares));
      shares_[i].set(first, end);
      first = end;
    }
  }

  // Compute share `index`, then what others have left.
  void run_share(std::size_t index) {
    for (std::size_t i = 0; i < num_shares_; ++i) {
      Share& share = shares_[(index + i) % num_shares_];
      for (;;) {
        const std::int64_t chunk = share.take(i == 0);
        if (chunk < 0) break;
        run_chunk(chunk);
      }
    }
  }

 private:
  // How many of the first chunks cost no more than `cost` and half a chunk.
  std::int64_t chunks_within(std::int64_t cost) const {
    for (const CallPlan& plan : plans_) {
      const std::int64_t chunks = plan.end_chunk - plan.first_chunk;
      if (cost < chunks * plan.chunk_cost) {
        return plan.first_chunk + std::min(chunks, (cost + plan.chunk_cost / 2) / plan.chunk_cost);
      }
      cost -= chunks * plan.chunk_cost;
    }
    return plans_.back().end_chunk;
  }

  void run_chunk(std::int64_t index) const {
    const CallPlan* plan = plans_.data();
    while (index >= plan->end_chunk) ++plan;
    kernel_(*plan->call, chunk_of(*plan, index, num_rows_));
  }

  const std::vector<CallPlan>& plans_;
  std::int64_t num_rows_;
  std::size_t num_shares_;
  LinearKernel kernel_;
  Share shares_[kMaxShares];
};

}  // namespace

void linear(const LinearCall* calls, std::size_t num_calls, std::int64_t num_rows) {
  check_linear(calls, num_calls, num_rows);
  if (num_rows == 0 || num_calls == 0) return;
  std::int64_t cost = 0;
  for (std::size_t i = 0; i < num_calls; ++i) cost += cost_of(calls[i], num_rows);
  const std::size_t shares = cost < kWorthSharing ? 1 : std::min(num_threads(), kMaxShares);

  thread_local std::vector<CallPlan> plans;
  plans.clear();
  for (std::size_t i = 0; i < num_calls; ++i) {
    plans.push_back(plan_of(calls[i], num_rows, static_cast<std::int64_t>(shares),
                            i == 0 ? 0 : plans.back().end_chunk));
  }
  Run run(plans, num_rows, shares);
  auto body = [&run](std::size_t share, std::size_t) { run.run_share(share); };
  parallel_for(shares, shares, body);
}

}  // namespace vmalloc
