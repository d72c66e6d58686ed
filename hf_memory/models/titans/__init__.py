"""Titans: a neural memory that is trained while it reads."""

from .configuration_titans import TitansConfig
from .modeling_titans import (
    TitansCache,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansModel,
    TitansPreTrainedModel,
)


__all__ = [
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansModel",
    "TitansPreTrainedModel",
]
