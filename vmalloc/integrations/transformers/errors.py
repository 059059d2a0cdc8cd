"""What a ``VirtualCache`` raises beyond the library's own exceptions.

Owns: nothing.  Thread-safety: immutable classes.
"""

from __future__ import annotations

from ...errors import VmallocError


class CacheFullError(VmallocError, MemoryError):
    """The cache cannot hold what it was given; the text names the cap. It is as it was before.

    transformers has no way to say "not now", so this is an exception and not a value.
    """


class InferenceOnlyError(VmallocError, RuntimeError):
    """``backward()`` came to keys or values that lie in a ``VirtualCache``."""
