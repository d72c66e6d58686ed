"""`hf-memory generate --cache`, and the comparison that it prints."""

import math
from pathlib import Path

import pytest
import torch
from cached_llama import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from typer.testing import CliRunner

from hf_memory import PolarQuantCache, SubGenCache
from hf_memory.cli import app
from hf_memory.compression.compare import compare_with_full
from hf_memory.conversion.surgery import build_student
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


PROMPT = "hello there, " * 12


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name in ("llama", "titans"):
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        random_model(tiny_config(name, vocab_size=300)).save_pretrained(made[name])
        byte_tokenizer(300).save_pretrained(made[name])
    return made


def generate(folder: Path, *arguments: object):
    return run("generate", folder, PROMPT, "--max-new-tokens", 12, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    "arguments, make",
    [
        (("--cache", "polarquant", "--cache-window", 16), lambda config: PolarQuantCache(config, window=16)),
        (
            ("--cache", "subgen", "--cache-budget-tokens", 40, "--cache-window", 10),
            lambda config: SubGenCache(config, budget=40, window=10),
        ),
    ],
    ids=["polarquant", "subgen"],
)
def test_generates_with_the_cache_and_reports_size_and_error(folders, arguments, make):
    result = generate(folders["llama"], *arguments, "--compare")
    assert result.exit_code == 0, result.output
    model, tokenizer = (auto.from_pretrained(folders["llama"]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    cache = make(model.config)
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    added = ids[0, inputs.input_ids.shape[1] :]
    assert result.stdout.strip() == tokenizer.decode(added, skip_special_tokens=True).strip()
    report = " ".join(result.stderr.split())
    assert f"Cache behind {ids.shape[1] - 1} tokens" in report
    assert f"({cache.nbytes / cache.full_nbytes:.1%})" in report
    compared = compare_with_full(model, ids, make(model.config), 64)
    assert f"{compared.bits:.4f}" in report and f"{compared.kl:.4f}" in report and "last 64" in report
    without = generate(folders["llama"], *arguments)
    assert without.stdout == result.stdout
    assert "KL" not in without.stderr and f"({cache.nbytes / cache.full_nbytes:.1%})" in without.stderr


@pytest.mark.parametrize(
    "model, arguments, sentence",
    [
        ("titans", ("--cache", "subgen"), "has a memory of fixed size already"),
        ("llama", ("--cache", "quanto"), "There is no cache 'quanto': --cache takes polarquant or subgen"),
        ("llama", ("--compare",), "belong to --cache polarquant or subgen"),
        ("llama", ("--cache-window", "3"), "belong to --cache polarquant or subgen"),
        ("llama", ("--cache", "polarquant", "--cache-budget-tokens", "9"), "keeps all tokens"),
        ("llama", ("--cache", "subgen", "--cache-budget-tokens", "4"), "A budget of 4 tokens leaves none"),
        ("llama", ("--cache", "subgen", "--memory", "a.memory"), "give one of them"),
    ],
)
def test_wrong_input_gets_one_sentence(folders, model, arguments, sentence):
    result = generate(folders[model], *arguments)
    assert result.exit_code == 2
    # transformers may have drawn the bar of its loading before.
    error = result.stderr.split("\r")[-1].splitlines()[-1]
    assert "Error: " in error and sentence in error
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("tail", [1, 20, 79])
def test_comparison_is_what_it_says(tail):
    """Against probabilities of the two models in float64; and nothing differs where the cache has room."""
    model = tiny_llama()
    ids = torch.randint(3, 64, (2, 80))
    cache = PolarQuantCache(model.config, window=4)
    compared = compare_with_full(model, ids, cache, tail)
    assert cache.seen_tokens == 79

    def probabilities(cache) -> torch.Tensor:
        pieces = [79 - tail] * (tail < 79) + [1] * tail
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids[:, :-1].split(pieces, dim=1)]
        return torch.cat(parts, 1)[:, -tail:].double().softmax(-1)

    full, own = (
        probabilities(DynamicCache(config=model.config)),
        probabilities(PolarQuantCache(model.config, window=4)),
    )
    targets = ids[:, -tail:, None]
    assert compared.tokens == 2 * tail
    assert compared.full_bits == pytest.approx(float(-full.gather(2, targets).log2().mean()), rel=1e-4)
    assert compared.bits == pytest.approx(float(-own.gather(2, targets).log2().mean()), rel=1e-4)
    assert compared.kl == pytest.approx(float((full * (full / own).log2()).sum(-1).mean()), rel=1e-3, abs=1e-6)
    assert compared.agreement == pytest.approx(float((full.argmax(-1) == own.argmax(-1)).double().mean()))
    roomy = compare_with_full(model, ids, PolarQuantCache(model.config, window=100), tail)
    assert roomy.kl == pytest.approx(0, abs=1e-5) and roomy.agreement == 1
    assert not math.isclose(compared.bits, compared.full_bits, rel_tol=1e-6) or tail == 1


def test_comparison_of_a_model_with_a_cache_of_its_own():
    """A hybrid: its memories stay, and nothing differs where the rest has room."""
    model = build_student(tiny_llama(), layers=[1], memory_options={"chunk_size": 4}).eval()
    ids = torch.randint(3, 64, (1, 30))
    for tail in (9, 29):
        compared = compare_with_full(model, ids, PolarQuantCache(model.config, window=100), tail)
        assert compared.kl == pytest.approx(0, abs=1e-5) and compared.agreement == 1


def test_comparison_refuses_a_tail_that_is_not_there():
    model = tiny_llama()
    with pytest.raises(ValueError, match="1 to 9 to compare at, not 10"):
        compare_with_full(model, torch.zeros(1, 10, dtype=torch.long), PolarQuantCache(model.config), 10)


def test_size_without_compression_is_that_of_a_dynamic_cache():
    model = tiny_llama()
    ids = torch.randint(3, 64, (2, 60))
    full = DynamicCache(config=model.config)
    model(ids, past_key_values=full)
    for cache in (PolarQuantCache(model.config, window=8), SubGenCache(model.config, 24, padding_mask=ids > 0)):
        assert cache.full_nbytes == cache.nbytes == 0
        model(ids, past_key_values=cache)
        assert cache.full_nbytes == sum(x.numel() * 4 for layer in full.layers for x in (layer.keys, layer.values))
