// bindings_decoder.h: the hook by which the extension module gains the fused decoder.
// Owns: nothing.  Thread-safety: call once, while the module is created.
#pragma once

#include <pybind11/pybind11.h>

namespace vmalloc {

/// Define the decoder's classes in `m`. Requires: ConfigError is translated by the module.
void bind_decoder(pybind11::module_& m);

}  // namespace vmalloc
