"""The GPU benchmark: ``run.sh`` is the one command, each section a file of its own.

Owns: nothing.  Thread-safety: nothing to share.
"""
