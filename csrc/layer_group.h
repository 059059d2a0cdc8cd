// layer_group.h: what one token stores per layer, and the rows that groups of layers make of it.
// Owns: nothing.  Thread-safety: immutable values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vmalloc {

/// One layer's share of a token: `num_kv_heads` keys and as many values.
struct LayerKVSpec {
  std::uint32_t num_kv_heads;
  std::uint32_t k_head_dim;
  std::uint32_t v_head_dim;
  std::uint32_t element_bytes;

  [[nodiscard]] std::size_t k_bytes() const {
    return std::size_t{num_kv_heads} * k_head_dim * element_bytes;
  }
  [[nodiscard]] std::size_t v_bytes() const {
    return std::size_t{num_kv_heads} * v_head_dim * element_bytes;
  }
};

/// Row sizes of the address ranges that hold `layers`, `layers_per_group` at a time: one range per
/// group, or with `kv_split` one for its keys and one for its values.
[[nodiscard]] inline std::vector<std::size_t> region_row_bytes(
    const std::vector<LayerKVSpec>& layers, std::size_t layers_per_group, bool kv_split) {
  std::vector<std::size_t> rows;
  for (std::size_t first = 0; first < layers.size(); first += layers_per_group) {
    std::size_t k_bytes = 0, v_bytes = 0;
    for (std::size_t i = first; i < layers.size() && i < first + layers_per_group; ++i) {
      k_bytes += layers[i].k_bytes();
      v_bytes += layers[i].v_bytes();
    }
    if (kv_split) {
      rows.push_back(k_bytes);
      rows.push_back(v_bytes);
    } else {
      rows.push_back(k_bytes + v_bytes);
    }
  }
  return rows;
}

}  // namespace vmalloc
