"""Exceptions of the engine, under the library's ``VmallocError``.

Owns: nothing.  Thread-safety: immutable classes.
"""

from __future__ import annotations

from ..errors import VmallocError


class UnsupportedModelError(VmallocError):
    """A model that the load probe refused. The text names the check that failed and why.

    Attributes:
        model: class or path of the model.
        check: short name of the failed check, e.g. ``"attention calls"``.
        reason: what was expected and what was seen.
    """

    def __init__(self, model: str, check: str, reason: str) -> None:
        self.model = model
        self.check = check
        self.reason = reason
        super().__init__(f"{model} is not supported: {check}: {reason}")
