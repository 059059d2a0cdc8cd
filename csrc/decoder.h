// decoder.h: the forward pass of a llama-like decoder over packed rows, in float32 on the CPU.
// Owns: `Decoder` its scratch memory, which only grows; callers own weights, cache and logits.
// Thread-safety: one forward pass at a time per Decoder; other decoders may run on other threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention_cpu.h"
#include "decoder_rows.h"
#include "linear.h"

namespace vmalloc {

/// Cosines and sines of the rotary embedding: `[num_rows][2][half]`, a row for each position.
struct RopeTable {
  const float* values = nullptr;
  std::int64_t num_rows = 0;
  std::int64_t half = 0;  // the first 2 * half elements of a head are rotated
};

struct DecoderLayer {
  RowNorm before_attention;
  RowNorm after_attention;  // of its result, before that is added to the hidden row
  RowNorm before_mlp;
  RowNorm after_mlp;
  RowNorm query_norm;  // before the rotation, see DecoderModel::norms_whole_rows
  RowNorm key_norm;
  LinearWeight query;
  LinearWeight key;
  LinearWeight value;
  LinearWeight output;
  LinearWeight gate;
  LinearWeight up;
  LinearWeight down;
  float softmax_scale = 0.0F;
  float softcap = 0.0F;           // 0: off
  std::int64_t window_left = -1;  // -1: all keys
  std::int64_t rope_idx = -1;     // into DecoderModel::ropes; -1: none
};

/// What a forward pass computes; addresses stay the caller's.
struct DecoderModel {
  std::int64_t hidden_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  const float* embedding = nullptr;  // [vocab_size][hidden_size]
  std::int64_t vocab_size = 0;       // of the embedding
  float embedding_multiplier = 1.0F;
  float residual_multiplier = 1.0F;  // of what attention and MLP add to the hidden row
  LinearEpilogue activation = LinearEpilogue::kSiluGate;  // or kGeluGate
  bool norms_whole_rows = false;  // query_norm and key_norm over all heads, not over each
  RowNorm final_norm;
  LinearWeight head;
  float logit_multiplier = 1.0F;
  float logit_softcap = 0.0F;  // 0: off
  std::vector<RopeTable> ropes;
  std::vector<DecoderLayer> layers;
};

/// K and V of every layer, as `VarlenBatch` addresses them.
struct DecoderCache {
  struct Layer {
    CacheRows k;
    CacheRows v;
  };
  std::vector<Layer> layers;
  std::int64_t num_slots = 0;  // or blocks
  std::int64_t num_rows = 0;   // of a slot, or of a block
};

/// One step's input.
struct DecoderBatch {
  const std::int64_t* token_ids = nullptr;  // [varlen.total_q]
  const std::int64_t* positions = nullptr;  // [varlen.total_q]
  const std::int64_t* rows = nullptr;       // [num_rows], those whose logits are wanted, ascending
  std::int64_t num_rows = 0;
  VarlenBatch varlen;  // without padding: cu_seqlens_q ends with total_q
};

class Decoder {
 public:
  /// Throws ConfigError on shapes that do not fit each other or that attention cannot run.
  explicit Decoder(DecoderModel model);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  /// Compute the batch: write its K and V to the cache, and `logits`,
  /// `[num_rows][head.out_features]`.
  ///
  /// A row's logits are the same to the last bit whatever else the batch holds, however its
  /// sequence is cut into calls and whatever the number of threads (on one instruction set).
  /// Throws ConfigError, with nothing written, on a token id, position, row or index out of range.
  void forward(const DecoderCache& cache, const DecoderBatch& batch, float* logits);

  [[nodiscard]] std::size_t scratch_bytes() const;

 private:
  class Pass;  // one forward pass, see decoder.cpp
  struct Scratch;

  DecoderModel model_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace vmalloc
