"""Caches that bound what an unconverted decoder keeps of its text, without training (`docs/caches.md`).

`hf_memory.PolarQuantCache` keeps every token in four bits per coordinate, `hf_memory.SubGenCache` a fixed number of
tokens.
"""
