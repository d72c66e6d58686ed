"""TitansConfig: derived defaults, refusals with advice, and the round trip through JSON."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_memory import TitansConfig


def test_defaults_follow_the_paper_and_the_conditioning_rule():
    deep, linear = TitansConfig(), TitansConfig(memory_depth=1)
    assert (deep.decay_target, deep.memory_layer_norm, deep.theta_max) == ("init", True, 0.1)
    assert (linear.decay_target, linear.memory_layer_norm, linear.theta_max) == ("zero", False, 1 / 16)
    assert TitansConfig(memory_depth=1, memory_layer_norm=True).theta_max == 0.1
    assert (deep.chunk_size, deep.conv_kernel, deep.sliding_window, deep.num_persistent_tokens) == (16, 4, 2048, 128)


def test_variant_decides_layers_and_persistent_tokens():
    lmm, mag = TitansConfig(num_hidden_layers=3), TitansConfig(variant="mag", num_hidden_layers=3)
    assert lmm.layer_types == ["linear_attention"] * 3 and mag.layer_types == ["hybrid_sliding"] * 3
    assert lmm.persistent_in_memory and not mag.persistent_in_memory
    assert not lmm.has_window and mag.has_window
    mac, mal = TitansConfig(variant="mac"), TitansConfig(variant="mal", num_hidden_layers=3)
    assert mac.layer_types == ["hybrid"] * 24 and (mac.segment_size, mac.num_memory_tokens) == (512, 256)
    assert mal.layer_types == ["linear_attention", "sliding_attention", "linear_attention"]
    assert mal.has_window and not mac.has_window and not mac.persistent_in_memory and not mal.persistent_in_memory


@pytest.mark.parametrize(
    ("fields", "sets"),
    [
        ({}, 2),
        ({"memory_depth": 3}, 3),
        ({"gate_granularity": "channel"}, 128),
        ({"gate_granularity": "channel", "memory_depth": 1}, 64),
    ],
)
def test_gate_sets(fields, sets):
    assert TitansConfig(**fields).num_gate_sets == sets


def test_head_dim_need_not_divide_hidden_size():
    assert TitansConfig(hidden_size=100, num_attention_heads=3, head_dim=32).head_dim == 32


def test_round_trip(tmp_path):
    config = TitansConfig(variant="mag", memory_depth=1, theta_norm="chunk_mean", persistent_in_memory=True)
    config.save_pretrained(tmp_path)
    assert TitansConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"variant": "mar"}, "one of"),
        ({"num_attention_heads": 0}, "at least 1"),
        ({"hidden_size": 100}, "set `head_dim`"),
        ({"layer_types": ["linear_attention"]}, "name every layer"),
        ({"layer_types": ["hybrid_sliding"] * 24}, "change `variant`"),
        ({"layer_types": ["full_attention"] * 24}, "one of"),
        ({"memory_layer_norm": False}, "set memory_depth=1"),
        ({"memory_depth": 3, "gate_granularity": "channel"}, 'set gate_granularity="head"'),
        ({"decay_before_grad": True}, "set memory_depth=1"),
        ({"memory_depth": 1, "decay_before_grad": True}, "chunk_size=1"),
        (
            {"memory_depth": 1, "chunk_size": 1, "decay_before_grad": True, "memory_decay": False},
            "set memory_decay=True",
        ),
        ({"memory_act": "relu"}, "one of"),
        ({"decay_target": "mean"}, "one of"),
        ({"theta_act": "exp"}, "one of"),
        ({"theta_norm": "mean"}, "one of"),
        ({"theta_max": -0.1}, "at least 0"),
        ({"gate": "sum"}, "one of"),
        ({"chunk_size": 0}, "at least 1"),
        ({"conv_kernel": -1}, "at least 0"),
        ({"persistent_in_memory": False}, "num_persistent_tokens=0"),
        ({"variant": "mag", "sliding_window": 1}, "at least 2"),
        ({"variant": "mag", "head_dim": 5}, "even"),
        ({"variant": "mac", "num_attention_heads": 1024}, "even"),
        ({"variant": "mac", "head_dim": 32}, "must be `hidden_size`"),
        ({"variant": "mac", "segment_size": 0}, "at least 1"),
        ({"variant": "mac", "num_memory_tokens": 0}, "at least 1"),
        ({"variant": "mac", "num_memory_tokens": 200}, "multiple of `num_memory_tokens`"),
        ({"variant": "mac", "chunk_size": 48}, "multiple of `chunk_size`"),
        ({"variant": "mac", "persistent_in_memory": True, "num_persistent_tokens": 9}, "no multiple of `chunk_size`"),
        ({"variant": "mac", "gate": "additive"}, 'variant="mag" only'),
        ({"variant": "mal", "num_hidden_layers": 1}, "`num_hidden_layers`"),
        ({"variant": "mal", "sliding_window": 1}, "at least 2"),
        ({"variant": "mal", "layer_types": ["linear_attention"] * 24}, "linear_attention and sliding_attention"),
    ],
)
def test_refusals_say_what_to_change(fields, advice):
    with pytest.raises((ValueError, StrictDataclassError), match=advice):
        TitansConfig(**fields)


def test_newer_format_is_refused_before_its_unknown_values():
    with pytest.raises(ValueError, match="upgrade"):
        TitansConfig(format_version=2, variant="of the future")
