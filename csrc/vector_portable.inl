// vector_portable.inl: the vocabulary that kernels are written in, on the compiler's own 4-lane
// vectors. Owns: nothing.  Thread-safety: pure functions.
//
// For x86 before AVX2 and for other processors. Written with the vector extension of GCC and Clang,
// which becomes SSE2, NEON or scalar code as the target allows. Included by sources compiled for
// this instruction set, so everything has internal linkage. Not every kernel uses every operation.
#include <cstdint>

namespace vmalloc {
namespace {

using Vec = float __attribute__((vector_size(16)));
using IntVec = std::int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kAccumulators = 12;

struct Bf16 {
  std::uint16_t bits;
};

inline IntVec bits_of(Vec x) {
  IntVec bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline Vec from_bits(IntVec bits) {
  Vec x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline Vec vload(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void vstore(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }
inline Vec vset(float x) { return Vec{x, x, x, x}; }
inline Vec vadd(Vec a, Vec b) { return a + b; }
inline Vec vsub(Vec a, Vec b) { return a - b; }
inline Vec vmul(Vec a, Vec b) { return a * b; }
inline Vec vdiv(Vec a, Vec b) { return a / b; }
inline Vec vfma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF
  // Explicit, so that no two places differ in what the compiler contracts.
  return Vec{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]),
             __builtin_fmaf(a[2], b[2], c[2]), __builtin_fmaf(a[3], b[3], c[3])};
#else
  return a * b + c;
#endif
}
inline void vkeep(Vec&) {}
inline void vfma_into(Vec& sum, Vec a, Vec b) { sum = vfma(a, b, sum); }
inline Vec vselect_less(Vec a, Vec b, Vec yes, Vec no) {
  const IntVec mask = a < b;
  return from_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}
// Of a NaN and a number, the second operand, as on x86.
inline Vec vmax(Vec a, Vec b) { return vselect_less(b, a, a, b); }
inline Vec vmin(Vec a, Vec b) { return vselect_less(a, b, a, b); }
inline Vec vabs(Vec x) { return from_bits(bits_of(x) & 0x7fffffff); }
inline Vec vcopysign(Vec x, Vec sign) {
  return from_bits(bits_of(vabs(x)) | (bits_of(sign) & ~0x7fffffff));
}
inline Vec viota() { return Vec{0, 1, 2, 3}; }

// 2^n, where n was put into the low mantissa bits of `shifted` by adding 1.5 * 2^23.
inline Vec vpow2(Vec shifted) { return from_bits((bits_of(shifted) << 23) + 0x3f800000); }

inline float larger(float a, float b) { return b < a ? a : b; }
inline float vreduce_max(Vec x) { return larger(larger(x[0], x[2]), larger(x[1], x[3])); }
inline float vreduce_add(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

inline Vec load_values(const float* p) { return vload(p); }
inline Vec load_values(const Bf16* p) {
  return from_bits(IntVec{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
// Head dimensions are multiples of 8: a vector is never half full.
template <typename T>
inline Vec load_half(const T* p) {
  return load_values(p);
}

// Four 32-bit words at byte `offset` of 4 rows, transposed: lane j of word[i] is row j's word i.
inline void transpose_words(const void* const* rows, std::int64_t offset, Vec* word) {
  float z[4][4];
  for (int i = 0; i < 4; ++i) {
    __builtin_memcpy(z[i], static_cast<const char*>(rows[i]) + offset, sizeof z[i]);
  }
  for (int i = 0; i < 4; ++i) word[i] = Vec{z[0][i], z[1][i], z[2][i], z[3][i]};
}

// The two bf16 halves of each 32-bit word, widened.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bf16 pairs are unpacked in little-endian order"
#endif
inline Vec first_bf16(Vec word) { return from_bits(bits_of(word) << 16); }
inline Vec second_bf16(Vec word) { return from_bits(bits_of(word) & ~0xffff); }

// The first `count` values, 1 to kLanes of them, and zeros.
inline Vec vload_first(const float* p, int count) {
  if (count == kLanes) return vload(p);
  Vec x = vset(0.0F);
  for (int i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
inline void vstore_first(float* p, Vec x, int count) {
  if (count == kLanes) return vstore(p, x);
  for (int i = 0; i < count; ++i) p[i] = x[i];
}

// out[0..3] += the sums of all lanes of a, b, c and d.
inline void vadd_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  vstore(out, vload(out) + Vec{vreduce_add(a), vreduce_add(b), vreduce_add(c), vreduce_add(d)});
}

}  // namespace
}  // namespace vmalloc
