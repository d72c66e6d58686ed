"""Text that models write: rows that do not depend on each other, and a file that an interrupted run goes on with."""

import numpy as np
import pytest
import torch
from tiny_conversion import save_teacher, tiny_recipe
from transformers import GenerationConfig

from hf_memory.conversion.recipe import ConversionError
from hf_memory.conversion.run import convert
from hf_memory.conversion.sampling import SampledText, continue_rows, is_teacher, sampled_size
from hf_memory.conversion.surgery import build_student
from hf_memory.evaluation.properties_generation import byte_tokenizer
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 260}
    return random_model(tiny_config("llama", **sizes)).requires_grad_(False)


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(1, 260, (6, 3))


def test_a_row_is_the_same_beside_whatever_others(teacher, prompts):
    student = build_student(teacher, layers=[1], memory_options={"chunk_size": 4})
    together = continue_rows(student, prompts, 20, seed=7)
    assert together.shape == (6, 23) and torch.equal(together[:, :3], prompts)
    for parts in ([2, 4], [1, 1, 1, 3]):
        apart = torch.cat([continue_rows(student, part, 20, seed=7) for part in prompts.split(parts)])
        assert torch.equal(apart, together)
    shuffled = torch.randperm(6)
    assert torch.equal(continue_rows(student, prompts[shuffled], 20, seed=7), together[shuffled])
    assert not torch.equal(continue_rows(student, prompts, 20, seed=8), together)
    assert student.training
    assert torch.equal(continue_rows(student.eval(), prompts, 20, seed=7), together) and not student.training


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 4)])
def test_tokens_come_as_often_as_the_model_says(teacher, temperature, top_k):
    rows, prompt = 4000, torch.tensor([[5, 9]])
    drawn = continue_rows(
        teacher, prompt.expand(rows, 2), 1, seed=0, temperature=temperature, top_k=top_k, rows=np.arange(rows)
    )[:, 2]
    logits = teacher(prompt).logits[0, -1].double() / temperature
    if top_k is not None:
        logits[logits < logits.topk(top_k)[0][-1]] = -torch.inf
    expected, found = logits.softmax(-1), drawn.bincount(minlength=260) / rows
    assert not found[expected == 0].any()
    # Five standard errors for each of 260 shares.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt() + 1e-12).all()


def test_only_known_tokens_are_drawn(teacher, prompts):
    assert continue_rows(teacher, prompts % 30, 40, seed=0, vocabulary=30).max() < 30


def test_habits_of_a_model_do_not_count(teacher, prompts):
    """Texts go on behind their end, as they stand one behind the other in training data, and repeat as they do."""
    plain = continue_rows(teacher, prompts, 9, seed=0)
    before = teacher.generation_config
    teacher.generation_config = GenerationConfig(eos_token_id=list(range(260)), repetition_penalty=9.0, top_p=0.1)
    habits = teacher.generation_config
    try:
        assert torch.equal(continue_rows(teacher, prompts, 9, seed=0), plain)
        assert teacher.generation_config is habits
    finally:
        teacher.generation_config = before


def read(file, teacher, tokenizer, texts=5, batch_size=2, on_progress=lambda done: None) -> np.ndarray:
    text = SampledText(file, texts, 12)
    text.write(teacher, tokenizer, batch_size, 3, on_progress)
    return text.read()


def test_an_interrupted_text_is_finished_as_if_it_never_was(teacher, tmp_path):
    tokenizer = byte_tokenizer(260)
    tokenizer.bos_token = tokenizer.unk_token
    whole = read(tmp_path / "whole", teacher, tokenizer)
    assert whole.shape == (60,) and (whole[::12] == tokenizer.bos_token_id).all()
    assert len({tuple(text) for text in whole.reshape(5, 12)}) == 5

    def cut(done: int) -> None:
        assert done == 24
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "cut", teacher, tokenizer, on_progress=cut)
    with (tmp_path / "cut").open("ab") as file:
        file.write(b"half a text")
    assert SampledText(tmp_path / "cut", 5, 12).missing == 36
    assert np.array_equal(read(tmp_path / "cut", teacher, tokenizer, batch_size=1), whole)


def test_texts_begin_at_random_where_nothing_begins_them(teacher, tmp_path):
    tokenizer = byte_tokenizer(260)
    assert tokenizer.bos_token_id is None
    first = read(tmp_path / "text", teacher, tokenizer, texts=40, batch_size=40)[::12]
    assert len(set(first.tolist())) > 30 and not set(first.tolist()) & set(tokenizer.all_special_ids)


def test_how_much_is_sampled(tmp_path):
    flags = {"held_out": "0.25", "set": ["distill.context=32"], "tokens": 960}
    recipe = tiny_recipe("t", "teacher", tmp_path / "out", **flags)
    assert sampled_size(recipe) == (80, 32)  # 1920 to train on, a quarter on top
    recipe.sampled_tokens = 320
    assert sampled_size(recipe) == (10, 32)
    recipe.sampled_tokens = 1
    assert sampled_size(recipe) == (3, 32)


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_teacher("teacher")
    (tmp_path / "teacher").write_text("text")
    assert not is_teacher("teacher") and not is_teacher("text.txt") and not is_teacher(None)


def test_a_conversion_without_text(tmp_path, monkeypatch):
    """Cut off while it samples and again while it trains, it ends like one that was not."""
    monkeypatch.setattr("hf_memory.conversion.run._Conversion._report", lambda *args: None)
    monkeypatch.setattr("hf_memory.conversion.report.write_report", lambda *args: None)
    source = save_teacher(tmp_path / "source")
    flags = {"stages": "init,distill"}
    undisturbed = convert(tiny_recipe(source, "teacher", tmp_path / "undisturbed", **flags))
    recipe = tiny_recipe(source, "teacher", tmp_path / "out", **flags)

    def cut(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    for where in ("sampling.continue_rows", "training._Loop.step"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_memory.conversion.{where}", cut)
            with pytest.raises(KeyboardInterrupt):
                convert(recipe)
    text = tmp_path / "out.converting" / "sampled.bin"
    assert text.stat().st_size == 4 * np.prod(sampled_size(recipe))
    monkeypatch.setattr("hf_memory.conversion.sampling.continue_rows", cut)  # it is not written again
    folder = convert(recipe)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(entry.name for entry in undisturbed.iterdir())
    same = (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert same and not text.exists()


def test_the_teacher_is_no_text_among_others(tmp_path):
    source = save_teacher(tmp_path / "source")
    recipe = tiny_recipe(source, "teacher", tmp_path / "out")
    recipe.data = ["teacher", "text.txt"]
    with pytest.raises(ConversionError, match="Text of the teacher's own is read alone"):
        convert(recipe)
