"""The HTTP endpoint will live here; this version has none.

Owns: nothing.  Thread-safety: nothing to share.
"""

if __name__ != "vmalloc.server":
    raise ImportError("import vmalloc.server instead: a second copy of the server is a bug")
