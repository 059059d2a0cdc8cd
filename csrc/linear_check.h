// linear_check.h: refuses linear products that cannot run, by name and limit.
// Owns: nothing.  Thread-safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace vmalloc {

/// Throws ConfigError, see `linear`.
void check_linear(const LinearCall* calls, std::size_t num_calls, std::int64_t num_rows);

}  // namespace vmalloc
