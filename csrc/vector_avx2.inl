// vector_avx2.inl: the vocabulary that kernels are written in, on 8-lane AVX2 vectors with FMA.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included by sources compiled for this instruction set, so everything has internal linkage. Not
// every kernel uses every operation.
#include <immintrin.h>

#include <cstdint>

namespace vmalloc {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kAccumulators = 12;  // of 16 registers; the rest hold operands

struct Bf16 {
  std::uint16_t bits;
};

inline Vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec vset(float x) { return _mm256_set1_ps(x); }
inline Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Keep a loaded value in its register: the compiler may load it again for every use.
inline void vkeep(Vec& x) { asm("" : "+x"(x)); }
// sum += a * b, in sum's own register: left to choose, GCC copies sums around.
inline void vfma_into(Vec& sum, Vec a, Vec b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec vselect_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Vec vabs(Vec x) { return _mm256_andnot_ps(vset(-0.0F), x); }
inline Vec vcopysign(Vec x, Vec sign) {
  return _mm256_or_ps(vabs(x), _mm256_and_ps(vset(-0.0F), sign));
}
inline Vec viota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

// 2^n, where n was put into the low mantissa bits of `shifted` by adding 1.5 * 2^23.
inline Vec vpow2(Vec shifted) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)));
}

inline float vreduce_max(Vec x) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

inline float vreduce_add(Vec x) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline Vec load_values(const float* p) { return vload(p); }
inline Vec load_values(const Bf16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
// Head dimensions are multiples of 8: a vector is never half full.
template <typename T>
inline Vec load_half(const T* p) {
  return load_values(p);
}

inline Vec load_quads(const void* low, const void* high, std::int64_t offset) {
  const auto at = [&](const void* row) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(row) + offset));
  };
  return _mm256_insertf128_ps(_mm256_castps128_ps256(at(low)), at(high), 1);
}

// Four 32-bit words at byte `offset` of 8 rows, transposed: lane j of word[i] is row j's word i.
inline void transpose_words(const void* const* rows, std::int64_t offset, Vec* word) {
  Vec z[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) z[i] = load_quads(rows[i], rows[4 + i], offset);
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1]));
  const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1]));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
  word[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  word[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  word[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  word[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}

// The two bf16 halves of each 32-bit word, widened.
inline Vec first_bf16(Vec word) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(word), 16));
}
inline Vec second_bf16(Vec word) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(word), high));
}

// The first `count` values, 1 to kLanes of them, and zeros.
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec vload_first(const float* p, int count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
inline void vstore_first(float* p, Vec x, int count) {
  if (count == kLanes) return vstore(p, x);  // masked stores are slow on some processors
  _mm256_maskstore_ps(p, first_lanes(count), x);
}

// out[0..3] += the sums of all lanes of a, b, c and d.
inline void vadd_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = vadd(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = vadd(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d ab2 = _mm256_castps_pd(ab);
  const __m256d cd2 = _mm256_castps_pd(cd);
  const Vec abcd = vadd(_mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)),
                        _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

}  // namespace
}  // namespace vmalloc
