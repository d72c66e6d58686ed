"""Tiny random models of any architecture, for checks that need no weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


# Values a field is cut down to where the architecture has it. The weights are ten times the usual size: at 0.02 a
# model of width 64 is nearly its embedding, and a lost state would hardly show in the logits.
_TINY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "max_position_embeddings": 16384,
    "sliding_window": 16, "state_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16384, "num_persistent_tokens": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Where the cut fields have to agree with each other, or other names are used.
_TINY_OF_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "qwen3_next": {"num_hidden_layers": 4},
    "titans": {"num_key_value_heads": None, "sliding_window": 8, "segment_size": 32, "num_memory_tokens": 16},
    "trellis": {"num_slots": 16},
    "memory_hybrid": {"memory_layers": [1], "memory": {"memory_expansion": 2, "chunk_size": 4}},
}


def tiny_config(source: str | PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
    """
    A configuration small enough to check on a CPU in seconds.

    Args:
        source: a model type of transformers (or registered with it), or a configuration whose choices are kept while
            its sizes are cut; of its `layer_types` each kind is kept once.
        overrides: fields to set on top.

    Raises:
        ValueError: for an unknown model type, or an architecture that the cut sizes do not fit.
    """
    model_type = source if isinstance(source, str) else source.model_type
    if isinstance(source, str):
        try:
            defaults = AutoConfig.for_model(source)
        except (KeyError, ValueError) as error:
            message = f"{source!r} is not a model type of the installed transformers, nor of hf_memory"
            raise ValueError(message) from error
    else:
        defaults = source.get_text_config(decoder=True)
    fields = defaults.to_dict()
    cut = {name: value for name, value in {**_TINY, **_TINY_OF_TYPE.get(model_type, {})}.items() if name in fields}
    if isinstance(source, str):
        # Everything derived from the sizes has to be derived anew.
        fields = {}
    else:
        cut = {name: value for name, value in cut.items() if fields[name] is not None}
        if kinds := list(dict.fromkeys(fields.get("layer_types") or [])):
            cut["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
            cut["num_hidden_layers"] = len(cut["layer_types"])
    if "segment_size" in cut:
        # A segment is a whole number of chunks.
        cut["segment_size"] = math.lcm(cut["segment_size"], fields.get("chunk_size", 1))
    fields.update(cut, **overrides)
    fields.pop("model_type", None)
    try:
        return type(defaults)(**fields)
    except Exception as error:
        message = " ".join(str(error).split())
        raise ValueError(f"cannot make a tiny {model_type} configuration: {message}") from error


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """
    A causal LM with random weights, on the CPU in float32.

    Raises:
        ValueError: when the architecture has no causal language model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(f"{config.model_type!r} has no causal language model") from error
