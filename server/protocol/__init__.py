"""The JSON that goes in and out: pydantic models, one file an endpoint.

Owns: nothing.  Thread-safety: plain values.
"""
