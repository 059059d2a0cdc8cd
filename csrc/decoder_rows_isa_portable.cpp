// decoder_rows_isa_portable.cpp: the row kernels of a decoder on the compiler's own 4-lane vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernels are written in the vectors
#include "decoder_rows.h"
#include "vector_portable.inl"
#include "decoder_rows.inl"
// clang-format on

namespace vmalloc {

const RowKernels kRowsPortable = {&normalise_row, &add_normalised_row, &scale_row, &rotate_head,
                                  &cap_row};

}  // namespace vmalloc
