"""Checkpoints written by earlier versions still load and give the logits they gave then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hf_memory  # noqa: F401
from hf_memory.models import ARCHITECTURES


GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_golden_logits(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    golden = load_file(checkpoint / "golden.safetensors")
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
        head = model(golden["input_ids"][:, :9], use_cache=True)
        tail = model(golden["input_ids"][:, 9:], past_key_values=head.past_key_values).logits
    assert torch.allclose(logits, golden["logits"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(torch.cat([head.logits, tail], 1), golden["logits"], rtol=1e-4, atol=1e-5)


def test_every_architecture_and_format_has_a_golden_checkpoint():
    configs = [json.loads((path / "config.json").read_text()) for path in CHECKPOINTS]
    covered = {(config["model_type"], config["format_version"]) for config in configs}
    for model_type in ARCHITECTURES:
        supported = CONFIG_MAPPING[model_type].supported_format_version
        assert all((model_type, version) in covered for version in range(1, supported + 1))


def test_newer_format_is_refused(tmp_path):
    config = json.loads((CHECKPOINTS[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
