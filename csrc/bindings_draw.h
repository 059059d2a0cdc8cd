// bindings_draw.h: the hook by which the extension module gains random draws.
// Owns: nothing.  Thread-safety: call once, while the module is created.
#pragma once

#include <pybind11/pybind11.h>

namespace vmalloc {

/// Define `draw`, `uniforms` and `philox4x32` in `m`. Requires: ConfigError is translated by the
/// module.
void bind_draw(pybind11::module_& m);

}  // namespace vmalloc
