"""What every measurement has in common: where it comes from, seeded lengths, one look for figures.

Light: neither torch nor the core is loaded, so that a benchmark may run before either is there.

Owns: nothing.  Thread-safety: see each file.
"""
