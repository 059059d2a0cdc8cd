"""Native forward passes for module graphs that are known: same logits, less between products.

Owns: nothing.  Thread-safety: see each module.
"""

from __future__ import annotations

from .choice import choose_fused
from .forward import FusedForward
from .recognise import recognise

__all__ = ["FusedForward", "choose_fused", "recognise"]
