"""Tiny configurations of every registered architecture, for the property suite and other tests."""

from itertools import product

from transformers import PreTrainedConfig

from hf_memory.evaluation.properties_tiny import tiny_config


def _titans() -> dict[str, dict]:
    configs = {}
    for variant, depth, chunk, target in product(("lmm", "mag"), (1, 2), (1, 4, 16), ("zero", "init")):
        configs[f"{variant}-depth{depth}-chunk{chunk}-{target}"] = {
            "variant": variant, "memory_depth": depth, "chunk_size": chunk, "decay_target": target,
        }  # fmt: skip
    return configs | {
        "lmm-channel": {"gate_granularity": "channel", "chunk_size": 4},
        "mag-channel-linear": {"variant": "mag", "gate_granularity": "channel", "memory_depth": 1, "chunk_size": 4},
        "lmm-depth3": {"memory_depth": 3, "chunk_size": 4},
        "lmm-linear-layer-norm": {"memory_depth": 1, "memory_layer_norm": True, "chunk_size": 4},
        "lmm-softplus-mean": {"theta_act": "softplus", "theta_norm": "chunk_mean", "chunk_size": 4},
        "mag-additive": {"variant": "mag", "gate": "additive", "chunk_size": 4},
        "mag-persistent-in-memory": {"variant": "mag", "persistent_in_memory": True, "chunk_size": 4},
        "lmm-no-conv-no-persistent": {"conv_kernel": 0, "num_persistent_tokens": 0, "chunk_size": 4},
        "lmm-no-momentum": {"memory_momentum": False, "chunk_size": 4},
        "lmm-no-decay": {"memory_decay": False, "chunk_size": 4},
        "gated-delta-rule": {
            "memory_depth": 1, "chunk_size": 1, "memory_momentum": False, "decay_before_grad": True,
        },
    }  # fmt: skip


_CONFIGS = {"titans": _titans}


def tiny_configs(model_type: str) -> dict[str, PreTrainedConfig]:
    """
    Name -> configuration, sizes as small as the options allow. A new architecture adds one function here.

    Raises:
        KeyError: for an architecture without one, so that none escapes the suite.
    """
    return {name: tiny_config(model_type, vocab_size=64, **fields) for name, fields in _CONFIGS[model_type]().items()}
