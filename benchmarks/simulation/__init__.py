"""The real scheduler and allocator over a device that is only computed; see ``simulate.py``.

Owns: nothing.  Thread-safety: nothing to share.
"""
