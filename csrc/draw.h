// draw.h: random draws of tokens from rows of logits, all rows at once.
// Owns: nothing.  Thread-safety: every function, from any thread.
#pragma once

#include <cstdint>
#include <vector>

namespace vmalloc {

/// What one row is drawn by: see philox_uniform for the three numbers.
struct DrawSettings {
  std::int64_t row = 0;
  float temperature = 1.0F;
  std::uint64_t seed = 0;
  std::uint32_t choice = 0;
  std::uint32_t position = 0;
};

/// A token for each of `settings`, from softmax(logits[row] / temperature). A token depends on its
/// own row and settings alone, not on the others nor on the number of threads. A row with a NaN or
/// without a finite maximum gives any token.
///
/// `logits`: [num_rows][vocab_size]. Throws ConfigError if a row is outside it, a temperature is
/// not a positive number, or there is no vocabulary.
[[nodiscard]] std::vector<std::int64_t> draw_tokens(const float* logits, std::int64_t num_rows,
                                                    std::int64_t vocab_size,
                                                    const std::vector<DrawSettings>& settings);

}  // namespace vmalloc
