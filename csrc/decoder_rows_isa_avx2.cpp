// decoder_rows_isa_avx2.cpp: the row kernels of a decoder on 8-lane AVX2 vectors with FMA.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernels are written in the vectors
#include "decoder_rows.h"
#include "vector_avx2.inl"
#include "decoder_rows.inl"
// clang-format on

namespace vmalloc {

const RowKernels kRowsAvx2 = {&normalise_row, &add_normalised_row, &scale_row, &rotate_head,
                              &cap_row};

}  // namespace vmalloc
