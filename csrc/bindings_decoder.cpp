// bindings_decoder.cpp: the fused decoder for Python, addresses and strides as integers.
// Owns: nothing; the Python wrapper keeps the tensors alive.  Thread-safety: releases the GIL.
#include "bindings_decoder.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decoder.h"
#include "error.h"

namespace py = pybind11;

namespace vmalloc {
namespace {

using Address = std::uintptr_t;
using Weight = std::tuple<Address, std::int64_t, Address, std::int64_t, std::int64_t>;
using Norm = std::optional<std::tuple<Address, float, float>>;
using Rope = std::tuple<Address, std::int64_t, std::int64_t>;
using Rows = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
using BlockTable = std::optional<std::tuple<Address, std::int64_t, std::int64_t>>;

template <typename T>
const T* values(Address address) {
  return reinterpret_cast<const T*>(address);
}

LinearWeight linear_weight(const Weight& weight) {
  LinearWeight result;
  result.data = values<float>(std::get<0>(weight));
  result.row_stride = std::get<1>(weight);
  result.bias = values<float>(std::get<2>(weight));
  result.out_features = std::get<3>(weight);
  result.in_features = std::get<4>(weight);
  return result;
}

RowNorm row_norm(const Norm& norm) {
  if (!norm) return {};
  return {values<float>(std::get<0>(*norm)), std::get<1>(*norm), std::get<2>(*norm)};
}

CacheRows cache_rows(const Rows& rows) {
  return {reinterpret_cast<void*>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows),
          std::get<3>(rows)};
}

LinearEpilogue activation_named(const std::string& name) {
  if (name == "silu") return LinearEpilogue::kSiluGate;
  if (name == "gelu_tanh") return LinearEpilogue::kGeluGate;
  throw ConfigError("activation is '" + name + "'; supported: silu, gelu_tanh");
}

void bind_layer(py::module_& m) {
  py::class_<DecoderLayer>(m, "DecoderLayer", "One layer's weights and how it attends.")
      .def(py::init([](const Weight& query, const Weight& key, const Weight& value,
                       const Weight& output, const Weight& gate, const Weight& up,
                       const Weight& down, const Norm& before_attention,
                       const Norm& after_attention, const Norm& before_mlp, const Norm& after_mlp,
                       const Norm& query_norm, const Norm& key_norm, float softmax_scale,
                       float softcap, std::int64_t window_left, std::int64_t rope_idx) {
             DecoderLayer layer;
             layer.query = linear_weight(query);
             layer.key = linear_weight(key);
             layer.value = linear_weight(value);
             layer.output = linear_weight(output);
             layer.gate = linear_weight(gate);
             layer.up = linear_weight(up);
             layer.down = linear_weight(down);
             layer.before_attention = row_norm(before_attention);
             layer.after_attention = row_norm(after_attention);
             layer.before_mlp = row_norm(before_mlp);
             layer.after_mlp = row_norm(after_mlp);
             layer.query_norm = row_norm(query_norm);
             layer.key_norm = row_norm(key_norm);
             layer.softmax_scale = softmax_scale;
             layer.softcap = softcap;
             layer.window_left = window_left;
             layer.rope_idx = rope_idx;
             return layer;
           }),
           py::kw_only(), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("output"),
           py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("before_attention"),
           py::arg("after_attention"), py::arg("before_mlp"), py::arg("after_mlp"),
           py::arg("query_norm"), py::arg("key_norm"), py::arg("softmax_scale"), py::arg("softcap"),
           py::arg("window_left"), py::arg("rope_idx"));
}

void bind_cache(py::module_& m) {
  py::class_<DecoderCache>(m, "DecoderCache", "Where K and V of every layer are.")
      .def(py::init([](const std::vector<std::pair<Rows, Rows>>& layers, std::int64_t num_slots,
                       std::int64_t num_rows) {
             DecoderCache cache;
             for (const auto& [k, v] : layers) {
               cache.layers.push_back({cache_rows(k), cache_rows(v)});
             }
             cache.num_slots = num_slots;
             cache.num_rows = num_rows;
             return cache;
           }),
           py::kw_only(), py::arg("layers"), py::arg("num_slots"), py::arg("num_rows"));
}

void forward(Decoder& decoder, const DecoderCache& cache, Address token_ids, Address positions,
             std::int64_t num_tokens, Address rows, std::int64_t num_rows, Address cu_seqlens_q,
             Address seqused_k, Address cache_batch_idx, const BlockTable& block_table,
             std::int64_t num_seqs, Address logits) {
  DecoderBatch batch;
  batch.token_ids = values<std::int64_t>(token_ids);
  batch.positions = values<std::int64_t>(positions);
  batch.rows = values<std::int64_t>(rows);
  batch.num_rows = num_rows;
  VarlenBatch& varlen = batch.varlen;
  varlen = {};
  varlen.cu_seqlens_q = values<std::int32_t>(cu_seqlens_q);
  varlen.seqused_k = values<std::int32_t>(seqused_k);
  varlen.cache_batch_idx = values<std::int32_t>(cache_batch_idx);
  varlen.batch = num_seqs;
  varlen.total_q = num_tokens;
  varlen.num_slots = cache.num_slots;
  varlen.num_rows = cache.num_rows;
  if (block_table) {
    varlen.by_block_table = true;
    varlen.block_table = values<std::int32_t>(std::get<0>(*block_table));
    varlen.block_table_stride = std::get<1>(*block_table);
    varlen.max_blocks = std::get<2>(*block_table);
  }
  const py::gil_scoped_release release;
  decoder.forward(cache, batch, reinterpret_cast<float*>(logits));
}

}  // namespace

