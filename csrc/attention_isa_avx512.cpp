// attention_isa_avx512.cpp: the attention kernel on 16-lane AVX-512 vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "attention_kernel.h"
#include "vector_avx512.inl"
#include "attention_kernel.inl"
// clang-format on

namespace vmalloc {

const AttentionKernel kAttentionAvx512 = {kContiguousRuns, kBlockTableRuns};

}  // namespace vmalloc
