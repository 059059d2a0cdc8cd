// linear_isa_avx512.cpp: linear products on 16-lane AVX-512 vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "linear_kernel.h"
#include "vector_avx512.inl"
#include "linear_kernel.inl"
// clang-format on

namespace vmalloc {

const LinearKernel kLinearAvx512 = run_chunk;

}  // namespace vmalloc
