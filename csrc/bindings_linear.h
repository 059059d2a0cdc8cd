// bindings_linear.h: the hook by which the extension module gains linear products.
// Owns: nothing.  Thread-safety: call once, while the module is created.
#pragma once

#include <pybind11/pybind11.h>

namespace vmalloc {

/// Define `linear` in `m`. Requires: ConfigError is translated by the module.
void bind_linear(pybind11::module_& m);

}  // namespace vmalloc
