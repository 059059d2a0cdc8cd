// decoder_rows.h: what a decoder does to one row at a time, between matrix products.
// Owns: nothing.  Thread-safety: pure functions; the same row gives the same bits on any thread.
//
// Included by sources compiled for instruction sets that the machine may lack, so nothing here and
// nothing it includes may emit a function with external linkage: the linker keeps any one copy.
#pragma once

#include <cstdint>

namespace vmalloc {

/// y = x / sqrt(mean(x^2) + eps) * (weight + offset).
struct RowNorm {
  const float* weight = nullptr;  // null: y = x
  float eps = 0.0F;
  float offset = 0.0F;
};

/// Rows of any size.
struct RowKernels {
  /// out = norm(x); they may be one. Requires: the norm has a weight.
  void (*normalise)(const float* x, const RowNorm& norm, std::int64_t size, float* out);
  /// x += multiplier * norm(update). Requires: the norm has a weight.
  void (*add_normalised)(const float* update, const RowNorm& norm, float multiplier,
                         std::int64_t size, float* x);
  /// out = multiplier * x.
  void (*scale)(const float* x, float multiplier, std::int64_t size, float* out);
  /// Rotate the halves of `head[0, 2 * half)` by `turn`: cosines, then sines, `half` of each.
  void (*rotate)(const float* turn, std::int64_t half, float* head);
  /// x = softcap * tanh(x / softcap).
  void (*cap)(float softcap, std::int64_t size, float* x);
};

extern const RowKernels kRowsPortable;
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;

}  // namespace vmalloc
