// linear_kernel.inl: a chunk of a product with a Linear's weight, written once for all vectors.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included after the vectors of one instruction set.
//
// Vectors lie along k, in x and in the weight alike, so both are read where torch keeps them. A
// pass takes at most kMaxDepth of k: four rows of the weight stay in the first-level cache while
// all of the chunk's rows of x come by from the second, and the next rows of the weight are fetched
// at the same time, evenly spread. How k is cut depends on its length alone.

#include "linear_tile.inl"
#include "vector_math.inl"

namespace vmalloc {
namespace {

struct ChunkSums {
  alignas(64) float values[kChunkRows * kChunkColumns];

  float* at(std::int64_t row, std::int64_t column) { return values + row * kChunkColumns + column; }
};

// Weight rows ahead of the current ones that are fetched: 8 KiB, time enough for memory to answer,
// little enough to stay in the first-level cache until they are used.
inline std::int64_t rows_ahead(std::int64_t depth) {
  constexpr std::int64_t kFloatsAhead = 2048;
  return depth * kTileColumns >= kFloatsAhead
             ? kTileColumns
             : (kFloatsAhead + depth - 1) / depth / kTileColumns * kTileColumns;
}

// All rows of the chunk against columns [column, column + kTileColumns) of one pass over k.
class ColumnPass {
 public:
  ColumnPass(TileRows x, TileRows weight, std::int64_t depth)
      : x_(x), weight_(weight), depth_(depth) {}

  // `num_columns` is how many there are, at most kTileColumns; `fetches` where the weight goes on.
  void run(std::int64_t num_rows, std::int64_t num_columns, bool fetches, float* sums) const {
    const std::int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    const std::int64_t per_tile = num_tiles >= 4 ? 1 : num_tiles >= 2 ? 2 : 4;
    const int fetching = per_tile == 4 ? kFetch4 : per_tile == 2 ? kFetch2 : kFetch1;
    const std::int64_t ahead = rows_ahead(depth_);
    std::int64_t row = 0;
    for (std::int64_t i = 0; i < num_tiles; ++i) {
      const std::int64_t rows = (num_rows - row + num_tiles - i - 1) / (num_tiles - i);
      int kind = kFetch0;
      if (num_columns < kTileColumns) {
        kind = kColumns1 + static_cast<int>(num_columns) - 1;
      } else if (fetches && i * per_tile < kTileColumns) {
        kind = fetching;
      }
      tile_of(rows, kind)({x_.data + row * x_.stride, x_.stride}, weight_, depth_,
                          weight_.data + (ahead + i * per_tile) * weight_.stride,
                          sums + row * kChunkColumns, kChunkColumns);
      row += rows;
    }
  }

