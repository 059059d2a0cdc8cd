// attention_check.h: bounds of everything that indexes the cache, checked before any of it is used.
// Owns: nothing.  Thread-safety: pure functions.
#pragma once

#include "attention_cpu.h"

namespace vmalloc {

/// Throws ConfigError, naming the value and its limit, unless every row that the batch reads or
/// writes lies in the packed rows and in the cache. Table entries past a sequence's last row are
/// not looked at.
void check_batch(const VarlenBatch& batch);

/// The batch, and that the kernel can run such heads, head dimensions, window and softcap.
void check_args(const AttentionArgs& args);

}  // namespace vmalloc
