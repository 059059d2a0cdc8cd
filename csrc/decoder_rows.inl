// decoder_rows.inl: the row kernels of a decoder, written once for all vectors.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included after vector_*.inl of one instruction set.

#include "vector_math.inl"

namespace vmalloc {
namespace {

// Up to kLanes values; the lanes past `count` are 0.
inline Vec load_first(const float* p, std::int64_t count) {
  if (count >= kLanes) return vload(p);
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return vload(lanes);
}

inline void store_first(float* p, Vec x, std::int64_t count) {
  if (count >= kLanes) return vstore(p, x);
  float lanes[kLanes];
  vstore(lanes, x);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Call `body(i, count)` for each vector of `size` elements; only the last may have fewer than
// kLanes. `count` is a constant wherever that lets the compiler drop the tail's code.
template <typename Body>
inline void for_vectors(std::int64_t size, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, std::int64_t{kLanes});
  if (i < size) body(i, size - i);
}

float sum_of_squares(const float* x, std::int64_t size) {
  constexpr int kChains = 4;  // as many sums as hide the latency of one
  Vec sum[kChains];
  for (Vec& one : sum) one = vset(0.0F);
  std::int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Vec v = vload(x + i + c * kLanes);
      sum[c] = vfma(v, v, sum[c]);
    }
  }
  for (int c = 0; i < size; i += kLanes, ++c) {
    const Vec v = load_first(x + i, size - i);
    sum[c] = vfma(v, v, sum[c]);
  }
  return vreduce_add(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

// What a row is multiplied with, but for the weights.
inline Vec norm_factor(const float* x, const RowNorm& norm, std::int64_t size) {
  const float mean = sum_of_squares(x, size) / static_cast<float>(size);
  return vset(1.0F / __builtin_sqrtf(mean + norm.eps));
}

void normalise_row(const float* x, const RowNorm& norm, std::int64_t size, float* out) {
  const Vec factor = norm_factor(x, norm, size);
  const Vec offset = vset(norm.offset);
  for_vectors(size, [&](std::int64_t i, std::int64_t count) {
    const Vec weight = vadd(load_first(norm.weight + i, count), offset);
    store_first(out + i, vmul(vmul(load_first(x + i, count), factor), weight), count);
  });
}

void add_normalised_row(const float* update, const RowNorm& norm, float multiplier,
                        std::int64_t size, float* x) {
  const Vec factor = norm_factor(update, norm, size);
  const Vec offset = vset(norm.offset);
  const Vec scale = vset(multiplier);
  for_vectors(size, [&](std::int64_t i, std::int64_t count) {
    const Vec weight = vadd(load_first(norm.weight + i, count), offset);
    const Vec y = vmul(vmul(load_first(update + i, count), factor), weight);
    store_first(x + i, vfma(y, scale, load_first(x + i, count)), count);
  });
}

void scale_row(const float* x, float multiplier, std::int64_t size, float* out) {
  const Vec factor = vset(multiplier);
  for_vectors(size, [&](std::int64_t i, std::int64_t count) {
    store_first(out + i, vmul(load_first(x + i, count), factor), count);
  });
}

void rotate_head(const float* turn, std::int64_t half, float* head) {
  for_vectors(half, [&](std::int64_t i, std::int64_t count) {
    const Vec cosine = load_first(turn + i, count);
    const Vec sine = load_first(turn + half + i, count);
    const Vec low = load_first(head + i, count);
    const Vec high = load_first(head + half + i, count);
    const Vec minus_high = vsub(vset(0.0F), high);
    store_first(head + i, vfma(minus_high, sine, vmul(low, cosine)), count);
    store_first(head + half + i, vfma(low, sine, vmul(high, cosine)), count);
  });
}

void cap_row(float softcap, std::int64_t size, float* x) {
  const Vec cap = vset(softcap);
  for_vectors(size, [&](std::int64_t i, std::int64_t count) {
    store_first(x + i, vmul(vtanh(vdiv(load_first(x + i, count), cap)), cap), count);
  });
}

}  // namespace
}  // namespace vmalloc
