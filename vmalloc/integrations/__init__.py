"""Thin adapters that put vmalloc's memory under other engines; each is imported by its own name.

Owns: nothing.  Thread-safety: immutable.
"""
