// draw_isa_avx512.cpp: draws on 16-lane AVX-512 vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "draw_kernel.h"
#include "vector_avx512.inl"
#include "draw_kernel.inl"
// clang-format on

namespace vmalloc {

const DrawKernel kDrawAvx512 = draw_from_row;

}  // namespace vmalloc
