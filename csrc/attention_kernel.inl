// attention_kernel.inl: tiled causal attention with an online softmax, written once for all
// vectors. Owns: nothing.  Thread-safety: pure functions over the caller's scratch memory.
//
// Included after Vec, kLanes, kAccumulators, Bf16 and the v* operations of one instruction set.
//
// Why a row's result never depends on its neighbours: a K tile is transposed first, so that each
// vector lane belongs to one key and a score is one chain of multiply-adds over head_dim; an output
// element is one chain over the row's own keys, in order, skipping (not multiplying by zero) keys
// it does not see. How many rows share the loads of a pass changes neither chain. A decode step is
// the same code on one position. Multiply-adds are written as vfma throughout: where a compiler may
// fuse a product and a sum by itself, two instantiations could round differently.

namespace vmalloc {
namespace {

constexpr int kTileVectors = kTileKeys / kLanes;
constexpr float kInfinity = __builtin_inff();

inline int clamp_to_tile(std::int64_t key) {
  return key < 0 ? 0 : key > kTileKeys ? kTileKeys : static_cast<int>(key);
}

// The most columns that `rows` rows of accumulators leave registers for.
constexpr int columns_for(int rows, int limit) {
  int columns = 8;
  while (columns > 2 && columns * rows > kAccumulators) columns /= 2;
  return columns < limit ? columns : limit;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  const std::uint32_t quiet_nan = bits | 0x400000U;
  out->bits = static_cast<std::uint16_t>((x == x ? rounded : quiet_nan) >> 16);
}

// e^x for x <= 88; 0 below the smallest normal number. Cephes' polynomial, within 1 ulp or so.
inline Vec vexp(Vec x) {
  const Vec smallest = vset(-87.336544F);
  const Vec magic = vset(12582912.0F);    // 1.5 * 2^23: rounds a sum to an integer
  const Vec clamped = vmax(smallest, x);  // a NaN in x stays
  const Vec shifted = vfma(clamped, vset(1.44269504F), magic);
  const Vec n = vsub(shifted, magic);
  Vec r = vfma(n, vset(-0.693359375F), clamped);
  r = vfma(n, vset(2.12194440e-4F), r);
  Vec p = vset(1.9875691500e-4F);
  p = vfma(p, r, vset(1.3981999507e-3F));
  p = vfma(p, r, vset(8.3334519073e-3F));
  p = vfma(p, r, vset(4.1665795894e-2F));
  p = vfma(p, r, vset(1.6666665459e-1F));
  p = vfma(p, r, vset(5.0000001201e-1F));
  const Vec y = vadd(vfma(p, vmul(r, r), r), vset(1.0F));
  return vselect_less(x, smallest, vset(0.0F), vmul(y, vpow2(shifted)));
}

// tanh(x): Cephes' odd polynomial near zero, where the other form cancels.
inline Vec vtanh(Vec x) {
  const Vec magnitude = vabs(x);
  const Vec z = vmul(x, x);
  Vec p = vset(-5.70498872745e-3F);
  p = vfma(p, z, vset(2.06390887954e-2F));
  p = vfma(p, z, vset(-5.37397155531e-2F));
  p = vfma(p, z, vset(1.33314422036e-1F));
  p = vfma(p, z, vset(-3.33332819422e-1F));
  const Vec near_zero = vfma(vmul(p, z), x, x);
  const Vec capped = vmin(vset(10.0F), magnitude);  // tanh(10) rounds to 1
  const Vec e = vexp(vadd(capped, capped));
  const Vec far = vsub(vset(1.0F), vdiv(vset(2.0F), vadd(e, vset(1.0F))));
  return vselect_less(magnitude, vset(0.625F), near_zero, vcopysign(far, x));
}

const float kZeroRow[kMaxHeadDim] = {};

// One head of K or V over one tile of keys; only rows [begin, end) of the tile may be read.
template <typename T>
struct TileSource {
  const T* row0;
  std::int64_t row_stride;
  std::int64_t head_dim;
  int begin;
  int end;

  const T* row(int key) const { return row0 + key * row_stride; }
};

// Rows that the next visit will read, fetched while this one computes: a decode step reads every
// row once, from memory, at strides that hardware prefetchers follow badly.
template <typename T>
struct NextRows {
  const T* row0;
  std::int64_t row_stride;
  int end;  // 0: nothing to fetch

