// linear_isa_avx2.cpp: linear products on 8-lane AVX2 vectors with FMA.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "linear_kernel.h"
#include "vector_avx2.inl"
#include "linear_kernel.inl"
// clang-format on

namespace vmalloc {

const LinearKernel kLinearAvx2 = run_chunk;

}  // namespace vmalloc
