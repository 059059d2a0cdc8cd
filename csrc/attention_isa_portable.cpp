// attention_isa_portable.cpp: the attention kernel on the compiler's own 4-lane vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "attention_kernel.h"
#include "vector_portable.inl"
#include "attention_kernel.inl"
// clang-format on

namespace vmalloc {

const AttentionKernel kAttentionPortable = {kContiguousRuns, kBlockTableRuns};

}  // namespace vmalloc
