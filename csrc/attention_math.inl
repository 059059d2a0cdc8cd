// attention_math.inl: tile arithmetic and number conversions.
// Owns: nothing.  Thread-safety: pure functions.
//
// Included by attention_kernel.inl.

#include "vector_math.inl"

namespace vmalloc {
namespace {

constexpr int kTileVectors = kTileKeys / kLanes;
constexpr float kInfinity = __builtin_inff();

inline int clamp_to_tile(std::int64_t key) {
  return key < 0 ? 0 : key > kTileKeys ? kTileKeys : static_cast<int>(key);
}

// The most columns that `rows` rows of accumulators leave registers for.
constexpr int columns_for(int rows, int limit) {
  int columns = 8;
  while (columns > 2 && columns * rows > kAccumulators) columns /= 2;
  return columns < limit ? columns : limit;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  const std::uint32_t quiet_nan = bits | 0x400000U;
  out->bits = static_cast<std::uint16_t>((x == x ? rounded : quiet_nan) >> 16);
}

}  // namespace
}  // namespace vmalloc
