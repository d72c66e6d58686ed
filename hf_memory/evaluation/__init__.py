"""Evaluation: the property suite (`check_model`)."""

from hf_memory.evaluation.properties import PROPERTIES, Budget, Property, Report, Result, check_model


__all__ = ["PROPERTIES", "Budget", "Property", "Report", "Result", "check_model"]
