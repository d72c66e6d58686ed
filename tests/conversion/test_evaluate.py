"""Evaluation of converted models: against plain formulas in float64, against real caches, and its refusals."""

import math

import pytest
import torch
from torch.nn import functional

from hf_memory._cli.state_size import readable_size
from hf_memory.conversion import evaluate
from hf_memory.conversion.evaluate import (
    cache_growth,
    decode_speeds,
    evaluate_model,
    evaluate_models,
    evaluate_pair,
    paired_difference,
)
from hf_memory.evaluation.properties_subject import cache_tensors
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


@pytest.fixture(scope="module")
def teacher():
    return random_model(tiny_config("llama"), seed=0)


@pytest.fixture(scope="module")
def student(teacher):
    return random_model(tiny_config("llama"), seed=1).eval()


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(128, (5, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def naive(teacher, student, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything at once in float64, `[N, T - 1]` each."""
    p, q = (model(blocks).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    bits = -q.gather(-1, blocks[:, 1:, None])[..., 0] / math.log(2)
    kl = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1) / math.log(2)
    return {"bits": bits, "kl": kl, "same": p.argmax(-1) == q.argmax(-1)}


@pytest.mark.parametrize("batch_size, slice_size", [(None, None), (2, 3 * 128), (1, 1)])
def test_pair_agrees_with_the_formulas(teacher, student, blocks, batch_size, slice_size, monkeypatch):
    if slice_size is not None:
        monkeypatch.setattr(evaluate, "_LOGITS_PER_SLICE", slice_size)
    expected = naive(teacher, student, blocks)
    quality = evaluate_pair(teacher, student, blocks, edges=(16,), bins=4, batch_size=batch_size)["student"]
    assert quality.tokens == 5 * 39
    assert quality.whole.bits_per_token == pytest.approx(expected["bits"].mean().item(), rel=1e-6)
    assert quality.whole.kl_bits_per_token == pytest.approx(expected["kl"].mean().item(), rel=1e-5)
    assert quality.whole.agreement == pytest.approx(expected["same"].double().mean().item())
    assert [(part.start, part.end) for part in quality.parts] == [(1, 16), (16, 40)]
    for part in (*quality.parts, *quality.curve):
        # Entry p of what was predicted is the token at position p + 1 of its block.
        place = slice(part.start - 1, part.end - 1)
        assert part.bits_per_token == pytest.approx(expected["bits"][:, place].mean().item(), rel=1e-6)
        assert part.kl_bits_per_token == pytest.approx(expected["kl"][:, place].mean().item(), rel=1e-5)
    assert [span.end for span in quality.curve][:-1] == [span.start for span in quality.curve][1:]
    assert (quality.curve[0].start, quality.curve[-1].end, len(quality.curve)) == (1, 40, 4)
    per_block = torch.stack([expected["bits"][:, :15].mean(1), expected["bits"][:, 15:].mean(1)], dim=1)
    assert torch.allclose(torch.tensor(quality.block_bits), per_block.float(), rtol=1e-5)


def test_a_model_is_at_no_distance_from_itself(teacher, blocks):
    result = evaluate_pair(teacher, teacher, blocks)
    assert result["student"].whole.kl_bits_per_token == pytest.approx(0, abs=1e-6)
    assert result["student"].whole.agreement == 1
    assert result["teacher"].whole.kl_bits_per_token is None
    assert result["teacher"].whole.bits_per_token == result["student"].whole.bits_per_token


def test_bytes_turn_tokens_into_bytes(teacher, blocks):
    quality = evaluate_model(teacher, blocks, bytes_per_token=4.0)
    assert quality.whole.bits_per_byte == quality.whole.bits_per_token / 4
    assert evaluate_model(teacher, blocks).whole.bits_per_byte is None


def test_short_blocks_have_one_part(teacher, blocks):
    quality = evaluate_model(teacher, blocks[:1, :2])
    assert [(part.start, part.end) for part in quality.parts] == [(1, 2)] and len(quality.curve) == 1


def test_progress_and_training_mode(teacher, student, blocks):
    seen = []
    teacher.train()
    try:
        evaluate_pair(teacher, student, blocks, batch_size=2, on_progress=lambda *done: seen.append(done))
        assert teacher.training and not student.training
    finally:
        teacher.eval()
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_paired_difference_is_of_blocks(teacher, student, blocks):
    result = evaluate_models({"a": teacher, "b": student}, blocks, edges=(16,))
    mean, error = paired_difference(result["a"].block_bits, result["b"].block_bits, part=1)
    differences = torch.tensor(result["b"].block_bits)[:, 1] - torch.tensor(result["a"].block_bits)[:, 1]
    assert mean == pytest.approx(differences.mean().item(), rel=1e-4)
    assert error == pytest.approx(differences.std().item() / math.sqrt(5), rel=1e-4)
    assert math.isnan(paired_difference([[1.0]], [[2.0]], part=0)[1])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"blocks": torch.zeros(3, dtype=torch.int64)}, "int64 \\[N, T\\]"),
        ({"blocks": torch.zeros(0, 4, dtype=torch.int64)}, "N >= 1"),
        ({"blocks": torch.zeros(2, 1, dtype=torch.int64)}, "T >= 2"),
        ({"blocks": torch.zeros(2, 4)}, "not torch.float32"),
        ({"blocks": torch.full((1, 4), 128)}, "the vocabulary ends at 127"),
        ({"reference": "nobody"}, "is none of the models"),
        ({"models": {}}, "no model to evaluate"),
        ({"edges": (0,)}, "Edges are positions"),
    ],
)
def test_wrong_input_is_one_sentence(teacher, blocks, change, sentence):
    arguments = {"models": {"teacher": teacher}, "blocks": blocks, **change}
    with pytest.raises(ValueError, match=sentence):
        evaluate_models(**arguments)


def test_models_of_different_vocabularies_are_not_compared(teacher, blocks):
    other = random_model(tiny_config("llama", vocab_size=130), seed=0)
    with pytest.raises(ValueError, match="need the same vocabulary; these have teacher 128, student 130"):
        evaluate_pair(teacher, other, blocks)


@pytest.mark.parametrize(
    "model_type, options",
    [("llama", {}), ("mistral", {}), ("titans", {"variant": "lmm"}), ("titans", {"variant": "mag"})],
)
def test_cache_growth_is_that_of_a_real_cache(model_type, options):
    config = tiny_config(model_type, **options)
    contexts = (1, 7, 8, 20)
    sizes = cache_growth(config, torch.float32, contexts)
    model = random_model(config)
    for tokens, size in zip(contexts, sizes):
        with torch.no_grad():
            cache = model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
        tensors = [tensor for layer in cache.layers for tensor in cache_tensors(layer).values()]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert size.total_bytes == kept
        # A window counts its tokens, in two numbers of eight bytes.
        assert (size.memory_bytes > 16) == (model_type == "titans")
        assert (size.kv_bytes > 0) == (options.get("variant") != "lmm")


def test_decode_speed_reads_the_context_once_and_counts_steps(teacher, monkeypatch):
    lengths, kept = [], []
    forward = type(teacher).forward

    def counted(self, input_ids=None, past_key_values=None, **kwargs):
        lengths.append(input_ids.shape[1])
        kept.append(0 if past_key_values is None else past_key_values.get_seq_length())
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(teacher), "forward", counted)
    monkeypatch.setattr(evaluate, "_PREFILL_PIECE", 16)
    speeds = decode_speeds({"a": teacher}, contexts=(40, 5), pieces=3, steps=2)
    assert lengths == [16, 16, 8, *[1] * 8, 5, *[1] * 8]
    assert kept == [0, 16, 32, *range(40, 48), 0, *range(5, 13)]
    assert [(speed.context, speed.steps) for speed in speeds["a"]] == [(40, 6), (5, 6)]
    assert all(speed.tokens_per_second > 0 for speed in speeds["a"])


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**41, "2.0 TiB")],
)
def test_readable_size(count, text):
    assert readable_size(count) == text
