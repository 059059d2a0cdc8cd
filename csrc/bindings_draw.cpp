// bindings_draw.cpp: draws and their random numbers for Python.
// Owns: nothing; the caller keeps the logits alive.  Thread-safety: a draw releases the GIL.
#include "bindings_draw.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "draw.h"
#include "error.h"
#include "philox.h"

namespace py = pybind11;

namespace vmalloc {
namespace {

void check_count(const char* name, std::size_t count, std::size_t expected) {
  if (count == expected) return;
  throw ConfigError(std::string(name) + " has " + std::to_string(count) + " entries, must be " +
                    std::to_string(expected));
}

}  // namespace

void bind_draw(py::module_& m) {
  m.def(
      "draw",
      [](std::uintptr_t logits, std::int64_t num_rows, std::int64_t vocab_size,
         const std::vector<std::int64_t>& rows, const std::vector<float>& temperatures,
         const std::vector<std::uint64_t>& seeds, const std::vector<std::uint32_t>& choice_idx,
         const std::vector<std::uint32_t>& positions) {
        check_count("temperatures", temperatures.size(), rows.size());
        check_count("seeds", seeds.size(), rows.size());
        check_count("choice_idx", choice_idx.size(), rows.size());
        check_count("positions", positions.size(), rows.size());
        std::vector<DrawSettings> settings(rows.size());
        for (std::size_t i = 0; i < rows.size(); ++i) {
          settings[i] = {rows[i], temperatures[i], seeds[i], choice_idx[i], positions[i]};
        }
        const py::gil_scoped_release release;
        return draw_tokens(reinterpret_cast<const float*>(logits), num_rows, vocab_size, settings);
      },
      py::arg("logits"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("rows"),
      py::arg("temperatures"), py::arg("seeds"), py::arg("choice_idx"), py::arg("positions"),
      "A token for each of some rows; vmalloc.kernels.draw_cpu is the checked way in.");
  m.def(
      "uniforms",
      [](const std::vector<std::uint64_t>& seeds, const std::vector<std::uint32_t>& choice_idx,
         const std::vector<std::uint32_t>& positions) {
        check_count("choice_idx", choice_idx.size(), seeds.size());
        check_count("positions", positions.size(), seeds.size());
        std::vector<double> numbers(seeds.size());
        for (std::size_t i = 0; i < seeds.size(); ++i) {
          numbers[i] = philox_uniform(seeds[i], choice_idx[i], positions[i]);
        }
        return numbers;
      },
      py::arg("seeds"), py::arg("choice_idx"), py::arg("positions"),
      "Numbers in [0, 1) with 53 random bits; see vmalloc.kernels.draw_cpu.");
  m.def(
      "philox4x32",
      [](const std::vector<std::uint32_t>& counter, const std::vector<std::uint32_t>& key) {
        check_count("counter", counter.size(), 4);
        check_count("key", key.size(), 2);
        const PhiloxCounter words =
            philox4x32({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
        return std::vector<std::uint32_t>(words.begin(), words.end());
      },
      py::arg("counter"), py::arg("key"),
      "Four random 32-bit words (Salmon et al., SC11), ten rounds.");
}

}  // namespace vmalloc
