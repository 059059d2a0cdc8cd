// decoder.cpp: the loop over a decoder's layers, and the scratch memory it works in.
// Owns: per Decoder, scratch memory that only grows.  Thread-safety: see decoder.h.
#include "decoder.h"

#include <algorithm>
#include <utility>

#include "aligned_floats.h"
#include "cpu_isa.h"
#include "decoder_check.h"
#include "thread_pool.h"

namespace vmalloc {
namespace {

// Below this many floats a pass over rows is done before a worker would have woken.
constexpr std::int64_t kFloatsWorthSharing = 1 << 15;
constexpr std::int64_t kRowTasksPerThread = 2;

// Call `body(row)` for each row, on all threads where the rows are many.
template <typename Body>
void for_rows(std::int64_t num_rows, std::int64_t floats_per_row, const Body& body) {
  const bool shares = num_rows * floats_per_row >= kFloatsWorthSharing;
  const auto threads = static_cast<std::int64_t>(shares ? num_threads() : 1);
  const std::int64_t num_tasks =
      threads == 1 ? 1 : std::min(num_rows, threads * kRowTasksPerThread);
  auto run = [&](std::size_t task, std::size_t) {
    const auto i = static_cast<std::int64_t>(task);
    const std::int64_t end = (i + 1) * num_rows / num_tasks;
    for (std::int64_t row = i * num_rows / num_tasks; row < end; ++row) body(row);
  };
  parallel_for(static_cast<std::size_t>(num_tasks), static_cast<std::size_t>(threads), run);
}

const RowKernels& row_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512:
      return kRowsAvx512;
    case CpuIsa::kAvx2:
      return kRowsAvx2;
#endif
    default:
      return kRowsPortable;
  }
}

}  // namespace

struct Decoder::Scratch {
  AlignedFloats hidden;     // [rows][hidden_size], the residual stream
  AlignedFloats normed;     // [rows][hidden_size], what products read
  AlignedFloats update;     // [rows][hidden_size], what is normalised before `hidden` gets it
  AlignedFloats query;      // [rows][num_heads][head_dim]
  AlignedFloats key_value;  // [rows][2][num_kv_heads][head_dim]
  AlignedFloats attended;   // [rows][num_heads][head_dim]
  AlignedFloats activated;  // [rows][intermediate size]
  std::vector<std::int32_t> last_cu_seqlens_q;
};

class Decoder::Pass {
 public:
  Pass(const DecoderModel& model, Scratch& scratch, const DecoderCache& cache,
       const DecoderBatch& batch)
      : model_(model),
        scratch_(scratch),
        cache_(cache),
        batch_(batch),
        kernels_(row_kernels()),
        size_(model.hidden_size),
        query_size_(model.num_heads * model.head_dim),
        kv_size_(model.num_kv_heads * model.head_dim),
        num_rows_(batch.varlen.total_q),
        varlen_(batch.varlen) {}

  void run(float* logits) {
    embed();
    const bool trims = find_last_rows();
    for (std::size_t i = 0; i + 1 < model_.layers.size(); ++i) compute_layer(i);
    if (trims) {
      compute_last_layer();
    } else {
      compute_layer(model_.layers.size() - 1);
      take_rows(hidden(0));
    }
    num_rows_ = batch_.num_rows;
    if (num_rows_ > 0) compute_logits(logits);
  }

 private:
  void embed() {
    scratch_.hidden.reserve(num_rows_ * size_);
    for_rows(num_rows_, size_, [&](std::int64_t row) {
      kernels_.scale(model_.embedding + batch_.token_ids[row] * size_, model_.embedding_multiplier,
                     size_, hidden(row));
    });
  }

  // Whether the wanted rows are fewer than all, and the last ones of their sequences; then notes
  // how many of each.
  bool find_last_rows() {
    if (batch_.num_rows >= num_rows_) return false;
    std::vector<std::int32_t>& cu_seqlens_q = scratch_.last_cu_seqlens_q;
    cu_seqlens_q.assign(1, 0);
    std::int64_t next = 0;
    for (std::int64_t i = 0; i < varlen_.batch; ++i) {
      const std::int64_t end = varlen_.cu_seqlens_q[i + 1];
      const std::int64_t first = next;
      while (next < batch_.num_rows && batch_.rows[next] < end) ++next;
      for (std::int64_t j = first; j < next; ++j) {
        if (batch_.rows[j] != end - (next - j)) return false;
      }
      cu_seqlens_q.push_back(static_cast<std::int32_t>(next));
    }
    return next == batch_.num_rows;
  }

