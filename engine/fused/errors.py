"""Why a model keeps its stock forward pass.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations


class NotRecognisedError(Exception):
    """The fused decoder cannot stand in for a model; the text says why.

    Never leaves ``engine.fused``: there it is a reason, not a failure.
    """
