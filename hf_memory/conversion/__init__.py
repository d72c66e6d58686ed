"""Conversion of a pretrained Transformer into a model with memory layers."""

from pathlib import Path


# As in hf_memory/kernels/__init__.py: in a checkout the modules are in the top-level `conversion/`.
_source = Path(__file__).resolve().parents[2] / "conversion"
if (_source / "SOURCE_CHECKOUT").is_file():
    __path__.append(str(_source))