  void compute_layer(std::size_t layer_idx) {
    const DecoderLayer& layer = model_.layers[layer_idx];
    normalise(layer.before_attention);
    const LinearCall calls[] = {query_call(layer), key_call(layer), value_call(layer)};
    linear(calls, 3, num_rows_);
    finish_keys(layer);
    append(layer_idx);
    finish_queries(layer, nullptr);
    attend(layer_idx);
    compute_mlp(layer);
  }

  // Keys and values of all rows, the rest for the wanted rows alone.
  void compute_last_layer() {
    const std::size_t layer_idx = model_.layers.size() - 1;
    const DecoderLayer& layer = model_.layers[layer_idx];
    normalise(layer.before_attention);
    const LinearCall calls[] = {key_call(layer), value_call(layer)};
    linear(calls, 2, num_rows_);
    finish_keys(layer);
    append(layer_idx);
    if (batch_.num_rows == 0) return;
    take_rows(hidden(0));
    take_rows(normed(0));
    num_rows_ = batch_.num_rows;
    varlen_.cu_seqlens_q = scratch_.last_cu_seqlens_q.data();
    varlen_.total_q = num_rows_;
    const LinearCall call = query_call(layer);
    linear(&call, 1, num_rows_);
    finish_queries(layer, batch_.rows);
    attend(layer_idx);
    compute_mlp(layer);
  }

  // normed = norm(hidden)
  void normalise(const RowNorm& norm) {
    scratch_.normed.reserve(num_rows_ * size_);
    for_rows(num_rows_, size_, [&](std::int64_t row) {
      if (norm.weight == nullptr) {
        std::copy_n(hidden(row), size_, normed(row));
      } else {
        kernels_.normalise(hidden(row), norm, size_, normed(row));
      }
    });
  }

  LinearCall query_call(const DecoderLayer& layer) {
    return store_call(layer.query, scratch_.query.reserve(num_rows_ * query_size_), query_size_);
  }

  LinearCall key_call(const DecoderLayer& layer) {
    float* const out = scratch_.key_value.reserve(num_rows_ * 2 * kv_size_);
    return store_call(layer.key, out, 2 * kv_size_);
  }

  LinearCall value_call(const DecoderLayer& layer) {
    float* const out = scratch_.key_value.reserve(num_rows_ * 2 * kv_size_);
    return store_call(layer.value, out + kv_size_, 2 * kv_size_);
  }

  // out = normed W^T + bias
  LinearCall store_call(const LinearWeight& weight, float* out, std::int64_t out_stride) {
    LinearCall call;
    call.x = normed(0);
    call.x_stride = size_;
    call.weight = weight;
    call.out = out;
    call.out_stride = out_stride;
    return call;
  }

  void finish_keys(const DecoderLayer& layer) {
    if (layer.key_norm.weight == nullptr && layer.rope_idx < 0) return;
    for_rows(num_rows_, kv_size_, [&](std::int64_t row) {
      finish_heads(layer, layer.key_norm, model_.num_kv_heads, batch_.positions[row],
                   scratch_.key_value.data() + row * 2 * kv_size_);
    });
  }

  // `rows`: the packed row of each query; null: its own.
  void finish_queries(const DecoderLayer& layer, const std::int64_t* rows) {
    if (layer.query_norm.weight == nullptr && layer.rope_idx < 0) return;
    for_rows(num_rows_, query_size_, [&](std::int64_t row) {
      finish_heads(layer, layer.query_norm, model_.num_heads,
                   batch_.positions[rows == nullptr ? row : rows[row]],
                   scratch_.query.data() + row * query_size_);
    });
  }

  // Norm and rotation of one row's heads.
  void finish_heads(const DecoderLayer& layer, const RowNorm& norm, std::int64_t num_heads,
                    std::int64_t position, float* heads) {
    const bool has_norm = norm.weight != nullptr;
    if (has_norm && model_.norms_whole_rows) {
      kernels_.normalise(heads, norm, num_heads * model_.head_dim, heads);
    }
    for (std::int64_t i = 0; i < num_heads; ++i) {
      float* const head = heads + i * model_.head_dim;
      if (has_norm && !model_.norms_whole_rows) {
        kernels_.normalise(head, norm, model_.head_dim, head);
      }
      if (layer.rope_idx >= 0) {
        const RopeTable& rope = model_.ropes[static_cast<std::size_t>(layer.rope_idx)];
        kernels_.rotate(rope.values + position * 2 * rope.half, rope.half, head);
      }
    }
  }

  void append(std::size_t layer_idx) {
    float* const key_value = scratch_.key_value.data();
    AppendArgs args;
    args.element_bytes = sizeof(float);
    args.key = {key_value, 2 * kv_size_, model_.head_dim};
    args.value = {key_value + kv_size_, 2 * kv_size_, model_.head_dim};
    args.k_cache = cache_.layers[layer_idx].k;
    args.v_cache = cache_.layers[layer_idx].v;
    args.batch = varlen_;
    args.num_kv_heads = model_.num_kv_heads;
    args.k_head_dim = model_.head_dim;
    args.v_head_dim = model_.head_dim;
    append_kv(args);
  }

