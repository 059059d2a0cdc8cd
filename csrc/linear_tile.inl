// linear_tile.inl: a few rows of x against four rows of a weight, in registers.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included by linear_kernel.inl after one instruction set's vectors.

namespace vmalloc {
namespace {

constexpr int kTileColumns = 4;
constexpr int kTileRows = kAccumulators / kTileColumns;
constexpr int kLineFloats = 16;  // of a 64-byte cache line

/// `depth` elements of a few rows, each `stride` elements after the one before.
struct TileRows {
  const float* data;
  std::int64_t stride;
};

// One vector step along k, all of it or its first `count` elements.
template <int R, int C>
inline void add_products(TileRows x, TileRows weight, Vec (&sums)[R][kTileColumns]) {
  Vec in[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    in[r] = vload(x.data + r * x.stride);
    vkeep(in[r]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Vec w = vload(weight.data + c * weight.stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) vfma_into(sums[r][c], in[r], w);
  }
}
template <int R, int C>
inline void add_last_products(TileRows x, TileRows weight, int count,
                              Vec (&sums)[R][kTileColumns]) {
  Vec in[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) in[r] = vload_first(x.data + r * x.stride, count);
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Vec w = vload_first(weight.data + c * weight.stride, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) vfma_into(sums[r][c], in[r], w);
  }
}

// out[r][c] += sum over k of x[r][k] * weight[c][k], for R rows and C columns.
//
// Every output is kLanes chains of multiply-adds over k, lane l taking k = l, l + kLanes, ...,
// added up in one fixed order: neither R nor C nor what else is computed changes a bit of it.
// Meanwhile F rows at `ahead`, spaced as the weight's, are fetched.
template <int R, int C, int F>
void add_tile(TileRows x, TileRows weight, std::int64_t depth, const float* ahead, float* out,
              std::int64_t out_stride) {
  Vec sums[R][kTileColumns];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) sums[r][c] = vset(0.0F);
  }
  std::int64_t left = depth;
  for (; left >= kLineFloats; left -= kLineFloats) {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) __builtin_prefetch(ahead + f * weight.stride);
    ahead += kLineFloats;
#pragma GCC unroll 8
    for (int i = 0; i < kLineFloats / kLanes; ++i) {
      add_products<R, C>(x, weight, sums);
      x.data += kLanes;
      weight.data += kLanes;
    }
  }
  for (; left > 0; left -= kLanes) {
    add_last_products<R, C>(x, weight, static_cast<int>(left < kLanes ? left : kLanes), sums);
    x.data += kLanes;
    weight.data += kLanes;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    vadd_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out + r * out_stride);
  }
}

using Tile = void (*)(TileRows x, TileRows weight, std::int64_t depth, const float* ahead,
                      float* out, std::int64_t out_stride);

// By rows - 1 and by what else they do: 0, 1, 2 or 4 rows fetched, or 1, 2 or 3 columns only.
enum TileKind : int { kFetch0, kFetch1, kFetch2, kFetch4, kColumns1, kColumns2, kColumns3 };
constexpr int kNumTileKinds = 7;

template <int R>
struct TilesOf {
  static constexpr Tile kTiles[kNumTileKinds] = {
      add_tile<R, 4, 0>, add_tile<R, 4, 1>, add_tile<R, 4, 2>, add_tile<R, 4, 4>,
      add_tile<R, 1, 0>, add_tile<R, 2, 0>, add_tile<R, 3, 0>};
};

inline Tile tile_of(std::int64_t rows, int kind) {
  static constexpr const Tile* kByRows[] = {
      TilesOf<1>::kTiles,
      TilesOf<2>::kTiles,
      TilesOf<3>::kTiles,
      TilesOf < kTileRows >= 4 ? 4 : 1 > ::kTiles,
      TilesOf < kTileRows >= 5 ? 5 : 1 > ::kTiles,
      TilesOf < kTileRows >= 6 ? 6 : 1 > ::kTiles,
  };
  static_assert(kTileRows <= 6, "a tile has at most 6 rows");
  return kByRows[rows - 1][kind];
}

}  // namespace
}  // namespace vmalloc
