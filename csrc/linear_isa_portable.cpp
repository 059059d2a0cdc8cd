// linear_isa_portable.cpp: linear products on the compiler's own 4-lane vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "linear_kernel.h"
#include "vector_portable.inl"
#include "linear_kernel.inl"
// clang-format on

namespace vmalloc {

const LinearKernel kLinearPortable = run_chunk;

}  // namespace vmalloc
