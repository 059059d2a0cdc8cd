// linear_kernel.h: the seam between the driver of linear products and its per-instruction-set
// kernels. Owns: nothing.  Thread-safety: plain values; a kernel may run on many threads at once.
//
// Included by sources compiled for instruction sets that the machine may lack, so nothing here and
// nothing it includes may emit a function with external linkage: the linker keeps any one copy.
#pragma once

#include <cstdint>

#include "linear.h"

namespace vmalloc {

// Most rows and columns of a chunk: its sums stay in the first-level cache's vicinity, and 72 rows
// of x at kMaxDepth fit the second level of an older core with room for the weights that pass.
constexpr std::int64_t kChunkRows = 72;
constexpr std::int64_t kChunkColumns = 64;
constexpr std::int64_t kColumnMultiple = 4;
// Most elements of k that one pass takes: the weights of a tile and of the next one stay in a
// first-level cache of 32 KiB while all rows of the chunk pass by.
constexpr std::int64_t kMaxDepth = 512;

/// A rectangle of one call's output; one thread computes it.
struct LinearChunk {
  std::int64_t first_row;
  std::int64_t num_rows;  // at most kChunkRows
  std::int64_t first_column;
  std::int64_t num_columns;  // at most kChunkColumns
};

using LinearKernel = void (*)(const LinearCall& call, const LinearChunk& chunk);

extern const LinearKernel kLinearPortable;
extern const LinearKernel kLinearAvx2;
extern const LinearKernel kLinearAvx512;

}  // namespace vmalloc