void bind_decoder(py::module_& m) {
  bind_layer(m);
  bind_cache(m);
  py::class_<Decoder>(m, "Decoder", "Forward passes of a llama-like decoder in float32.")
      .def(py::init([](std::vector<DecoderLayer> layers, const std::vector<Rope>& ropes,
                       std::int64_t hidden_size, std::int64_t num_heads, std::int64_t num_kv_heads,
                       std::int64_t head_dim, Address embedding, std::int64_t vocab_size,
                       const Weight& head, const Norm& final_norm, const std::string& activation,
                       bool norms_whole_rows, float embedding_multiplier, float residual_multiplier,
                       float logit_multiplier, float logit_softcap) {
             DecoderModel model;
             model.layers = std::move(layers);
             for (const auto& [address, num_rows, half] : ropes) {
               model.ropes.push_back({values<float>(address), num_rows, half});
             }
             model.hidden_size = hidden_size;
             model.num_heads = num_heads;
             model.num_kv_heads = num_kv_heads;
             model.head_dim = head_dim;
             model.embedding = values<float>(embedding);
             model.vocab_size = vocab_size;
             model.head = linear_weight(head);
             model.final_norm = row_norm(final_norm);
             model.activation = activation_named(activation);
             model.norms_whole_rows = norms_whole_rows;
             model.embedding_multiplier = embedding_multiplier;
             model.residual_multiplier = residual_multiplier;
             model.logit_multiplier = logit_multiplier;
             model.logit_softcap = logit_softcap;
             return std::make_unique<Decoder>(std::move(model));
           }),
           py::kw_only(), py::arg("layers"), py::arg("ropes"), py::arg("hidden_size"),
           py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("embedding"),
           py::arg("vocab_size"), py::arg("head"), py::arg("final_norm"), py::arg("activation"),
           py::arg("norms_whole_rows"), py::arg("embedding_multiplier"),
           py::arg("residual_multiplier"), py::arg("logit_multiplier"), py::arg("logit_softcap"))
      .def("forward", &forward, py::arg("cache"), py::arg("token_ids"), py::arg("positions"),
           py::arg("num_tokens"), py::arg("rows"), py::arg("num_rows"), py::arg("cu_seqlens_q"),
           py::arg("seqused_k"), py::arg("cache_batch_idx"), py::arg("block_table"),
           py::arg("num_seqs"), py::arg("logits"),
           "Compute packed rows; engine.fused is the checked way in.")
      .def_property_readonly("scratch_bytes", &Decoder::scratch_bytes);
}

}  // namespace vmalloc
