// draw_kernel.inl: a draw from one row of logits, written once for all vectors.
// Owns: nothing.  Thread-safety: pure functions over the caller's scratch memory.
//
// Included after vector_*.inl of one instruction set.

#include "vector_math.inl"

namespace vmalloc {
namespace {

// Up to kLanes logits; the lanes past `count` have no probability.
inline Vec load_logits(const float* p, std::int64_t count) {
  if (count >= kLanes) return vload(p);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : -__builtin_inff();
  return vload(lanes);
}

std::int64_t draw_from_row(const DrawRow& row, float* scratch) {
  const std::int64_t num_vectors = (row.size + kLanes - 1) / kLanes;
  float* const weights = scratch;
  float* const sums = scratch + num_vectors * kLanes;  // of each vector's weights
  Vec highest = vset(-__builtin_inff());
  for (std::int64_t i = 0; i < row.size; i += kLanes) {
    highest = vmax(highest, load_logits(row.logits + i, row.size - i));
  }
  // From the maximum down, so that a tiny temperature gives -inf and never inf.
  const Vec maximum = vset(vreduce_max(highest));
  const Vec temperature = vset(row.temperature);
  double total = 0.0;
  for (std::int64_t v = 0; v < num_vectors; ++v) {
    const std::int64_t first = v * kLanes;
    const Vec logits = load_logits(row.logits + first, row.size - first);
    const Vec weight = vexp(vdiv(vsub(logits, maximum), temperature));
    vstore(weights + first, weight);
    sums[v] = vreduce_add(weight);
    total += static_cast<double>(sums[v]);
  }
  // Rounded up to the whole sum, a number would find nothing.
  const double target = __builtin_fmin(row.number * total, __builtin_nextafter(total, 0.0));
  double below = 0.0;
  for (std::int64_t v = 0; v < num_vectors; ++v) {
    const double after = below + static_cast<double>(sums[v]);
    if (!(after > target)) {
      below = after;
      continue;
    }
    // Added up one by one they may round to less than their sum: then it is the last of them.
    std::int64_t last = 0;
    for (std::int64_t i = v * kLanes; i < (v + 1) * kLanes; ++i) {
      if (!(weights[i] > 0.0F)) continue;
      last = i;
      below += static_cast<double>(weights[i]);
      if (below > target) break;
    }
    return last;
  }
  return row.size - 1;
}

}  // namespace
}  // namespace vmalloc
