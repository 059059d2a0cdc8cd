// attention_check.cpp: refuses what attention and cache writes cannot run, by name and limit.
// Owns: nothing.  Thread-safety: pure functions.
#include "attention_check.h"

#include <string>

#include "attention_kernel.h"
#include "error.h"

namespace vmalloc {
namespace {

[[noreturn]] void fail(const std::string& what, std::int64_t value, const std::string& limit) {
  throw ConfigError(what + " is " + std::to_string(value) + ", must be " + limit);
}

std::string between(std::int64_t low, std::int64_t high) {
  return "in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
}

// The table entries that hold rows of sequence `index`, and no others.
void check_blocks(const VarlenBatch& batch, std::int64_t index) {
  const std::int32_t* blocks = blocks_of(batch, index);
  const std::int64_t used = batch.seqused_k[index];
  for (std::int64_t j = 0; j * batch.num_rows < used; ++j) {
    if (blocks[j] < 0 || blocks[j] >= batch.num_slots) {
      fail("block_table[" + std::to_string(index) + ", " + std::to_string(j) + "]", blocks[j],
           between(0, batch.num_slots - 1));
    }
  }
}

void check_head_dim(const char* name, std::int64_t head_dim) {
  if (head_dim < kHeadDimMultiple || head_dim > kMaxHeadDim || head_dim % kHeadDimMultiple != 0) {
    fail(name, head_dim, "a multiple of 8 " + between(kHeadDimMultiple, kMaxHeadDim));
  }
}

}  // namespace

void check_batch(const VarlenBatch& batch) {
  const std::int32_t* cu = batch.cu_seqlens_q;
  const std::int64_t max_rows =
      batch.by_block_table ? batch.max_blocks * batch.num_rows : batch.num_rows;
  if (batch.batch > 0 && cu[0] != 0) fail("cu_seqlens_q[0]", cu[0], "0");
  for (std::int64_t i = 0; i < batch.batch; ++i) {
    const auto name = [&](const char* of) { return of + ("[" + std::to_string(i) + "]"); };
    const std::int64_t q_len = std::int64_t{cu[i + 1]} - cu[i];
    const std::int64_t used = batch.seqused_k[i];
    const std::int64_t slot = batch.cache_batch_idx[i];
    if (q_len < 0) {
      fail("cu_seqlens_q[" + std::to_string(i + 1) + "]", cu[i + 1],
           "at least the entry before it, " + std::to_string(cu[i]));
    }
    if (used < q_len || used > max_rows) {
      fail(name("seqused_k"), used,
           between(q_len, max_rows) + ": from its new tokens to the rows of " +
               (batch.by_block_table ? "max_blocks blocks" : "a slot"));
    }
    if (batch.by_block_table) {
      check_blocks(batch, i);
    } else if (slot < 0 || slot >= batch.num_slots) {
      fail(name("cache_batch_idx"), slot, between(0, batch.num_slots - 1));
    }
  }
  const std::int64_t last = batch.batch > 0 ? cu[batch.batch] : 0;
  if (last > batch.total_q) {
    fail("cu_seqlens_q[" + std::to_string(batch.batch) + "]", last,
         "at most the packed rows, " + std::to_string(batch.total_q));
  }
}

void check_args(const AttentionArgs& args) {
  check_head_dim("k_head_dim", args.k_head_dim);
  check_head_dim("v_head_dim", args.v_head_dim);
  if (args.num_kv_heads < 1) fail("num_kv_heads", args.num_kv_heads, "at least 1");
  if (args.num_heads < 1 || args.num_heads % args.num_kv_heads != 0) {
    fail("num_heads", args.num_heads,
         "a multiple of num_kv_heads, " + std::to_string(args.num_kv_heads));
  }
  if (args.window_left < -1) {
    fail("window_left", args.window_left, "at least 0, or -1 for no window");
  }
  if (!(args.softcap >= 0.0F)) {
    throw ConfigError("softcap is " + std::to_string(args.softcap) + ", must be at least 0");
  }
  check_batch(args.batch);
}

}  // namespace vmalloc
