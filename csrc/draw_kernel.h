// draw_kernel.h: a draw from one row of logits.
// Owns: nothing.  Thread-safety: pure; the same row gives the same token on any thread.
//
// Included by sources compiled for instruction sets that the machine may lack, so nothing here and
// nothing it includes may emit a function with external linkage: the linker keeps any one copy.
#pragma once

#include <cstdint>

namespace vmalloc {

/// The widest vector; scratch rows are rounded up to it.
constexpr std::int64_t kMostDrawLanes = 16;

struct DrawRow {
  const float* logits = nullptr;
  std::int64_t size = 0;
  float temperature = 1.0F;
  double number = 0.0;  // in [0, 1)
};

/// The token at which the cumulative distribution of softmax(logits / temperature), in order of
/// the tokens, passes `number`; any token where no logit is finite, or one is NaN. `scratch` has
/// twice `size` floats, rounded up to kMostDrawLanes.
using DrawKernel = std::int64_t (*)(const DrawRow& row, float* scratch);

extern const DrawKernel kDrawPortable;
extern const DrawKernel kDrawAvx2;
extern const DrawKernel kDrawAvx512;

}  // namespace vmalloc
