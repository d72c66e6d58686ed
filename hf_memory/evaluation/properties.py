"""
The property suite: what a causal language model with a cache has to keep, as functions that check any of them.

`check_model(model)` runs them and returns a `Report`; each entry of `PROPERTIES` can be called on a model by itself. A
deviation is the largest over all positions of the RMS difference of the logits, relative to the RMS of all logits.
Tolerances come from the dtype (`TOLERANCES`: 1e-9 in float64, 1e-4 in float32, 5e-2 in bfloat16, 1e-2 in float16), or
from what one rounding of the input embeddings does to the logits where that is more; a property that has to hold
exactly counts faults instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from hf_memory.evaluation import (
    properties_cache,
    properties_forward,
    properties_generation,
    properties_training,
    properties_walk,
)
from hf_memory.evaluation.properties_report import Report, Result
from hf_memory.evaluation.properties_runner import Property, resolve_budget
from hf_memory.evaluation.properties_subject import BUDGETS, TOLERANCES, Budget, Subject


_CHECKS = (
    properties_forward.reads_context,
    properties_forward.split_invariance,
    properties_forward.left_padding,
    properties_forward.right_padding,
    properties_forward.middle_padding,
    properties_forward.idle_rows,
    properties_forward.packing_position_ids,
    properties_forward.packing_cu_seqlens,
    properties_forward.row_independence,
    properties_forward.causality,
    properties_generation.greedy,
    properties_generation.sampling,
    properties_generation.beam_search,
    properties_generation.batched_generation,
    properties_generation.assisted_decoding,
    properties_generation.static_cache,
    properties_generation.text_pipeline,
    properties_cache.cache_reorder,
    properties_cache.cache_repeat,
    properties_cache.cache_select,
    properties_cache.cache_reset,
    properties_cache.cache_fork,
    properties_cache.cache_crop,
    properties_walk.random_walk,
    properties_training.save_load,
    properties_training.meta_init,
)
_CHECKS_WITH_GRAD = (
    properties_training.gradient_checkpointing,
    properties_training.autocast,
    properties_training.forms,
)

PROPERTIES: dict[str, Property] = {
    **{check.__name__: Property(check.__name__, check) for check in _CHECKS},
    **{check.__name__: Property(check.__name__, check, needs_grad=True) for check in _CHECKS_WITH_GRAD},
}


def check_model(
    model: PreTrainedModel,
    properties: Iterable[str] | None = None,
    budget: Budget | str = "quick",
    seed: int = 0,
    tolerance: float | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Report:
    """
    Runs the property suite on a causal language model.

    Args:
        model: any causal LM of transformers, or registered with it, that returns a cache. It is left as it came;
            saving, loading and gradients need about three times its memory.
        properties: names to run, in this order; all of `PROPERTIES` by default.
        budget: `"quick"` (seconds on a tiny model), `"full"` (minutes) or a `Budget`.
        seed: seed of all random inputs; each property starts from it, so that one run alone repeats its result.
        tolerance: largest accepted deviation; by default from the dtype and the model's conditioning.
        on_start: called with the name of each property before it runs.

    Returns:
        `Report`; `report.failed` is empty when every property that applies is kept.

    Raises:
        ValueError: for an unknown property or budget, or a model that is not a causal language model.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_memory.evaluation import check_model

    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, initializer_range=0.2,
    ... )
    >>> report = check_model(LlamaForCausalLM(config), ["split_invariance", "left_padding"])
    >>> [(result.name, result.status) for result in report.results]
    [('split_invariance', 'pass'), ('left_padding', 'pass')]
    ```
    """
    names = list(PROPERTIES) if properties is None else list(properties)
    unknown = [name for name in names if name not in PROPERTIES]
    if unknown:
        raise ValueError(f"unknown property {', '.join(unknown)}; the properties are {', '.join(PROPERTIES)}")
    budget = resolve_budget(budget)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is not a causal language model of transformers")
    if tolerance is None:
        tolerance = Subject(model, budget, seed).tolerance
    report = Report(type(model).__name__, model.num_parameters(), str(model.dtype).removeprefix("torch."))
    for name in names:
        if on_start is not None:
            on_start(name)
        report.results.append(PROPERTIES[name].run(Subject(model, budget, seed, tolerance)))
    return report


__all__ = ["BUDGETS", "PROPERTIES", "TOLERANCES", "Budget", "Property", "Report", "Result", "check_model"]
