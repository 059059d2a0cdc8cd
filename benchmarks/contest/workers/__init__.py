"""Workers: scripts that run in the environments of their peers.

Owns: nothing.  Thread-safety: see each file.
"""
