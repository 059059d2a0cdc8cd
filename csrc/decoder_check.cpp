// decoder_check.cpp: refuses what a decoder cannot compute, by name and limit.
// Owns: nothing.  Thread-safety: pure functions.
#include "decoder_check.h"

#include <string>

#include "attention_check.h"
#include "error.h"

namespace vmalloc {
namespace {

[[noreturn]] void fail(const std::string& what, std::int64_t value, const std::string& limit) {
  throw ConfigError(what + " is " + std::to_string(value) + ", must be " + limit);
}

std::string below(std::int64_t limit) { return "in [0, " + std::to_string(limit - 1) + "]"; }

void check_at_least_one(const char* name, std::int64_t value) {
  if (value < 1) fail(name, value, "at least 1");
}

void check_weight(const std::string& name, const LinearWeight& weight, std::int64_t out_features,
                  std::int64_t in_features) {
  if (weight.data == nullptr) throw ConfigError(name + " has no weight");
  if (weight.out_features != out_features) {
    fail(name + ".out_features", weight.out_features, std::to_string(out_features));
  }
  if (weight.in_features != in_features) {
    fail(name + ".in_features", weight.in_features, std::to_string(in_features));
  }
  if (weight.row_stride < in_features) {
    fail(name + ".row_stride", weight.row_stride, "at least " + std::to_string(in_features));
  }
}

void check_layer(const DecoderModel& model, std::size_t layer_idx) {
  const DecoderLayer& layer = model.layers[layer_idx];
  const std::string where = "layers[" + std::to_string(layer_idx) + "].";
  const std::int64_t query_size = model.num_heads * model.head_dim;
  const std::int64_t kv_size = model.num_kv_heads * model.head_dim;
  check_weight(where + "query", layer.query, query_size, model.hidden_size);
  check_weight(where + "key", layer.key, kv_size, model.hidden_size);
  check_weight(where + "value", layer.value, kv_size, model.hidden_size);
  check_weight(where + "output", layer.output, model.hidden_size, query_size);
  const std::int64_t width = layer.gate.out_features;
  check_at_least_one((where + "gate.out_features").c_str(), width);
  check_weight(where + "gate", layer.gate, width, model.hidden_size);
  check_weight(where + "up", layer.up, width, model.hidden_size);
  check_weight(where + "down", layer.down, model.hidden_size, width);
  const auto num_ropes = static_cast<std::int64_t>(model.ropes.size());
  if (layer.rope_idx < -1 || layer.rope_idx >= num_ropes) {
    fail(where + "rope_idx", layer.rope_idx, "-1, or " + below(num_ropes));
  }
}

// What attention itself would refuse, over a batch of nothing.
void check_heads(const DecoderModel& model, const DecoderLayer& layer) {
  AttentionArgs args = {};
  args.num_heads = model.num_heads;
  args.num_kv_heads = model.num_kv_heads;
  args.k_head_dim = model.head_dim;
  args.v_head_dim = model.head_dim;
  args.window_left = layer.window_left;
  args.softcap = layer.softcap;
  check_args(args);
}

// The longest sequence that every table of the model has rows for.
std::int64_t num_positions(const DecoderModel& model) {
  std::int64_t limit = INT64_MAX;
  for (const RopeTable& rope : model.ropes) limit = rope.num_rows < limit ? rope.num_rows : limit;
  return limit;
}

}  // namespace

void check_model(const DecoderModel& model) {
  check_at_least_one("hidden_size", model.hidden_size);
  check_at_least_one("vocab_size", model.vocab_size);
  check_at_least_one("layers", static_cast<std::int64_t>(model.layers.size()));
  if (model.embedding == nullptr) throw ConfigError("the embedding has no weight");
  check_at_least_one("head.out_features", model.head.out_features);
  check_weight("head", model.head, model.head.out_features, model.hidden_size);
  if (model.activation != LinearEpilogue::kSiluGate &&
      model.activation != LinearEpilogue::kGeluGate) {
    fail("activation", static_cast<std::int64_t>(model.activation), "a gate");
  }
  for (const RopeTable& rope : model.ropes) {
    if (rope.values == nullptr) throw ConfigError("a rope table has no values");
    if (rope.half < 1 || 2 * rope.half > model.head_dim) {
      fail("half of a rope table", rope.half, "in [1, head_dim / 2]");
    }
  }
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    check_heads(model, model.layers[i]);
    check_layer(model, i);
  }
}

void check_batch(const DecoderModel& model, const DecoderCache& cache, const DecoderBatch& batch) {
  if (cache.layers.size() != model.layers.size()) {
    fail("layers of the cache", static_cast<std::int64_t>(cache.layers.size()),
         std::to_string(model.layers.size()));
  }
  check_batch(batch.varlen);
  const std::int64_t total = batch.varlen.total_q;
  const std::int64_t end =
      batch.varlen.batch > 0 ? batch.varlen.cu_seqlens_q[batch.varlen.batch] : 0;
  if (end != total) fail("total_q", total, std::to_string(end) + ": there is no padding");
  const std::int64_t positions = num_positions(model);
  for (std::int64_t i = 0; i < total; ++i) {
    if (batch.token_ids[i] < 0 || batch.token_ids[i] >= model.vocab_size) {
      fail("token_ids[" + std::to_string(i) + "]", batch.token_ids[i], below(model.vocab_size));
    }
    if (batch.positions[i] < 0 || batch.positions[i] >= positions) {
      fail("positions[" + std::to_string(i) + "]", batch.positions[i], below(positions));
    }
  }
  for (std::int64_t i = 0; i < batch.num_rows; ++i) {
    if (batch.rows[i] < 0 || batch.rows[i] >= total) {
      fail("rows[" + std::to_string(i) + "]", batch.rows[i], below(total));
    }
    if (i > 0 && batch.rows[i] <= batch.rows[i - 1]) {
      fail("rows[" + std::to_string(i) + "]", batch.rows[i],
           "above the one before it, " + std::to_string(batch.rows[i - 1]));
    }
  }
}

}  // namespace vmalloc
