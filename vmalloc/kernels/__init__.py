"""Attention kernels over KV-cache views, one module per device; decoders around them."""
