// bindings_linear.cpp: linear products for Python, addresses and strides as integers.
// Owns: nothing; the caller keeps the tensors alive.  Thread-safety: releases the GIL.
#include "bindings_linear.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "linear.h"

namespace py = pybind11;

namespace vmalloc {
namespace {

using Rows = std::tuple<std::uintptr_t, std::int64_t>;
// Address, elements from one row to the next, bias or 0, out_features, in_features.
using Weight = std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t, std::int64_t>;
// x, weight, up, out, epilogue, scale.
using Call = std::tuple<Rows, Weight, std::optional<Weight>, Rows, std::int32_t, float>;

LinearWeight linear_weight(const Weight& tuple) {
  const auto& [data, row_stride, bias, out_features, in_features] = tuple;
  LinearWeight weight;
  weight.data = reinterpret_cast<const float*>(data);
  weight.row_stride = row_stride;
  weight.bias = reinterpret_cast<const float*>(bias);
  weight.out_features = out_features;
  weight.in_features = in_features;
  return weight;
}

LinearCall linear_call(const Call& tuple) {
  const auto& [x, weight, up, out, epilogue, scale] = tuple;
  LinearCall call;
  call.x = reinterpret_cast<const float*>(std::get<0>(x));
  call.x_stride = std::get<1>(x);
  call.weight = linear_weight(weight);
  if (up) call.up = linear_weight(*up);
  call.out = reinterpret_cast<float*>(std::get<0>(out));
  call.out_stride = std::get<1>(out);
  call.epilogue = static_cast<LinearEpilogue>(epilogue);
  call.scale = scale;
  return call;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def(
      "linear",
      [](const std::vector<Call>& calls, std::int64_t num_rows) {
        std::vector<LinearCall> products;
        products.reserve(calls.size());
        for (const Call& call : calls) products.push_back(linear_call(call));
        const py::gil_scoped_release release;
        linear(products.data(), products.size(), num_rows);
      },
      py::arg("calls"), py::arg("num_rows"),
      "Products of float32 rows with Linear weights, in one parallel region; see csrc/linear.h.");
}

}  // namespace vmalloc
