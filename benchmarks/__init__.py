"""Measurements of vmalloc. Scripts of this folder run by path; ``gpu`` as modules from the root.

Owns: nothing.  Thread-safety: nothing to share.
"""
