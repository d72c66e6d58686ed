"""Every family of teachers: hybrids of it compute, generate and are padded as they should, or it is refused."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from families import (
    BREAKS_ITSELF,
    COMMON,
    GATED,
    LINEAR,
    ONE_BY_ONE,
    OTHERS,
    SUPPORTED,
    inherited_and_expected,
    tiny_teacher,
)
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_memory.conversion.surgery import build_student, memory_slots
from hf_memory.conversion.teachers import config_reason, model_reason


WINDOW, LENGTH = 12, 24
OPTIONS = {"memory_expansion": 2, "chunk_size": 4}
FAMILIES = [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_pieces(model, tokens: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """Logits of all tokens behind the first ones, read with a cache."""
    cache = model(tokens[:, :first], use_cache=True).past_key_values
    pieces = tokens[:, first:].split(size, dim=1)
    return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)


@torch.no_grad()
def left_padded(model, tokens: torch.Tensor, padding: int) -> torch.Tensor:
    """Logits of the tokens behind left padding."""
    padded = torch.cat([torch.zeros_like(tokens[:, :padding]), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= padding).long().expand(padded.shape)
    positions = (mask.cumsum(1) - 1).clamp(0)
    return model(padded, attention_mask=mask, position_ids=positions).logits[:, padding:]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, monkeypatch):
    if family in LINEAR:
        name = family.removesuffix("_text")
        if f"transformers.models.{name}.modeling_{name}" not in sys.modules:
            monkeypatch.setitem(sys.modules, "fla", None)
        elif importlib.util.find_spec("fla"):
            pytest.skip("flash-linear-attention is in use and needs a GPU")
    teacher = tiny_teacher(family)
    tokens = ids()
    with torch.no_grad():
        expected = teacher(tokens).logits
    untouched = build_student(teacher, layers=[])
    with torch.no_grad():
        assert torch.equal(untouched(tokens).logits, expected)
    for mode in ("replace", "retrofit"):
        window = WINDOW if mode == "retrofit" else None
        student = build_student(teacher, layers=[1], mode=mode, window=window, memory_options=OPTIONS)
        if mode == "replace":
            for name, (got, want) in inherited_and_expected(teacher, student.config, 1).items():
                if name != "o_proj" or family not in GATED:
                    assert torch.allclose(got, want, atol=1e-4, rtol=1e-3), name
        else:
            with torch.no_grad():
                assert torch.equal(student(tokens[:, :WINDOW]).logits, teacher(tokens[:, :WINDOW]).logits)
                memory_slots(student)[1].scale.fill_(1.0)
        with torch.no_grad():
            whole = student(tokens).logits
        assert not torch.allclose(whole[:, -1], expected[:, -1], atol=1e-3)
        size = 1 if family in ONE_BY_ONE else 5
        if family not in BREAKS_ITSELF:
            torch.testing.assert_close(in_pieces(student, tokens, 13, size), whole[:, 13:], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(left_padded(student, tokens, 3), whole, atol=1e-3, rtol=1e-3)
        written = student.generate(tokens[:, :8], max_new_tokens=3, do_sample=False)
        assert written.shape == (2, 11) or (written[:, 8:] == student.generation_config.eos_token_id).any()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(ONE_BY_ONE | BREAKS_ITSELF))
def test_exceptions_are_of_the_teacher(family):
    teacher, tokens = tiny_teacher(family), ids()
    with torch.no_grad():
        whole = teacher(tokens).logits[:, 13:]
    size = 1 if family in BREAKS_ITSELF else 5
    assert not torch.allclose(in_pieces(teacher, tokens, 13, size), whole, atol=1e-3, rtol=1e-3)


def reason_of(family: str) -> str | None:
    """Why a family is refused, for a model with the default configuration of its type."""
    if family in SUPPORTED:
        return None
    try:
        config = AutoConfig.for_model(family)
    except StrictDataclassError:
        # There is no default configuration of this type.
        return config_reason(PreTrainedConfig.from_dict({"model_type": family}))
    if (reason := config_reason(config)) is not None:
        return reason
    with torch.device("meta"):
        return model_reason(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bart", "encoder-decoder"),
        ("bert", "that of BERT"),
        ("bloom", "attention interface"),
        ("deepseek_v3", "latent attention"),
        ("gemma3", "holds several models"),
        ("mamba2", "no(ne of its layers has)? self-attention|none"),
        ("trocr", "cross-attention"),
        ("zamba2", "share"),
    ],
)
def test_refusals_say_why(family, reason):
    assert re.search(reason, reason_of(family))


def test_a_refusal_is_one_sentence():
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon"))
        with pytest.raises(ValueError, match=r"^FalconForCausalLM cannot be converted: its attention .*\.$"):
            build_student(teacher, layers=[0])


def test_a_layer_without_attention_is_named():
    with pytest.raises(ValueError, match="Layer 0 has no self-attention.*choose among 1"):
        build_student(tiny_teacher("lfm2"), layers=[0])


def documented() -> dict[str, str]:
    """Reason, or nothing for a supported family, by model type, from the tables of docs/teachers.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    supported, refused = text.split("## Refused")
    rows = dict.fromkeys(re.findall(r"`([\w-]+)`", supported.split("## Supported")[1].split("\n\n")[1]), "")
    for types, reason in re.findall(r"^\| (`.*`) \| (.*) \|$", refused.split("\n## ")[0], re.M):
        rows |= dict.fromkeys(re.findall(r"`([\w-]+)`", types), reason)
    return rows


def test_the_page_names_every_family_once():
    rows = documented()
    assert {name for name, reason in rows.items() if not reason} == set(SUPPORTED)
    assert set(rows) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
def test_the_page_gives_the_reasons_of_the_code():
    expected = {family: reason_of(family) or "" for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert documented() == expected
