// vector_avx512.inl: the vocabulary that kernels are written in, on 16-lane AVX-512 vectors.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included by sources compiled for this instruction set, so everything has internal linkage. Not
// every kernel uses every operation.
#include <immintrin.h>

#include <cstdint>

// GCC 12 takes the deliberately undefined operand inside its own intrinsics for a bug (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace vmalloc {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kAccumulators = 24;  // of 32 registers; the rest hold operands

struct Bf16 {
  std::uint16_t bits;
};

inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec vset(float x) { return _mm512_set1_ps(x); }
inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Keep a loaded value in its register: the compiler may load it again for every use.
inline void vkeep(Vec& x) { asm("" : "+v"(x)); }
// sum += a * b, in sum's own register: left to choose, GCC copies sums around.
inline void vfma_into(Vec& sum, Vec a, Vec b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec vselect_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline Vec vabs(Vec x) { return _mm512_andnot_ps(vset(-0.0F), x); }
inline Vec vcopysign(Vec x, Vec sign) {
  return _mm512_or_ps(vabs(x), _mm512_and_ps(vset(-0.0F), sign));
}
inline Vec viota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// 2^n, where n was put into the low mantissa bits of `shifted` by adding 1.5 * 2^23.
inline Vec vpow2(Vec shifted) {
  const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(0x3f800000)));
}

inline __m256 upper(Vec x) { return _mm512_extractf32x8_ps(x, 1); }
inline __m256 lower(Vec x) { return _mm512_castps512_ps256(x); }

inline float vreduce_max(Vec x) {
  const __m256 a = _mm256_max_ps(lower(x), upper(x));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

inline float vreduce_add(Vec x) {
  const __m256 a = _mm256_add_ps(lower(x), upper(x));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

inline Vec widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// kLanes values, or the 8 that a head whose dimension is an odd multiple of 8 ends with.
inline Vec load_values(const float* p) { return vload(p); }
inline Vec load_values(const Bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_half(const float* p) { return _mm512_zextps256_ps512(_mm256_loadu_ps(p)); }
inline Vec load_half(const Bf16* p) {
  return widen(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline __m128 load_quad(const void* p) { return _mm_loadu_ps(static_cast<const float*>(p)); }

// Four 32-bit words at byte `offset` of 16 rows, transposed: lane j of word[i] is row j's word i.
inline void transpose_words(const void* const* rows, std::int64_t offset, Vec* word) {
  Vec z[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int row) { return static_cast<const char*>(rows[row]) + offset; };
    z[i] = _mm512_castps128_ps512(load_quad(at(i)));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x00f0, load_quad(at(4 + i)));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0x0f00, load_quad(at(8 + i)));
    z[i] = _mm512_mask_broadcast_f32x4(z[i], 0xf000, load_quad(at(12 + i)));
  }
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
  word[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  word[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  word[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  word[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// The two bf16 halves of each 32-bit word, widened.
inline Vec first_bf16(Vec word) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(word), 16));
}
inline Vec second_bf16(Vec word) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(word), high));
}

// The first `count` values, 1 to kLanes of them, and zeros.
inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1U << count) - 1U); }
inline Vec vload_first(const float* p, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
inline void vstore_first(float* p, Vec x, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), x);
}

// out[0..3] += the sums of all lanes of a, b, c and d.
inline void vadd_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = vadd(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = vadd(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab2 = _mm512_castps_pd(ab);
  const __m512d cd2 = _mm512_castps_pd(cd);
  const Vec abcd = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                        _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 half = _mm256_add_ps(lower(abcd), upper(abcd));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

}  // namespace
}  // namespace vmalloc
