"""One engine over several processes: each rank computes its share of every layer's heads.

Owns: nothing.  Thread-safety: see each class.
"""
