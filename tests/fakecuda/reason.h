// reason.h: a refusal with its reason in words, kept for the thread that was refused.
// Owns: one text a thread.  Thread-safety: all functions.
#pragma once

#include "abi.h"

namespace fakecuda {

/// Notes why (printf format) and returns `code`. FAKECUDA_VERBOSE=1 prints it to stderr as well.
[[gnu::format(printf, 2, 3)]] CUresult refuse(CUresult code, const char* format, ...);

/// The calling thread's last reason; "" if there was none.
const char* last_reason();

}  // namespace fakecuda