  // hidden += what the queries find in the cache, projected
  void attend(std::size_t layer_idx) {
    const DecoderLayer& layer = model_.layers[layer_idx];
    float* const attended = scratch_.attended.reserve(num_rows_ * query_size_);
    AttentionArgs args;
    args.dtype = AttentionDtype::kFloat32;
    args.query = {scratch_.query.data(), query_size_, model_.head_dim};
    args.out = {attended, query_size_, model_.head_dim};
    args.k_cache = cache_.layers[layer_idx].k;
    args.v_cache = cache_.layers[layer_idx].v;
    args.batch = varlen_;
    args.num_heads = model_.num_heads;
    args.num_kv_heads = model_.num_kv_heads;
    args.k_head_dim = model_.head_dim;
    args.v_head_dim = model_.head_dim;
    args.softmax_scale = layer.softmax_scale;
    args.window_left = layer.window_left;
    args.softcap = layer.softcap;
    args.sinks = nullptr;
    varlen_attention(args);
    add_product(layer.output, attended, layer.after_attention);
  }

  void compute_mlp(const DecoderLayer& layer) {
    normalise(layer.before_mlp);
    const std::int64_t width = layer.gate.out_features;
    float* const activated = scratch_.activated.reserve(num_rows_ * width);
    LinearCall call = store_call(layer.gate, activated, width);
    call.up = layer.up;
    call.epilogue = model_.activation;
    linear(&call, 1, num_rows_);
    add_product(layer.down, activated, layer.after_mlp);
  }

  // hidden += residual_multiplier * norm(x W^T + bias), x as wide as the weight.
  void add_product(const LinearWeight& weight, const float* x, const RowNorm& norm) {
    const bool has_norm = norm.weight != nullptr;
    float* const out = has_norm ? scratch_.update.reserve(num_rows_ * size_) : hidden(0);
    LinearCall call = store_call(weight, out, size_);
    call.x = x;
    call.x_stride = weight.in_features;
    if (!has_norm) {
      call.epilogue = LinearEpilogue::kAdd;
      call.scale = model_.residual_multiplier;
    }
    linear(&call, 1, num_rows_);
    if (!has_norm) return;
    for_rows(num_rows_, size_, [&](std::int64_t row) {
      kernels_.add_normalised(out + row * size_, norm, model_.residual_multiplier, size_,
                              hidden(row));
    });
  }

  void compute_logits(float* logits) {
    normalise(model_.final_norm);
    const std::int64_t width = model_.head.out_features;
    LinearCall call = store_call(model_.head, logits, width);
    call.scale = model_.logit_multiplier;
    linear(&call, 1, num_rows_);
    if (model_.logit_softcap == 0.0F) return;
    for_rows(num_rows_, width, [&](std::int64_t row) {
      kernels_.cap(model_.logit_softcap, width, logits + row * width);
    });
  }

  // Bring the wanted rows, which ascend, to the front.
  void take_rows(float* buffer) {
    for (std::int64_t i = 0; i < batch_.num_rows; ++i) {
      const std::int64_t row = batch_.rows[i];
      if (row != i) std::copy_n(buffer + row * size_, size_, buffer + i * size_);
    }
  }

  float* hidden(std::int64_t row) { return scratch_.hidden.data() + row * size_; }
  float* normed(std::int64_t row) { return scratch_.normed.data() + row * size_; }

  const DecoderModel& model_;
  Scratch& scratch_;
  const DecoderCache& cache_;
  const DecoderBatch& batch_;
  const RowKernels& kernels_;
  const std::int64_t size_;  // of hidden rows
  const std::int64_t query_size_;
  const std::int64_t kv_size_;
  std::int64_t num_rows_;  // being computed
  VarlenBatch varlen_;
};

Decoder::Decoder(DecoderModel model)
    : model_(std::move(model)), scratch_(std::make_unique<Scratch>()) {
  check_model(model_);
}

Decoder::~Decoder() = default;

void Decoder::forward(const DecoderCache& cache, const DecoderBatch& batch, float* logits) {
  check_batch(model_, cache, batch);
  const AwakeWorkers awake;
  if (batch.varlen.total_q > 0) Pass(model_, *scratch_, cache, batch).run(logits);
}

std::size_t Decoder::scratch_bytes() const {
  const Scratch& s = *scratch_;
  std::size_t bytes = 0;
  for (const AlignedFloats* buffer :
       {&s.hidden, &s.normed, &s.update, &s.query, &s.key_value, &s.attended, &s.activated}) {
    bytes += buffer->bytes();
  }
  return bytes;
}

}  // namespace vmalloc
