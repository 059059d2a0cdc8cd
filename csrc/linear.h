// linear.h: float32 products of rows with torch Linear weights, several in one parallel region.
// Owns: nothing; callers own all memory.  Thread-safety: `linear`, from any thread, as long as no
// call writes what another one reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vmalloc {

/// y = x W^T + bias. Weights are read where torch keeps them: there is no packed copy.
struct LinearWeight {
  const float* data = nullptr;  // [out_features][in_features]
  std::int64_t row_stride = 0;  // elements from one row to the next, at least in_features
  const float* bias = nullptr;  // [out_features], or null
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
};

/// What becomes of y = x W^T + bias.
enum class LinearEpilogue : std::int32_t {
  kStore = 0,     // out = scale * y
  kAdd = 1,       // out += scale * y
  kSiluGate = 2,  // out = silu(y) * (x up^T + up's bias)
  kGeluGate = 3,  // as above with gelu by its tanh form
};

/// One product of `num_rows` rows. Strides count elements from one row to the next.
struct LinearCall {
  const float* x = nullptr;  // [num_rows][in_features]
  std::int64_t x_stride = 0;
  LinearWeight weight;
  LinearWeight up;       // of the gates: as many features as `weight`; else unused
  float* out = nullptr;  // [num_rows][out_features]
  std::int64_t out_stride = 0;
  LinearEpilogue epilogue = LinearEpilogue::kStore;
  float scale = 1.0F;  // 1 with the gates
};

/// Compute `num_calls` products of `num_rows` rows each in one parallel region.
///
/// A row's result is the same to the last bit whatever the other rows are and how many, whatever
/// the other calls and the number of threads (on one instruction set). Throws ConfigError, with
/// nothing written, on features below 1, rows that overlap, a gate whose shapes differ, and an
/// `out` that shares elements with any x or other out of the calls (rows may alternate in one
/// buffer). With 0 rows it does nothing.
void linear(const LinearCall* calls, std::size_t num_calls, std::int64_t num_rows);

}  // namespace vmalloc
