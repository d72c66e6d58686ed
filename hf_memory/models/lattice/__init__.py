"""Lattice: memory slots on the unit sphere, each trained by orthogonal steps while it reads."""

from .configuration_lattice import LatticeConfig
from .modeling_lattice import (
    LatticeCache,
    LatticeForCausalLM,
    LatticeForSequenceClassification,
    LatticeModel,
    LatticePreTrainedModel,
)


__all__ = [
    "LatticeCache",
    "LatticeConfig",
    "LatticeForCausalLM",
    "LatticeForSequenceClassification",
    "LatticeModel",
    "LatticePreTrainedModel",
]
