// attention_kernel.h: the seam between the attention driver and its per-instruction-set kernels.
// Owns: nothing.  Thread-safety: plain values; a kernel may run on many threads at once.
//
// Included by sources compiled for instruction sets that the machine may lack, so nothing here and
// nothing it includes may emit a function with external linkage: the linker keeps any one copy.
#pragma once

#include <cstdint>

#include "attention_cpu.h"

namespace vmalloc {

// Keys are taken in tiles that start at multiples of this, whatever the query: a row's arithmetic
// depends on its position alone.
constexpr int kTileKeys = 64;
// Most query rows that share one pass over a key tile's registers.
constexpr int kBlockRows = 6;

/// Consecutive queries of one sequence over some of its KV heads; one thread runs it.
struct AttentionTask {
  std::int64_t first_packed_row;  // of query and out
  std::int64_t num_positions;
  std::int64_t first_position;  // in the sequence, of the first query
  std::int64_t slot;
  const std::int32_t* blocks;  // its sequence's row of the block table, if there is one
  std::int64_t first_kv_head;
  std::int64_t num_kv_heads;
  std::int64_t cost;                    // comparable between tasks of one call
  const AttentionTask* next = nullptr;  // what its thread will likely run after it, or null
};

/// The row of sequence `index` in the block table; null where it has no entries.
static inline const std::int32_t* blocks_of(const VarlenBatch& batch, std::int64_t index) {
  return batch.max_blocks > 0 ? batch.block_table + index * batch.block_table_stride : nullptr;
}

/// Where a task keeps what it computes; all offsets count floats from one 64-byte-aligned block.
struct ScratchLayout {
  std::int64_t keys;      // [k_head_dim][kTileKeys]
  std::int64_t values;    // [kTileKeys][v_stride]
  std::int64_t scores;    // [kBlockRows][kTileKeys]
  std::int64_t out;       // [rows][v_stride]
  std::int64_t query;     // [rows][k_head_dim]
  std::int64_t maximum;   // [rows]
  std::int64_t total;     // [rows]
  std::int64_t v_stride;  // v_head_dim rounded up to whole vectors
  std::int64_t size;
};

static inline ScratchLayout scratch_layout(std::int64_t rows, std::int64_t k_head_dim,
                                           std::int64_t v_head_dim) {
  ScratchLayout layout;
  layout.v_stride = (v_head_dim + 15) / 16 * 16;
  layout.keys = 0;
  layout.values = layout.keys + k_head_dim * kTileKeys;
  layout.scores = layout.values + kTileKeys * layout.v_stride;
  layout.out = layout.scores + kBlockRows * kTileKeys;
  layout.query = layout.out + rows * layout.v_stride;
  layout.maximum = layout.query + rows * k_head_dim;
  layout.total = layout.maximum + rows;
  layout.size = (layout.total + rows + 15) / 16 * 16;
  return layout;
}

struct AttentionKernel {
  using Run = void (*)(const AttentionArgs& args, const AttentionTask& task, float* scratch);
  struct Runs {
    Run float32;
    Run bfloat16;
  };
  Runs contiguous;
  Runs block_table;
};

extern const AttentionKernel kAttentionPortable;
extern const AttentionKernel kAttentionAvx2;
extern const AttentionKernel kAttentionAvx512;

}  // namespace vmalloc
