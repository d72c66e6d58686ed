"""Tiny configurations of every registered architecture, for the property suite and other tests."""

from itertools import product

from transformers import PreTrainedConfig

from hf_memory.evaluation.properties_tiny import tiny_config
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig


def _titans() -> dict[str, PreTrainedConfig]:
    return {name: tiny_config("titans", vocab_size=64, **fields) for name, fields in _titans_fields().items()}


def _titans_fields() -> dict[str, dict]:
    configs = {}
    for variant, depth, chunk, target in product(("lmm", "mag"), (1, 2), (1, 4, 16), ("zero", "init")):
        configs[f"{variant}-depth{depth}-chunk{chunk}-{target}"] = {
            "variant": variant, "memory_depth": depth, "chunk_size": chunk, "decay_target": target,
        }  # fmt: skip
    segments = {"variant": "mac", "chunk_size": 4, "segment_size": 8, "num_memory_tokens": 4}
    return configs | {
        "mac": segments,
        "mac-one-chunk-every-token": segments | {"chunk_size": 16, "segment_size": 16, "num_memory_tokens": 16},
        "mac-online-linear-no-conv-no-persistent": segments
        | {"memory_depth": 1, "chunk_size": 1, "num_memory_tokens": 1, "conv_kernel": 0, "num_persistent_tokens": 0},
        "mal-online-linear": {"variant": "mal", "chunk_size": 1, "memory_depth": 1},
        "mac-linear-persistent-in-memory": segments
        | {"memory_depth": 1, "segment_size": 12, "persistent_in_memory": True},
        "mal": {"variant": "mal", "chunk_size": 4},
        "lmm-channel": {"gate_granularity": "channel", "chunk_size": 4},
        "mag-channel-linear": {"variant": "mag", "gate_granularity": "channel", "memory_depth": 1, "chunk_size": 4},
        "lmm-depth3": {"memory_depth": 3, "chunk_size": 4},
        "lmm-linear-layer-norm": {"memory_depth": 1, "memory_layer_norm": True, "chunk_size": 4},
        "lmm-softplus-mean": {"theta_act": "softplus", "theta_norm": "chunk_mean", "chunk_size": 4},
        "mal-persistent-in-memory": {"variant": "mal", "persistent_in_memory": True, "chunk_size": 4},
        "mag-additive": {"variant": "mag", "gate": "additive", "chunk_size": 4},
        "mag-persistent-in-memory": {"variant": "mag", "persistent_in_memory": True, "chunk_size": 4},
        "lmm-no-conv-no-persistent": {"conv_kernel": 0, "num_persistent_tokens": 0, "chunk_size": 4},
        "lmm-no-momentum": {"memory_momentum": False, "chunk_size": 4},
        "lmm-no-decay": {"memory_decay": False, "chunk_size": 4},
        "gated-delta-rule": {
            "memory_depth": 1, "chunk_size": 1, "memory_momentum": False, "decay_before_grad": True,
        },
    }  # fmt: skip


def _trellis() -> dict[str, PreTrainedConfig]:
    options = {
        "ln-silu": {},
        "ln-silu-chunk1": {"chunk_size": 1, "conv_value": True},
        "ln-silu-learned-start": {"chunk_size": 4, "learn_initial_memory": True, "refinements": 1},
        "l2-silu-softmax": {"chunk_size": 4, "write_map": "l2_silu", "read_map": "softmax", "gate_act": "silu"},
        "silu-no-conv": {"chunk_size": 4, "write_map": "silu", "conv_kernel": 0, "hypergrad": 0.0},
        "identity-chunk4": {"write_map": "identity", "chunk_size": 4, "memory_decay": False, "value_step": "shared"},
    }
    return {name: tiny_config("trellis", vocab_size=64, **fields) for name, fields in options.items()}


def _hybrids() -> dict[str, PreTrainedConfig]:
    # Windows of transformers count slots, so that padding narrows them: wide enough where the teacher keeps a layer.
    wide, mixed = {"sliding_window": 512}, {"layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama-replace": hybrid("llama", [1]),
        "llama-retrofit": hybrid("llama", [0], memory_mode="retrofit", memory_window=8),
        "llama-all": hybrid("llama", [0, 1], memory={"memory_depth": 1, "chunk_size": 1}),
        "llama-persistent": hybrid("llama", [0], memory={"num_persistent_tokens": 3, "chunk_size": 4}),
        "mistral-retrofit": hybrid("mistral", [1], memory_mode="retrofit", memory_window=8, **wide),
        "gemma3-replace-full": hybrid("gemma3_text", [1], **mixed, **wide),
        "gemma3-retrofit-sliding": hybrid("gemma3_text", [0], memory_mode="retrofit", memory_window=8, **mixed),
        "llama-trellis": hybrid("llama", [1], memory={"model_type": "trellis"}),
        "gpt-neox-retrofit": hybrid("gpt_neox", [0, 1], memory_mode="retrofit", memory_window=8),
    }


def hybrid(base: str, layers: list[int], **fields) -> MemoryHybridConfig:
    """
    Tiny hybrid with a teacher of type `base`; `fields` are those of the teacher or of the hybrid.
    """
    own = {name: fields.pop(name) for name in list(fields) if name.startswith("memory")}
    memory = {"model_type": "titans", **own.get("memory", {})}
    small = {"titans": {"memory_expansion": 2}, "trellis": {"num_slots": 16}}[memory["model_type"]]
    own["memory"] = {"chunk_size": 4, **small, **memory}
    return MemoryHybridConfig.from_teacher(tiny_config(base, vocab_size=64, **fields), memory_layers=layers, **own)


_CONFIGS = {"titans": _titans, "trellis": _trellis, MemoryHybridConfig.model_type: _hybrids}


def tiny_configs(model_type: str) -> dict[str, PreTrainedConfig]:
    """
    Name -> configuration, sizes as small as the options allow. A new architecture adds one function here.

    Raises:
        KeyError: for an architecture without one, so that none escapes the suite.
    """
    return _CONFIGS[model_type]()