 private:
  TileRows x_;
  TileRows weight_;
  std::int64_t depth_;
};

// Passes over k of nearly equal depth, whole cache lines but for the last one.
inline std::int64_t pass_depth(std::int64_t in_features) {
  const std::int64_t passes = (in_features + kMaxDepth - 1) / kMaxDepth;
  const std::int64_t depth = (in_features + passes - 1) / passes;
  return (depth + kLineFloats - 1) / kLineFloats * kLineFloats;
}

void sum_products(const LinearCall& call, const LinearWeight& weight, const LinearChunk& chunk,
                  ChunkSums* sums) {
  for (std::int64_t row = 0; row < chunk.num_rows; ++row) {
    for (std::int64_t c = 0; c < chunk.num_columns; ++c) *sums->at(row, c) = 0.0F;
  }
  const std::int64_t depth = pass_depth(weight.in_features);
  const float* x = call.x + chunk.first_row * call.x_stride;
  for (std::int64_t k = 0; k < weight.in_features; k += depth) {
    const std::int64_t taken = weight.in_features - k < depth ? weight.in_features - k : depth;
    const std::int64_t ahead = rows_ahead(taken) + kTileColumns;
    for (std::int64_t c = 0; c < chunk.num_columns; c += kTileColumns) {
      const std::int64_t column = chunk.first_column + c;
      const std::int64_t columns =
          chunk.num_columns - c < kTileColumns ? chunk.num_columns - c : kTileColumns;
      const bool fetches = chunk.first_row == 0 && column + ahead <= weight.out_features;
      const TileRows rows = {weight.data + column * weight.row_stride + k, weight.row_stride};
      ColumnPass({x + k, call.x_stride}, rows, taken)
          .run(chunk.num_rows, columns, fetches, sums->at(0, c));
    }
  }
}

inline Vec vsilu(Vec y) {
  const Vec lowest = vset(-88.0F);  // below, y / (1 + e^-y) is 0 for every purpose
  const Vec e = vexp(vsub(vset(0.0F), vmax(lowest, y)));  // a NaN in y stays
  return vselect_less(y, lowest, vset(0.0F), vdiv(y, vadd(vset(1.0F), e)));
}

inline Vec vgelu_tanh(Vec y) {
  const Vec cubic = vmul(vmul(y, y), vmul(y, vset(0.044715F)));
  const Vec t = vtanh(vmul(vset(0.79788456F), vadd(y, cubic)));
  return vmul(vmul(vset(0.5F), y), vadd(vset(1.0F), t));
}

// One row's sums with the bias, `count` columns from `column` of the output on.
inline Vec biased(const LinearWeight& weight, const float* sums, std::int64_t column, int count) {
  const Vec y = vload_first(sums, count);
  return weight.bias != nullptr ? vadd(y, vload_first(weight.bias + column, count)) : y;
}

// Whole vectors and the last part of one go the same way: where a chunk ends changes no bit.
template <LinearEpilogue E>
void finish(const LinearCall& call, const LinearChunk& chunk, ChunkSums* sums, ChunkSums* up) {
  const Vec scale = vset(call.scale);
  for (std::int64_t row = 0; row < chunk.num_rows; ++row) {
    float* out = call.out + (chunk.first_row + row) * call.out_stride + chunk.first_column;
    for (std::int64_t c = 0; c < chunk.num_columns; c += kLanes) {
      const std::int64_t left = chunk.num_columns - c;
      const int count = static_cast<int>(left < kLanes ? left : kLanes);
      const std::int64_t column = chunk.first_column + c;
      const Vec y = biased(call.weight, sums->at(row, c), column, count);
      Vec result = y;
      if constexpr (E == LinearEpilogue::kStore) {
        result = vmul(scale, y);
      } else if constexpr (E == LinearEpilogue::kAdd) {
        result = vfma(scale, y, vload_first(out + c, count));
      } else {
        const Vec gate = E == LinearEpilogue::kSiluGate ? vsilu(y) : vgelu_tanh(y);
        result = vmul(gate, biased(call.up, up->at(row, c), column, count));
      }
      vstore_first(out + c, result, count);
    }
  }
}

void run_chunk(const LinearCall& call, const LinearChunk& chunk) {
  ChunkSums sums;
  sum_products(call, call.weight, chunk, &sums);
  switch (call.epilogue) {
    case LinearEpilogue::kStore:
      return finish<LinearEpilogue::kStore>(call, chunk, &sums, nullptr);
    case LinearEpilogue::kAdd:
      return finish<LinearEpilogue::kAdd>(call, chunk, &sums, nullptr);
    case LinearEpilogue::kSiluGate:
    case LinearEpilogue::kGeluGate:
      break;
  }
  ChunkSums up;
  sum_products(call, call.up, chunk, &up);
  if (call.epilogue == LinearEpilogue::kSiluGate) {
    finish<LinearEpilogue::kSiluGate>(call, chunk, &sums, &up);
  } else {
    finish<LinearEpilogue::kGeluGate>(call, chunk, &sums, &up);
  }
}

}  // namespace
}  // namespace vmalloc
