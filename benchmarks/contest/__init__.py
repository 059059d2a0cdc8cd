"""One model and one workload through several engines, each in an environment of its own.

Owns: nothing.  Thread-safety: stateless.
"""
