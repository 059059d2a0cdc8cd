// attention_cpu.h: causal attention and cache writes in CPU memory, by slot or by block table.
// Owns: nothing; callers own all memory.  Thread-safety: every function, from any thread, as long
// as no call writes rows that another one reads.
#pragma once

#include <cstdint>

namespace vmalloc {

constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kHeadDimMultiple = 8;

enum class AttentionDtype : std::int32_t { kFloat32 = 0, kBFloat16 = 1 };

/// Packed rows `[total_q, heads, head_dim]`; strides count elements, head_dim is contiguous.
struct PackedRows {
  void* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
};

/// K or V of one layer, `[num_slots, num_rows, num_kv_heads, head_dim]`; strides count elements.
/// With a block table: `[num_blocks, block_size, num_kv_heads, head_dim]`.
struct CacheRows {
  void* data;
  std::int64_t slot_stride;  // or of blocks
  std::int64_t row_stride;
  std::int64_t head_stride;
};

/// Where a packed batch lies. Sequence i is packed rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]); its
/// tokens are rows [0, seqused_k[i]) of slot cache_batch_idx[i], the new ones last.
/// With a block table, row j is row j % num_rows of block block_table[i][j / num_rows] instead and
/// cache_batch_idx means nothing; entries past the sequence's last row are never read.
/// Packed rows past cu_seqlens_q[batch] are padding.
struct VarlenBatch {
  const std::int32_t* cu_seqlens_q;     // [batch + 1]
  const std::int32_t* seqused_k;        // [batch]
  const std::int32_t* cache_batch_idx;  // [batch]
  std::int64_t batch;
  std::int64_t total_q;
  std::int64_t num_slots;           // or blocks
  std::int64_t num_rows;            // of a slot, or of a block
  bool by_block_table;              // else the rest is 0
  const std::int32_t* block_table;  // [batch][max_blocks]; null where it has no entries
  std::int64_t block_table_stride;  // entries from one sequence's to the next one's
  std::int64_t max_blocks;
};

struct AttentionArgs {
  AttentionDtype dtype;  // of query, out, k_cache and v_cache
  PackedRows query;
  PackedRows out;
  CacheRows k_cache;
  CacheRows v_cache;
  VarlenBatch batch;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t k_head_dim;
  std::int64_t v_head_dim;
  float softmax_scale;
  std::int64_t window_left;  // keys before its own that a query sees; -1: all
  float softcap;             // scores become softcap * tanh(score / softcap); 0: off
  const float* sinks;        // [num_heads] extra logit in each head's denominator, or null
};

struct AppendArgs {
  std::int64_t element_bytes;
  PackedRows key;
  PackedRows value;
  CacheRows k_cache;
  CacheRows v_cache;
  VarlenBatch batch;
  std::int64_t num_kv_heads;
  std::int64_t k_head_dim;
  std::int64_t v_head_dim;
};

/// Attend each query to the rows of its own sequence up to its own position; padding rows give 0.
///
/// A row's result is the same to the last bit whatever else the batch holds, however the sequence
/// is cut into calls, whatever the slot or blocks and the number of threads (on one instruction
/// set). Reads rows [0, seqused_k) only. Throws ConfigError on shapes it cannot run and on an index
/// out of range.
void varlen_attention(const AttentionArgs& args);

/// Copy the packed new rows to rows [seqused_k - q_len, seqused_k) of their sequences.
/// Requires: no row twice.  Throws ConfigError as above, before anything is written.
void append_kv(const AppendArgs& args);

/// The instruction set in use: "portable", "avx2" or "avx512". The environment variable
/// VMALLOC_CPU_ISA, read once, forces a lower one.  Throws ConfigError if it names none of them.
[[nodiscard]] const char* attention_isa();

}  // namespace vmalloc
