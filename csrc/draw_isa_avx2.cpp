// draw_isa_avx2.cpp: draws on 8-lane AVX2 vectors with FMA.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "draw_kernel.h"
#include "vector_avx2.inl"
#include "draw_kernel.inl"
// clang-format on

namespace vmalloc {

const DrawKernel kDrawAvx2 = draw_from_row;

}  // namespace vmalloc
