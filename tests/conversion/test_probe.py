"""The recall probe: against models that are known to recall everything, something, or nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_memory.conversion import probe as module
from hf_memory.conversion.probe import DEPTHS, VALUES, Probe, probe_lengths
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


VOCABULARY = 260
TOKENIZER = byte_tokenizer(VOCABULARY)
FILLER = "nothing to be found here, read on; " * 40


class Copier(nn.Module):
    """Finds what followed the end of its input earlier on, within a window, and expects it again."""

    device = torch.device("cpu")

    def __init__(self, window: int | None, suffix: int = 6) -> None:
        super().__init__()
        self.window, self.suffix = window, suffix

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert logits_to_keep == 1 and not use_cache and not self.training
        logits = torch.zeros(len(input_ids), 1, VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            seen = tokens if self.window is None else tokens[-self.window :]
            end = seen[-self.suffix :]
            for place in range(len(seen) - self.suffix):
                if seen[place : place + self.suffix] == end:
                    logits[row, 0, seen[place + self.suffix]] = 8.0
        return SimpleNamespace(logits=logits)


def make_probe(lengths=(64, 200), samples: int = 12, **options) -> Probe:
    return Probe(TOKENIZER, np.array(TOKENIZER(FILLER)["input_ids"]), lengths, samples, **options)


def test_a_model_that_copies_recalls_everything_and_one_that_does_not_guesses():
    models = {"copies": Copier(None), "guesses": Copier(window=1)}
    found = make_probe().run(models)
    assert found["copies"].accuracy == [[1.0] * 5] * 2
    expected = 8 / np.log(2)  # the others' logits are all 0
    assert np.allclose(found["copies"].gain_bits, expected)
    assert np.allclose(found["guesses"].gain_bits, 0, atol=1e-9)
    # It finds all values equally likely, and names the first: right in one of eight texts.
    assert 0 < np.mean(found["guesses"].accuracy) < 0.3
    assert (found["copies"].lengths, found["copies"].depths, found["copies"].choices) == ([64, 200], list(DEPTHS), 8)


def test_a_window_forgets_what_lies_before_it():
    """Of 200 tokens 26 are line and question, so that depth 0.5 lies 87 + 10 tokens and the line before the end."""
    (accuracy,) = make_probe((200,)).run({"window": Copier(window=100)})["window"].accuracy
    assert accuracy[3:] == [1.0, 1.0]
    assert max(accuracy[:3]) < 0.6


@pytest.mark.parametrize("length", [60, 61, 200])
def test_a_text_has_its_length_and_the_line_at_its_depth(length):
    probe = make_probe((length,))
    tokens, choices, right = probe.texts(length, 0)
    assert tokens.shape == (5, length) and choices.shape == (5, len(VALUES)) and right.shape == (5,)
    assert all(tensor.dtype == torch.int64 for tensor in (tokens, choices, right))
    keys = set()
    for row, depth in enumerate(DEPTHS):
        text = TOKENIZER.decode(tokens[row], clean_up_tokenization_spaces=False)
        question = text[-10:]
        key = question[1:7]
        line = f"\n{key} = {VALUES[right[row]]}\n"
        assert question == f"\n{key} = " and key.isupper()
        assert text.count(line) == 1 and text.index(line) == round(depth * (length - len(line) - 10))
        filler = text[:-10].replace(line, "")
        assert len(filler) == length - len(line) - 10 and set(filler) <= set(FILLER)
        assert [TOKENIZER.decode([first]) for first in choices[row].tolist()] == [value[0] for value in VALUES]
        keys.add(key)
    assert len(keys) == 5


def test_texts_are_fixed_by_the_seed():
    same, again, other = make_probe(seed=3), make_probe(seed=3), make_probe(seed=4)
    assert all(map(torch.equal, same.texts(64, 1), again.texts(64, 1)))
    assert not torch.equal(same.texts(64, 1)[0], other.texts(64, 1)[0])
    assert not torch.equal(same.texts(64, 1)[0], same.texts(64, 2)[0])


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words and parts of words, in the manner of GPT-2 or of SentencePiece."""
    tokenizer = Tokenizer(models.BPE())
    is_bytes = kind == "bytes"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False) if is_bytes else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.ByteLevel() if is_bytes else decoders.Metaspace()
    text = [f"{value} = {value}, XQZ WK a = b\n" for value in VALUES for _ in range(4)]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else [chr(code) for code in (10, *range(32, 127))]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"])
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_any_tokenizer_tells_the_values_apart(kind):
    tokenizer = trained(kind)
    probe = Probe(tokenizer, np.arange(1, 40), [80, 81], samples=1)
    for length in (80, 81):
        tokens, choices, right = probe.texts(length, 0)
        assert tokens.shape == (5, length)
        for row in range(5):
            assert len(set(choices[row].tolist())) == len(VALUES)
            # What the question is followed by, behind the hidden line as behind the question.
            whole = [*tokens[row].tolist(), choices[row, right[row]].item()]
            text = tokenizer.decode(whole, clean_up_tokenization_spaces=False)
            assert VALUES[right[row]].startswith(text.rpartition("=")[2].strip())
            assert f"= {VALUES[right[row]]}" in text


def test_lengths_without_room_are_left_out():
    assert make_probe((16, 40, 64)).lengths == [64]
    assert make_probe((16,)).run({"any": Copier(None)}) == {}
    assert make_probe(samples=0).run({"any": Copier(None)}) == {}
    assert probe_lengths(2048) == [256, 512, 1024, 2048]


def test_time_ends_a_probe_between_two_samples(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    seen = []
    found = make_probe(samples=50).run({"a": Copier(None)}, seconds=35, on_progress=lambda *done: seen.append(done))
    assert found["a"].samples == len(seen) < 5 and seen[0] == (1, 50)
    assert found["a"].accuracy == [[1.0] * 5] * 2
    assert make_probe(samples=50).run({"a": Copier(None)}, seconds=0)["a"].samples == 1


def test_a_real_model_is_put_into_eval_mode_and_back():
    model = random_model(tiny_config("llama", vocab_size=VOCABULARY)).train()
    found = make_probe((64,), samples=2).run({"model": model})["model"]
    assert model.training and np.isfinite(found.gain_bits).all() and found.samples == 2
