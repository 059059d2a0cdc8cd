// attention_tile.inl: what happens to one tile of keys: transpose, score, soften, accumulate.
// Owns: nothing.  Thread-safety: pure functions over the caller's scratch memory.
//
// Included by attention_kernel.inl, which tells why no row's result depends on its neighbours.

namespace vmalloc {
namespace {

const float kZeroRow[kMaxHeadDim] = {};

// Next V rows that the score phase fetches; the value phase fetches the others.
constexpr int kEarlyValues = kTileKeys / 2;

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
template <typename T, typename Rows>
void pack_keys(const TileSource<T, Rows>& source, const NextRows<Rows>& next, float* keys) {
  constexpr int kDims = 16 / static_cast<int>(sizeof(T));
  for (int group = source.begin / kLanes * kLanes; group < source.end; group += kLanes) {
    const void* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int key = group + i;
      const bool readable = key >= source.begin && key < source.end;
      rows[i] = readable ? static_cast<const void*>(source.row(key)) : kZeroRow;
    }
    float* out = keys + group;
    for (std::int64_t dim = 0; dim < source.head_dim; dim += kDims) {
      const std::int64_t offset = dim * static_cast<std::int64_t>(sizeof(T));
      const int quarter = static_cast<int>(offset / 16 % 4);  // 16 bytes of a 64-byte line
      for (int i = 0; i < kLanes / 4; ++i) {
        next.fetch(group + quarter * (kLanes / 4) + i, offset - quarter * 16, 64);
      }
      Vec word[4];
      transpose_words(rows, offset, word);
      store_dims(word, static_cast<const T*>(nullptr), out + dim * kTileKeys);
    }
  }
}

// Copy V rows [begin, end) into values[kTileKeys][v_stride] as float.
template <typename T, typename Rows>
void pack_values(const TileSource<T, Rows>& source, const NextRows<Rows>& next, float* values,
                 std::int64_t v_stride) {
  const std::int64_t whole = source.head_dim / kLanes * kLanes;
  for (int key = source.begin; key < source.end; ++key) {
    next.fetch(key, 0, next.head_bytes);
    const T* row = source.row(key);
    float* out = values + key * v_stride;
    for (std::int64_t dim = 0; dim < whole; dim += kLanes) {
      vstore(out + dim, load_values(row + dim));
    }
    if (whole < source.head_dim) vstore(out + whole, load_half(row + whole));
  }
}

// scores[r][key] = query[r] . key for the first `num_vectors` vectors of keys, at least.
template <int R, typename Rows>
void score_rows(const float* query, std::int64_t head_dim, const float* keys, int num_vectors,
                const NextRows<Rows>& next_values, float* scores) {
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
      if (dim % kHeadDimMultiple == 0 && column == 0 && next_values.end > 0) {
        const std::int64_t from = dim * kEarlyValues / head_dim;
        const std::int64_t to = (dim + kHeadDimMultiple) * kEarlyValues / head_dim;
        for (std::int64_t row = from; row < to; ++row) {
          next_values.fetch(static_cast<int>(row), 0, next_values.head_bytes);
        }
      }
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

// out[r] += sum over keys [begin, end) of weights[r][key] * values[key], for C vectors of columns
// from `dim` on.
template <int R, int C, bool kHalf, typename T, typename Rows>
void accumulate_columns(const float* weights, const ValueRows<T, Rows>& values, std::int64_t dim,
                        int begin, int end, float* out, std::int64_t out_stride) {
  Vec sum[R][C];
  out += dim;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = vload(out + r * out_stride + c * kLanes);
  }
  auto cursor =
      values.rows.cursor(values.origin + dim * static_cast<std::int64_t>(sizeof(T)), begin);
  for (int key = begin; key < end; ++key, cursor.advance()) {
    if (key % 2 == 0) {
      values.next.fetch(kEarlyValues + key / 2, dim * static_cast<std::int64_t>(sizeof(T)),
                        C * kLanes * static_cast<std::int64_t>(sizeof(T)));
    }
    const T* row = reinterpret_cast<const T*>(cursor.row());
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

template <int R, int C, typename T, typename Rows>
void accumulate_rows(const float* weights, const ValueRows<T, Rows>& values, std::int64_t dim,
                     int begin, int end, float* out, std::int64_t out_stride) {
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

}  // namespace
}  // namespace vmalloc
