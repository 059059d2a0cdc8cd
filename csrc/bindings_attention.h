// bindings_attention.h: the hook by which the extension module gains the CPU attention functions.
// Owns: nothing.  Thread-safety: call once, while the module is created.
#pragma once

#include <pybind11/pybind11.h>

namespace vmalloc {

/// Define the attention functions in `m`. Requires: ConfigError is translated by the module.
void bind_attention(pybind11::module_& m);

}  // namespace vmalloc
