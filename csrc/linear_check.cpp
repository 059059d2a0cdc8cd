// linear_check.cpp: refuses linear products that cannot run, by name and limit.
// Owns: nothing.  Thread-safety: pure functions.
#include "linear_check.h"

#include <string>

#include "error.h"

namespace vmalloc {
namespace {

std::string of_call(std::size_t index, const char* name) {
  return "calls[" + std::to_string(index) + "]." + name;
}

[[noreturn]] void fail(const std::string& what, std::int64_t value, const std::string& limit) {
  throw ConfigError(what + " is " + std::to_string(value) + ", must be " + limit);
}

void check_stride(const std::string& name, std::int64_t stride, std::int64_t features,
                  std::int64_t num_rows) {
  if (num_rows > 1 && stride < features) {
    fail(name, stride, "at least the row's length, " + std::to_string(features));
  }
}

void check_present(const std::string& name, const void* data) {
  if (data == nullptr) throw ConfigError(name + " is null");
}

bool is_gate(LinearEpilogue epilogue) {
  return epilogue == LinearEpilogue::kSiluGate || epilogue == LinearEpilogue::kGeluGate;
}

void check_weight(std::size_t index, const char* name, const LinearWeight& weight) {
  const std::string whole = of_call(index, name);
  check_present(whole + ".data", weight.data);
  if (weight.out_features < 1) fail(whole + ".out_features", weight.out_features, "at least 1");
  if (weight.in_features < 1) fail(whole + ".in_features", weight.in_features, "at least 1");
  check_stride(whole + ".row_stride", weight.row_stride, weight.in_features, weight.out_features);
}

void check_gate(std::size_t index, const LinearCall& call) {
  check_weight(index, "up", call.up);
  if (call.up.out_features != call.weight.out_features) {
    fail(of_call(index, "up.out_features"), call.up.out_features,
         "the gate's, " + std::to_string(call.weight.out_features));
  }
  if (call.up.in_features != call.weight.in_features) {
    fail(of_call(index, "up.in_features"), call.up.in_features,
         "the gate's, " + std::to_string(call.weight.in_features));
  }
  if (call.scale != 1.0F) {
    throw ConfigError(of_call(index, "scale") + " is " + std::to_string(call.scale) +
                      ", must be 1 with a gate");
  }
}

void check_call(std::size_t index, const LinearCall& call, std::int64_t num_rows) {
  const auto epilogue = static_cast<std::int32_t>(call.epilogue);
  if (epilogue < 0 || epilogue > static_cast<std::int32_t>(LinearEpilogue::kGeluGate)) {
    fail(of_call(index, "epilogue"), epilogue, "in [0, 3]");
  }
  check_weight(index, "weight", call.weight);
  if (is_gate(call.epilogue)) check_gate(index, call);
  check_present(of_call(index, "x"), call.x);
  check_present(of_call(index, "out"), call.out);
  check_stride(of_call(index, "x_stride"), call.x_stride, call.weight.in_features, num_rows);
  check_stride(of_call(index, "out_stride"), call.out_stride, call.weight.out_features, num_rows);
}

/// `num_rows` rows of `width` elements.
struct Rows {
  const float* data;
  std::int64_t stride;
  std::int64_t width;
};

bool overlap(const Rows& a, const Rows& b, std::int64_t num_rows) {
  constexpr auto kElement = static_cast<std::int64_t>(sizeof(float));
  const auto start = [](const Rows& rows) { return reinterpret_cast<std::intptr_t>(rows.data); };
  const auto end = [&](const Rows& rows) {
    return start(rows) + ((num_rows - 1) * rows.stride + rows.width) * kElement;
  };
  if (end(a) <= start(b) || end(b) <= start(a)) return false;
  if (num_rows == 1) return true;         // and the strides may be anything
  if (a.stride != b.stride) return true;  // or may: not worth finding out
  // Rows of one buffer that alternate.
  const std::int64_t row = a.stride * kElement;
  const std::int64_t apart = ((start(b) - start(a)) % row + row) % row;
  return apart < a.width * kElement || apart + b.width * kElement > row;
}

}  // namespace

void check_linear(const LinearCall* calls, std::size_t num_calls, std::int64_t num_rows) {
  if (num_rows < 0) fail("num_rows", num_rows, "at least 0");
  if (num_rows == 0) return;
  for (std::size_t i = 0; i < num_calls; ++i) check_call(i, calls[i], num_rows);
  for (std::size_t i = 0; i < num_calls; ++i) {
    const Rows out = {calls[i].out, calls[i].out_stride, calls[i].weight.out_features};
    for (std::size_t j = 0; j < num_calls; ++j) {
      const Rows x = {calls[j].x, calls[j].x_stride, calls[j].weight.in_features};
      const Rows other = {calls[j].out, calls[j].out_stride, calls[j].weight.out_features};
      if (overlap(out, x, num_rows)) {
        throw ConfigError(of_call(i, "out") + " shares memory with " + of_call(j, "x"));
      }
      if (i < j && overlap(out, other, num_rows)) {
        throw ConfigError(of_call(i, "out") + " shares memory with " + of_call(j, "out"));
      }
    }
  }
}

}  // namespace vmalloc
