// draw.cpp: checks draws, and shares their rows among threads.
// Owns: scratch memory during a call.  Thread-safety: every function, from any thread.
#include "draw.h"

#include <algorithm>
#include <string>

#include "aligned_floats.h"
#include "cpu_isa.h"
#include "draw_kernel.h"
#include "error.h"
#include "philox.h"
#include "thread_pool.h"

namespace vmalloc {
namespace {

// Below this many logits a draw is done before a worker would have woken.
constexpr std::int64_t kLogitsWorthSharing = 1 << 16;

DrawKernel draw_kernel() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case CpuIsa::kAvx512:
      return kDrawAvx512;
    case CpuIsa::kAvx2:
      return kDrawAvx2;
#endif
    default:
      return kDrawPortable;
  }
}

void check_draws(std::int64_t num_rows, std::int64_t vocab_size,
                 const std::vector<DrawSettings>& settings) {
  if (vocab_size < 1) {
    throw ConfigError("vocab_size is " + std::to_string(vocab_size) + ", must be at least 1");
  }
  for (const DrawSettings& one : settings) {
    if (one.row < 0 || one.row >= num_rows) {
      throw ConfigError("row is " + std::to_string(one.row) + ", must be in [0, " +
                        std::to_string(num_rows) + ")");
    }
    if (!(one.temperature > 0.0F)) {
      throw ConfigError("temperature is " + std::to_string(one.temperature) + ", must be above 0");
    }
  }
}

}  // namespace

std::vector<std::int64_t> draw_tokens(const float* logits, std::int64_t num_rows,
                                      std::int64_t vocab_size,
                                      const std::vector<DrawSettings>& settings) {
  check_draws(num_rows, vocab_size, settings);
  const DrawKernel kernel = draw_kernel();
  const std::size_t count = settings.size();
  const bool shares = static_cast<std::int64_t>(count) * vocab_size >= kLogitsWorthSharing;
  const std::size_t threads = std::min(shares ? num_threads() : 1, std::max<std::size_t>(count, 1));
  const std::int64_t padded = (vocab_size + kMostDrawLanes - 1) / kMostDrawLanes * kMostDrawLanes;
  AlignedFloats scratch;
  scratch.reserve(2 * padded * static_cast<std::int64_t>(threads));
  std::vector<std::int64_t> tokens(count);
  auto draw_share = [&](std::size_t task, std::size_t) {
    float* const own = scratch.data() + 2 * padded * static_cast<std::int64_t>(task);
    for (std::size_t i = count * task / threads; i < count * (task + 1) / threads; ++i) {
      const DrawSettings& one = settings[i];
      const double number = philox_uniform(one.seed, one.choice, one.position);
      tokens[i] = kernel({logits + one.row * vocab_size, vocab_size, one.temperature, number}, own);
    }
  };
  parallel_for(threads, threads, draw_share);
  return tokens;
}

}  // namespace vmalloc
