// attention_isa_avx2.cpp: the attention kernel on 8-lane AVX2 vectors with FMA.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "attention_kernel.h"
#include "vector_avx2.inl"
#include "attention_kernel.inl"
// clang-format on

namespace vmalloc {

const AttentionKernel kAttentionAvx2 = {kContiguousRuns, kBlockTableRuns};

}  // namespace vmalloc
