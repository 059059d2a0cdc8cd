// decoder_check.h: bounds of everything that a forward pass indexes, checked before any of it is
// used. Owns: nothing.  Thread-safety: pure functions.
#pragma once

#include "decoder.h"

namespace vmalloc {

/// Throws ConfigError, naming the value and its limit, unless the shapes fit each other and
/// attention can run such heads.
void check_model(const DecoderModel& model);

/// The same unless every token id, position and wanted row is in range, and every row that is read
/// or written lies in the cache.
void check_batch(const DecoderModel& model, const DecoderCache& cache, const DecoderBatch& batch);

}  // namespace vmalloc
