"""Exceptions that vmalloc raises; running out of memory is a value, never one of these.

    VmallocError
    ├── ConfigError      (also ValueError)  a value that can never work; names it and the limit
    ├── DriverError                         a driver call failed for a reason other than memory
    ├── InvariantError                      the accounting contradicts itself: a bug, please report
    └── ClosedError                         used after close(), or in a forked child

Owns: nothing.  Thread-safety: immutable classes.
"""


class VmallocError(Exception):
    """Base of every exception that vmalloc raises on purpose."""


class ConfigError(VmallocError, ValueError):
    """A setting or argument that can never work. The text names the value and the limit."""


class DriverError(VmallocError):
    """A driver call failed, and not for lack of memory.

    Attributes:
        call: the driver function, e.g. ``"mmap"`` or ``"cuMemMap"``.
        code: the driver's numeric error code (``errno`` on the host driver).
        name: the code's symbolic name, e.g. ``"EINVAL"``.
    """

    def __init__(self, call: str, code: int, name: str, detail: str = "") -> None:
        self.call = call
        self.code = code
        self.name = name
        text = f"{call} failed with {name} ({code})"
        super().__init__(f"{text}: {detail}" if detail else text)


class InvariantError(VmallocError):
    """The allocator's books do not balance. Always a bug in vmalloc."""


class ClosedError(VmallocError):
    """The cache was closed, or belongs to the parent of this forked process."""
