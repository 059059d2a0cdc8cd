// decoder_rows_isa_avx512.cpp: the row kernels of a decoder on 16-lane AVX-512 vectors.
// Owns: nothing.  Thread-safety: pure functions.
// clang-format off: the kernels are written in the vectors
#include "decoder_rows.h"
#include "vector_avx512.inl"
#include "decoder_rows.inl"
// clang-format on

namespace vmalloc {

const RowKernels kRowsAvx512 = {&normalise_row, &add_normalised_row, &scale_row, &rotate_head,
                                &cap_row};

}  // namespace vmalloc
