// draw_isa_portable.cpp: draws on the compiler's own 4-lane vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernel is written in the vectors
#include "draw_kernel.h"
#include "vector_portable.inl"
#include "draw_kernel.inl"
// clang-format on

namespace vmalloc {

const DrawKernel kDrawPortable = draw_from_row;

}  // namespace vmalloc
