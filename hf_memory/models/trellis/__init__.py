"""Trellis: keys and values compressed into two slot memories that are trained while they read."""

from .configuration_trellis import TrellisConfig
from .modeling_trellis import (
    TrellisCache,
    TrellisForCausalLM,
    TrellisForSequenceClassification,
    TrellisModel,
    TrellisPreTrainedModel,
)


__all__ = [
    "TrellisCache",
    "TrellisConfig",
    "TrellisForCausalLM",
    "TrellisForSequenceClassification",
    "TrellisModel",
    "TrellisPreTrainedModel",
]
