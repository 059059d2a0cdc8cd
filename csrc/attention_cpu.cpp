// attention_cpu.cpp: cuts a checked batch into tasks and hands them to the best kernel.
// Owns: per calling thread, scratch memory that only grows.  Thread-safety: see attention_cpu.h.
#include "attention_cpu.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention_check.h"
#include "attention_kernel.h"
#include "cpu_isa.h"
#include "thread_pool.h"

namespace vmalloc {
namespace {

// Rows of one prefill task: enough to pay for transposing each K tile once, few enough that queries
// and sums stay in the second-level cache.
constexpr std::int64_t kTaskRows = 96;
// Below this many multiply-adds (some 20 microseconds) waking a worker costs more than it gains.
constexpr std::int64_t kWorthSharing = 1 << 20;
constexpr std::size_t kAppendBytesWorthSharing = 1 << 18;
constexpr std::int64_t kTasksPerThread = 4;

struct FreeDeleter {
  void operator()(float* memory) const { std::free(memory); }
};

// Zeroed 64-byte-aligned floats, kept for the thread's next call.
class Scratch {
 public:
  float* reserve(std::size_t floats) {
    if (floats > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const std::size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      std::memset(memory_.get(), 0, bytes);
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float, FreeDeleter> memory_;
  std::size_t capacity_ = 0;
};

// Keys that queries at positions [first, first + count) see, summed over them.
std::int64_t visible_keys(const AttentionArgs& args, std::int64_t first, std::int64_t count) {
  const std::int64_t mean = first + (count + 1) / 2;
  const std::int64_t seen = args.window_left >= 0 ? std::min(mean, args.window_left + 1)
                                                  : std::max<std::int64_t>(mean, 1);
  return seen * count;
}

// Consecutive KV heads that share a task. All of them where there are sequences enough: then a
// decode step walks memory in address order.
std::int64_t heads_per_task(const AttentionArgs& args, std::int64_t threads, std::int64_t cost,
                            std::int64_t total_cost) {
  if (threads <= 1 || cost <= 0) return args.num_kv_heads;
  const std::int64_t fair = total_cost / (threads * kTasksPerThread);
  return std::clamp<std::int64_t>(args.num_kv_heads * fair / cost, 1, args.num_kv_heads);
}

void add_sequence_tasks(const AttentionArgs& args, std::int64_t index, std::int64_t threads,
                        std::int64_t total_cost, std::vector<AttentionTask>* tasks) {
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  const std::int64_t first_row = args.batch.cu_seqlens_q[index];
  const std::int64_t q_len = args.batch.cu_seqlens_q[index + 1] - first_row;
  const std::int64_t cached = args.batch.seqused_k[index] - q_len;
  const bool is_decode = q_len * group <= kTaskRows / 4;
  const std::int64_t positions = is_decode ? q_len : std::max<std::int64_t>(1, kTaskRows / group);
  const std::int64_t cost = visible_keys(args, cached, q_len) * args.num_heads;
  const std::int64_t heads = is_decode ? heads_per_task(args, threads, cost, total_cost) : 1;
  for (std::int64_t from = 0; from < q_len; from += positions) {
    for (std::int64_t head = 0; head < args.num_kv_heads; head += heads) {
      AttentionTask task;
      task.first_packed_row = first_row + from;
      task.num_positions = std::min(positions, q_len - from);
      task.first_position = cached + from;
      task.slot = args.batch.cache_batch_idx[index];
      task.blocks = blocks_of(args.batch, index);
      task.first_kv_head = head;
      task.num_kv_heads = std::min(heads, args.num_kv_heads - head);
      task.cost = visible_keys(args, task.first_position, task.num_positions) * task.num_kv_heads;
      tasks->push_back(task);
    }
  }
}

std::int64_t total_cost(const AttentionArgs& args) {
  std::int64_t cost = 0;
  for (std::int64_t i = 0; i < args.batch.batch; ++i) {
    const std::int64_t q_len = args.batch.cu_seqlens_q[i + 1] - args.batch.cu_seqlens_q[i];
    cost += visible_keys(args, args.batch.seqused_k[i] - q_len, q_len) * args.num_heads;
  }
  return cost;
}

void zero_padding_rows(const AttentionArgs& args) {
  const std::int64_t element = args.dtype == AttentionDtype::kFloat32 ? 4 : 2;
  const VarlenBatch& batch = args.batch;
  for (std::int64_t row = batch.batch > 0 ? batch.cu_seqlens_q[batch.batch] : 0;
       row < batch.total_q; ++row) {
    for (std::int64_t head = 0; head < args.num_heads; ++head) {
      const std::int64_t offset = row * args.out.token_stride + head * args.out.head_stride;
      std::memset(static_cast<char*>(args.out.data) + offset * element, 0,
                  static_cast<std::size_t>(args.v_head_dim * element));
    }
  }
}

const AttentionKernel& kernel() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAvx512) return kAttentionAvx512;
  if (cpu_isa() == CpuIsa::kAvx2) return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

char* cache_row(const CacheRows& cache, std::int64_t slot, std::int64_t row, std::int64_t element) {
  return static_cast<char*>(cache.data) +
         (slot * cache.slot_stride + row * cache.row_stride) * element;
}

void append_token(const AppendArgs& args, std::int64_t packed_row, std::int64_t slot,
                  std::int64_t row) {
  const auto copy = [&](const PackedRows& from, const CacheRows& to, std::int64_t head_dim) {
    const std::int64_t element = args.element_bytes;
    const auto bytes = static_cast<std::size_t>(head_dim * element);
    const char* source =
        static_cast<const char*>(from.data) + packed_row * from.token_stride * element;
    char* target = cache_row(to, slot, row, element);
    if (from.head_stride == head_dim && to.head_stride == head_dim) {
      std::memcpy(target, source, bytes * static_cast<std::size_t>(args.num_kv_heads));
      return;
    }
    for (std::int64_t head = 0; head < args.num_kv_heads; ++head) {
      std::memcpy(target + head * to.head_stride * element,
                  source + head * from.head_stride * element, bytes);
    }
  };
  copy(args.key, args.k_cache, args.k_head_dim);
  copy(args.value, args.v_cache, args.v_head_dim);
}

}  // namespace

const char* attention_isa() { return cpu_isa_name(cpu_isa()); }

void varlen_attention(const AttentionArgs& args) {
  check_args(args);
  const AttentionKernel::Runs& runs =
      args.batch.by_block_table ? kernel().block_table : kernel().contiguous;
  const AttentionKernel::Run run =
      args.dtype == AttentionDtype::kFloat32 ? runs.float32 : runs.bfloat16;
  zero_padding_rows(args);
  const std::int64_t cost = total_cost(args);
  const bool worth_sharing = cost * (args.k_head_dim + args.v_head_dim) >= kWorthSharing;
  const std::size_t threads = worth_sharing ? num_threads() : 1;

  thread_local std::vector<AttentionTask> tasks;
  tasks.clear();
  for (std::int64_t i = 0; i < args.batch.batch; ++i) {
    add_sequence_tasks(args, i, static_cast<std::int64_t>(threads), cost, &tasks);
  }
  if (tasks.empty()) return;
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  std::int64_t most_rows = 0;
  for (const AttentionTask& task : tasks) {
    most_rows = std::max(most_rows, task.num_positions * group * task.num_kv_heads);
  }
  if (threads > 1) {
    // The longest first, so that no thread ends up alone with one of them.
    std::sort(tasks.begin(), tasks.end(),
              [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
  }
  const std::size_t participants = std::min(threads, tasks.size());
  for (std::size_t i = 0; i + participants < tasks.size(); ++i) {
    tasks[i].next = &tasks[i + participants];
  }
  const auto floats =
      static_cast<std::size_t>(scratch_layout(most_rows, args.k_head_dim, args.v_head_dim).size);
  thread_local Scratch scratch;
  float* memory = scratch.reserve(floats * participants);
  const AttentionTask* claimed = tasks.data();
  auto body = [&args, run, floats, memory, claimed](std::size_t task, std::size_t worker) {
    run(args, claimed[task], memory + worker * floats);
  };
  parallel_for(tasks.size(), participants, body);
}

void append_kv(const AppendArgs& args) {
  check_batch(args.batch);
  const VarlenBatch& batch = args.batch;
  auto append = [&args, &batch](std::size_t task, std::size_t) {
    const auto index = static_cast<std::int64_t>(task);
    const std::int64_t first = batch.cu_seqlens_q[index];
    const std::int64_t end = batch.cu_seqlens_q[index + 1];
    const std::int64_t shift = batch.seqused_k[index] - end;  // packed row -> cache row
    const std::int32_t* blocks = blocks_of(batch, index);
    for (std::int64_t packed = first; packed < end; ++packed) {
      const std::int64_t row = packed + shift;
      if (!batch.by_block_table) {
        append_token(args, packed, batch.cache_batch_idx[index], row);
      } else {
        append_token(args, packed, blocks[row / batch.num_rows], row % batch.num_rows);
      }
    }
  };
  const std::int64_t new_rows = batch.batch > 0 ? batch.cu_seqlens_q[batch.batch] : 0;
  const auto bytes = static_cast<std::size_t>(
      new_rows * args.num_kv_heads * (args.k_head_dim + args.v_head_dim) * args.element_bytes);
  const std::size_t threads = bytes >= kAppendBytesWorthSharing ? num_threads() : 1;
  parallel_for(static_cast<std::size_t>(batch.batch), threads, append);
}

}  // namespace vmalloc
