"""A/B: the same seeded requests through several KV caches, measured side by side.

Owns: nothing.  Thread-safety: see each file.
"""
