// linear.cpp: cuts products into tasks and hands them to the workers.
// Owns: nothing.  Thread-safety: see linear.h.
#include "linear.h"

#include <cmath>

#include "thread_pool.h"

namespace vmalloc {
namespace {

float product(const LinearCall& call, const LinearWeight& weight, std::int64_t row,
              std::int64_t column) {
  const float* x = call.x + row * call.x_stride;
  const float* w = weight.data + column * weight.row_stride;
  float sum = 0.0F;
  for (std::int64_t k = 0; k < weight.in_features; ++k) sum += x[k] * w[k];
  return weight.bias != nullptr ? sum + weight.bias[column] : sum;
}

void compute(const LinearCall& call, std::int64_t row, std::int64_t column) {
  float* out = call.out + row * call.out_stride + column;
  const float y = product(call, call.weight, row, column);
  switch (call.epilogue) {
    case LinearEpilogue::kStore:
      *out = call.scale * y;
      break;
    case LinearEpilogue::kAdd:
      *out += call.scale * y;
      break;
    case LinearEpilogue::kSiluGate:
      *out = y / (1.0F + std::exp(-y)) * product(call, call.up, row, column);
      break;
    case LinearEpilogue::kGeluGate: {
      const float inner = 0.7978845608F * (y + 0.044715F * y * y * y);
      *out = 0.5F * y * (1.0F + std::tanh(inner)) * product(call, call.up, row, column);
      break;
    }
  }
}

}  // namespace

void linear(const LinearCall* calls, std::size_t num_calls, std::int64_t num_rows) {
  for (std::size_t i = 0; i < num_calls; ++i) {
    const LinearCall& call = calls[i];
    auto columns = [&call, num_rows](std::size_t column, std::size_t) {
      for (std::int64_t row = 0; row < num_rows; ++row) {
        compute(call, row, static_cast<std::int64_t>(column));
      }
    };
    parallel_for(static_cast<std::size_t>(call.weight.out_features), num_threads(), columns);
  }
}

}  // namespace vmalloc