  __attribute__((always_inline)) void fetch(int key, std::int64_t first_dim,
                                            std::int64_t dims) const {
    if (key >= end) return;
    const char* line = reinterpret_cast<const char*>(row0 + key * row_stride + first_dim);
    const std::int64_t bytes = dims * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
  }
};

inline void store_dims(const Vec* word, const float*, float* out) {
  for (int i = 0; i < 4; ++i) vstore(out + i * kTileKeys, word[i]);
}
inline void store_dims(const Vec* word, const Bf16*, float* out) {
  for (int i = 0; i < 4; ++i) {
    vstore(out + 2 * i * kTileKeys, first_bf16(word[i]));
    vstore(out + (2 * i + 1) * kTileKeys, second_bf16(word[i]));
  }
}

// Transpose K rows into keys[head_dim][kTileKeys] as float; keys outside [begin, end) become zero.
template <typename T>
void pack_keys(const TileSource<T>& source, const NextRows<T>& next, float* keys) {
  constexpr int kDims = 16 / static_cast<int>(sizeof(T));
  for (int group = source.begin / kLanes * kLanes; group < source.end; group += kLanes) {
    const void* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int key = group + i;
      const bool readable = key >= source.begin && key < source.end;
      rows[i] = readable ? static_cast<const void*>(source.row(key)) : kZeroRow;
      next.fetch(key, 0, source.head_dim);
    }
    float* out = keys + group;
    for (std::int64_t dim = 0; dim < source.head_dim; dim += kDims) {
      Vec word[4];
      transpose_words(rows, dim * static_cast<std::int64_t>(sizeof(T)), word);
      store_dims(word, source.row0, out + dim * kTileKeys);
    }
  }
}

// Copy V rows [begin, end) into values[kTileKeys][v_stride] as float.
template <typename T>
void pack_values(const TileSource<T>& source, const NextRows<T>& next, float* values,
                 std::int64_t v_stride) {
  const std::int64_t whole = source.head_dim / kLanes * kLanes;
  for (int key = source.begin; key < source.end; ++key) {
    const T* row = source.row(key);
    next.fetch(key, 0, source.head_dim);
    float* out = values + key * v_stride;
    for (std::int64_t dim = 0; dim < whole; dim += kLanes) {
      vstore(out + dim, load_values(row + dim));
    }
    if (whole < source.head_dim) vstore(out + whole, load_half(row + whole));
  }
}

// scores[r][key] = query[r] . key for the first `num_vectors` vectors of keys, at least.
template <int R>
void score_rows(const float* query, std::int64_t head_dim, const float* keys, int num_vectors,
                float* scores) {
  constexpr int C = columns_for(R, kTileVectors);
  for (int column = 0; column < num_vectors; column += C) {
    Vec sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = vset(0.0F);
    }
    const float* key = keys + column * kLanes;
    for (std::int64_t dim = 0; dim < head_dim; ++dim, key += kTileKeys) {
      Vec k[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) k[c] = vload(key + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec q = vset(query[r * head_dim + dim]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = vfma(q, k[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        vstore(scores + r * kTileKeys + (column + c) * kLanes, sum[r][c]);
      }
    }
  }
}

struct RowSoftmax {
  float* maximum;
  float* total;
};

// Turn one row's scores into weights exp(score - maximum), 0 outside [begin, end), and return the
// factor that its earlier sums shrink by. Not inlined: one copy of the code for every caller.
__attribute__((noinline)) float soften_row(float* scores, int begin, int end, float softcap,
                                           RowSoftmax state) {
  const int num_vectors = (end + kLanes - 1) / kLanes;
  Vec highest = vset(-kInfinity);
  for (int i = 0; i < num_vectors; ++i) {
    Vec s = vload(scores + i * kLanes);
    if (softcap > 0.0F) s = vmul(vset(softcap), vtanh(vdiv(s, vset(softcap))));
    const int first = i * kLanes;
    if (first < begin || first + kLanes > end) {
      const Vec key = vadd(viota(), vset(static_cast<float>(first)));
      s = vselect_less(key, vset(static_cast<float>(begin)), vset(-kInfinity), s);
      s = vselect_less(key, vset(static_cast<float>(end)), s, vset(-kInfinity));
    }
    highest = vmax(highest, s);
    vstore(scores + i * kLanes, s);
  }
  const float before = *state.maximum;
  const float tile_maximum = vreduce_max(highest);
  const float maximum = before < tile_maximum ? tile_maximum : before;
  Vec sum = vset(0.0F);
  for (int i = 0; i < num_vectors; ++i) {
    const Vec weight = vexp(vsub(vload(scores + i * kLanes), vset(maximum)));
    sum = vadd(sum, weight);
    vstore(scores + i * kLanes, weight);
  }
  float factor = 1.0F;
  if (before < maximum) {
    float lanes[kLanes];
    vstore(lanes, vexp(vset(before - maximum)));
    factor = lanes[0];
  }
  *state.maximum = maximum;
  float lanes[kLanes];
  vstore(lanes, vfma(vset(*state.total), vset(factor), vset(vreduce_add(sum))));
  *state.total = lanes[0];
  return factor;
}

template <bool kHalf, typename T>
inline Vec load_column(const T* p) {
  if constexpr (kHalf) {
    return load_half(p);
  } else {
    return load_values(p);
  }
}

// Rows of V as a tile's weights meet them: the cache's own or packed ones.
template <typename T>
struct ValueRows {
  const T* row0;
  std::int64_t row_stride;
  std::int64_t dims;
  NextRows<T> next;
};

// out[r] += sum over keys [begin, end) of weights[r][key] * values[key], for C vectors of columns
// from `dim` on.
template <int R, int C, bool kHalf, typename T>
void accumulate_columns(const float* weights, const ValueRows<T>& values, std::int64_t dim,
                        int begin, int end, float* out, std::int64_t out_stride) {
  Vec sum[R][C];
  out += dim;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = vload(out + r * out_stride + c * kLanes);
  }
  const T* row = values.row0 + begin * values.row_stride + dim;
  for (int key = begin; key < end; ++key, row += values.row_stride) {
    values.next.fetch(key, dim, C * kLanes);
    Vec v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = load_column<kHalf>(row + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = vset(weights[r * kTileKeys + key]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = vfma(w, v[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) vstore(out + r * out_stride + c * kLanes, sum[r][c]);
  }
}

template <int R, int C, typename T>
void accumulate_rows(const float* weights, const ValueRows<T>& values, std::int64_t dim, int begin,
                     int end, float* out, std::int64_t out_stride) {
  for (; values.dims - dim >= C * kLanes; dim += C * kLanes) {
    accumulate_columns<R, C, false>(weights, values, dim, begin, end, out, out_stride);
  }
  if (dim == values.dims) return;
  if constexpr (C > 1) {
    accumulate_rows<R, C / 2>(weights, values, dim, begin, end, out, out_stride);
  } else {
    accumulate_columns<R, 1, true>(weights, values, dim, begin, end, out, out_stride);
  }
}

// What one task works on: its rows are (kv head, position, query head of the group), in that order.
template <typename T>
class TaskRunner {
 public:
  TaskRunner(const AttentionArgs& args, const AttentionTask& task, float* scratch)
      : args_(args),
        task_(task),
        group_(args.num_heads / args.num_kv_heads),
        head_rows_(task.num_positions * group_),
        layout_(scratch_layout(head_rows_ * task.num_kv_heads, args.k_head_dim, args.v_head_dim)),
        scratch_(scratch),
        first_key_(first_key(task.first_position)),
        end_key_(task.first_position + task.num_positions) {}

  void run() {
    load_queries();
    for (std::int64_t tile = first_key_ / kTileKeys * kTileKeys; tile < end_key_;
         tile += kTileKeys) {
      for (std::int64_t head = 0; head < task_.num_kv_heads; ++head) visit_tile(tile, head);
    }
    store_outputs();
  }

 private:
  // Keys [first_key(position), position] are visible to a query at `position`.
  std::int64_t first_key(std::int64_t position) const {
    const bool windowed = args_.window_left >= 0 && position > args_.window_left;
    return windowed ? position - args_.window_left : 0;
  }

  float* at(std::int64_t offset) const { return scratch_ + offset; }

  // The task's row -> its index into query and out, in elements.
  std::int64_t packed_offset(const PackedRows& packed, std::int64_t row) const {
    const std::int64_t kv_head = task_.first_kv_head + row / head_rows_;
    const std::int64_t in_head = row % head_rows_;
    return (task_.first_packed_row + in_head / group_) * packed.token_stride +
           (kv_head * group_ + in_head % group_) * packed.head_stride;
  }

  void load_queries() {
    const std::int64_t rows = head_rows_ * task_.num_kv_heads;
    for (std::int64_t row = 0; row < rows; ++row) {
      const T* in = static_cast<const T*>(args_.query.data) + packed_offset(args_.query, row);
      float* query = at(layout_.query) + row * args_.k_head_dim;
      for (std::int64_t i = 0; i < args_.k_head_dim; ++i) {
        query[i] = to_float(in[i]) * args_.softmax_scale;
      }
      float sink = -kInfinity;
      if (args_.sinks != nullptr) {
        const std::int64_t kv_head = task_.first_kv_head + row / head_rows_;
        sink = args_.sinks[kv_head * group_ + row % group_];
      }
      at(layout_.maximum)[row] = sink;
      at(layout_.total)[row] = sink > -kInfinity ? 1.0F : 0.0F;
      float* out = at(layout_.out) + row * layout_.v_stride;
      for (std::int64_t i = 0; i < layout_.v_stride; ++i) out[i] = 0.0F;
    }
  }

  TileSource<T> source(const CacheRows& cache, std::int64_t head_dim, std::int64_t tile,
                       std::int64_t head) const {
    const T* row0 = static_cast<const T*>(cache.data) + task_.slot * cache.slot_stride +
                    tile * cache.row_stride + (task_.first_kv_head + head) * cache.head_stride;
    return {row0, cache.row_stride, head_dim, clamp_to_tile(first_key_ - tile),
            clamp_to_tile(end_key_ - tile)};
  }

  // The rows of the visit after (tile, head). A prefill reads them many times, so it does not ask.
  NextRows<T> next_rows(const CacheRows& cache, std::int64_t tile, std::int64_t head) const {
    const bool same_tile = head + 1 < task_.num_kv_heads;
    if (!same_tile) tile += kTileKeys;
    if (task_.num_positions > 1 || tile >= end_key_) return {nullptr, 0, 0};
    const TileSource<T> next = source(cache, 0, tile, same_tile ? head + 1 : 0);
    return {next.row0, next.row_stride, next.end};
  }

  void visit_tile(std::int64_t tile, std::int64_t head) {
    const TileSource<T> v = source(args_.v_cache, args_.v_head_dim, tile, head);
    const NextRows<T> next_v = next_rows(args_.v_cache, tile, head);
    pack_keys(source(args_.k_cache, args_.k_head_dim, tile, head),
              next_rows(args_.k_cache, tile, head), at(layout_.keys));
    const std::int64_t first_row = head * head_rows_;
    if (head_rows_ <= kBlockRows) {
      const ValueRows<T> values = {v.row0, v.row_stride, v.head_dim, next_v};
      visit_block(tile, first_row, 0, head_rows_, values);
      return;
    }
    pack_values(v, next_v, at(layout_.values), layout_.v_stride);
    const ValueRows<float> values = {
        at(layout_.values), layout_.v_stride, layout_.v_stride, {nullptr, 0, 0}};
    const std::int64_t num_blocks = (head_rows_ + kBlockRows - 1) / kBlockRows;
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      visit_block(tile, first_row, block * head_rows_ / num_blocks,
                  (block + 1) * head_rows_ / num_blocks, values);
    }
  }

  // Rows [begin, end) of one head's rows, which start at `first_row`, against one tile.
  template <typename V>
  void visit_block(std::int64_t tile, std::int64_t first_row, std::int64_t begin, std::int64_t end,
                   const ValueRows<V>& values) {
    int first[kBlockRows];
    int last[kBlockRows];
    // Rows that see nothing of this tile: those before it lead, those whose window is past it
    // trail.
    int num_rows = 0;
    std::int64_t row = begin;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t position = task_.first_position + i / group_;
      const int from = clamp_to_tile(first_key(position) - tile);
      const int to = clamp_to_tile(position + 1 - tile);
      if (from >= to) {
        if (num_rows == 0) row = i + 1;
        continue;
      }
      first[num_rows] = from;
      last[num_rows] = to;
      ++num_rows;
    }
    if (num_rows > 0) attend(first_row + row, num_rows, first, last, values);
  }

  template <typename V>
  void attend(std::int64_t row, int num_rows, const int* first, const int* last,
              const ValueRows<V>& values) {
    float* scores = at(layout_.scores);
    float* out = at(layout_.out) + row * layout_.v_stride;
    // Positions ascend within the block, and so do both bounds.
    const int shared_begin = first[num_rows - 1];
    const int shared_end = last[0];
    score(num_rows, at(layout_.query) + row * args_.k_head_dim,
          (last[num_rows - 1] + kLanes - 1) / kLanes, scores);
    for (int r = 0; r < num_rows; ++r) {
      const RowSoftmax state = {at(layout_.maximum) + row + r, at(layout_.total) + row + r};
      const float factor =
          soften_row(scores + r * kTileKeys, first[r], last[r], args_.softcap, state);
      if (factor != 1.0F) scale_row(out + r * layout_.v_stride, factor);
    }
    const auto alone = [&](int r, int from, int to) {
      accumulate_block<1>(scores + r * kTileKeys, values, from, to, out + r * layout_.v_stride);
    };
    const bool shares = shared_begin < shared_end;
    for (int r = 0; r < num_rows; ++r) {
      const int to = shares ? shared_begin : last[r];
      if (first[r] < to) alone(r, first[r], to);
    }
    if (!shares) return;
    accumulate(num_rows, scores, values, shared_begin, shared_end, out);
    for (int r = 0; r < num_rows; ++r) {
      if (shared_end < last[r]) alone(r, shared_end, last[r]);
    }
  }

  void scale_row(float* out, float factor) const {
    for (std::int64_t i = 0; i < layout_.v_stride; i += kLanes) {
      vstore(out + i, vmul(vload(out + i), vset(factor)));
    }
  }

  void score(int num_rows, const float* query, int num_vectors, float* scores) const {
    const float* keys = at(layout_.keys);
    const std::int64_t dim = args_.k_head_dim;
    switch (num_rows) {
      case 1:
        return score_rows<1>(query, dim, keys, num_vectors, scores);
      case 2:
        return score_rows<2>(query, dim, keys, num_vectors, scores);
      case 3:
        return score_rows<3>(query, dim, keys, num_vectors, scores);
      case 4:
        return score_rows<4>(query, dim, keys, num_vectors, scores);
      case 5:
        return score_rows<5>(query, dim, keys, num_vectors, scores);
      default:
        return score_rows<6>(query, dim, keys, num_vectors, scores);
    }
  }

  template <int R, typename V>
  void accumulate_block(const float* weights, const ValueRows<V>& values, int begin, int end,
                        float* out) const {
    accumulate_rows<R, columns_for(R, 8)>(weights, values, 0, begin, end, out, layout_.v_stride);
  }

  template <typename V>
  void accumulate(int num_rows, const float* weights, const ValueRows<V>& values, int begin,
                  int end, float* out) const {
    switch (num_rows) {
      case 1:
        return accumulate_block<1>(weights, values, begin, end, out);
      case 2:
        return accumulate_block<2>(weights, values, begin, end, out);
      case 3:
        return accumulate_block<3>(weights, values, begin, end, out);
      case 4:
        return accumulate_block<4>(weights, values, begin, end, out);
      case 5:
        return accumulate_block<5>(weights, values, begin, end, out);
      default:
        return accumulate_block<6>(weights, values, begin, end, out);
    }
  }

  void store_outputs() {
    const std::int64_t rows = head_rows_ * task_.num_kv_heads;
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* sum = at(layout_.out) + row * layout_.v_stride;
      const float total = at(layout_.total)[row];
      T* out = static_cast<T*>(args_.out.data) + packed_offset(args_.out, row);
      for (std::int64_t i = 0; i < args_.v_head_dim; ++i) from_float(sum[i] / total, out + i);
    }
  }

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const std::int64_t group_;
  const std::int64_t head_rows_;  // rows of one KV head
  const ScratchLayout layout_;
  float* const scratch_;
  const std::int64_t first_key_;  // keys [first_key_, end_key_) are seen by some row
  const std::int64_t end_key_;
};

template <typename T>
void run_task(const AttentionArgs& args, const AttentionTask& task, float* scratch) {
  TaskRunner<T>(args, task, scratch).run();
}

}  // namespace
}  // namespace vmalloc
