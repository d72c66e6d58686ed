"""Layers by pattern, and budgets of the cache that decide how many."""

import pytest
import torch
from tiny_conversion import save_teacher, save_text, tiny_recipe
from transformers import AutoConfig

from hf_memory._cli.state_size import layer_states
from hf_memory.conversion.layer_choice import CacheBudget, CachePlan, layer_numbers, parse_budget, parse_layers
from hf_memory.conversion.recipe import ConversionError
from hf_memory.conversion.run import convert


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("every:4", 8, [1, 2, 3, 5, 6, 7]),
        ("every:2", 5, [1, 3]),
        ("every:9", 4, [1, 2, 3]),
        ("ratio:0.5", 4, [1, 3]),
        ("ratio:0.25", 8, [3, 7]),
        ("ratio:0.5", 5, [1, 4]),
        ("ratio:0", 4, []),
        ("ratio:1", 4, [0, 1, 2, 3]),
        ("auto:2", 3, [0, 1, 2]),
    ],
)
def test_patterns(layers, count, expected):
    assert layer_numbers(parse_layers(layers), count) == expected


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.34, 0.5, 0.75, 1.0])
def test_a_ratio_gives_so_many_layers_with_even_gaps(count, share):
    chosen = layer_numbers(f"ratio:{share}", count)
    assert len(chosen) == round(share * count)
    gaps = {later - earlier for earlier, later in zip(chosen, chosen[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("text", ["every:1", "every:", "every:x", "auto:0", "auto:-1", "ratio:2", "ratio:x", "some"])
def test_other_patterns_are_refused(text):
    with pytest.raises(ConversionError, match="`layers` "):
        parse_layers(text)


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ConversionError, match="`layers` 'auto:5' is more than the 4 layers of the teacher"):
        layer_numbers("auto:5", 4)


def test_budgets_as_text():
    assert parse_budget("64MiB@32768") == CacheBudget(64 * 2**20, 32768)
    assert parse_budget("1.5 KiB@1") == CacheBudget(1536, 1)
    for wrong in ("64MB@1", "64MiB", "64MiB@0", "0MiB@1", "-1MiB@3", "1MiB@1.5"):
        with pytest.raises(ValueError, match="no size and length"):
            parse_budget(wrong)


def test_what_is_needed_is_the_least_that_fits():
    # Layer 1 has a window narrower than a memory is large: converting it would only add bytes.
    plan = CachePlan(CacheBudget(230, 1), kept=(100, 20, 100, 100), converted=(30, 30, 30, 30))
    assert plan.saving == [0, 2, 3]
    assert [plan.total(layers) for layers in ((), (0,), (0, 1), (0, 2, 3))] == [320, 250, 260, 110]
    assert plan.needed() == 2
    plan.check([0, 3])
    with pytest.raises(ConversionError, match="is not met by converting the layers 0, 1: .* at least 2 layers"):
        plan.check([0, 1])
    with pytest.raises(ConversionError, match=r"cannot be met: with all 3 layers .* takes 110 B \(110 bytes\)"):
        CachePlan(CacheBudget(109, 1), plan.kept, plan.converted).needed()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), num_hidden_layers=3)


def test_a_student_within_its_budget(teacher, tmp_path):
    """The budget is held by the model that was saved, at the length that was named."""
    text = save_text(tmp_path / "text.txt")
    flags = {"layers": None, "auto_blocks": 2, "auto_tokens": 64, "stages": "init"}
    kv = sum(state.after(2048) for state in layer_states(AutoConfig.from_pretrained(teacher), torch.float32))
    folder = convert(tiny_recipe(teacher, text, tmp_path / "out", cache_budget=f"{kv // 2}B@2048", **flags))
    config = AutoConfig.from_pretrained(folder)
    size = sum(state.after(2048) for state in layer_states(config, torch.float32))
    assert size <= kv // 2 and len(config.memory_layers) == 2
    # One converted layer less would not have fitted.
    assert size + kv // 3 - layer_states(config, torch.float32)[config.memory_layers[0]].first > kv // 2


def test_a_budget_counts_keys_in_the_dtype_of_the_saved_model(tmp_path):
    """Half as many bytes in bfloat16: a budget that is met there by one layer does not do in float32."""
    teacher = save_teacher(tmp_path / "teacher", torch.bfloat16, num_hidden_layers=3)
    text = save_text(tmp_path / "text.txt")
    states = layer_states(AutoConfig.from_pretrained(teacher), torch.bfloat16)
    budget = f"{sum(state.after(2048) for state in states) * 3 // 4}B@2048"
    flags = {"layers": "1", "cache_budget": budget, "stages": "init", "held_out_blocks": 1}
    assert convert(tiny_recipe(teacher, text, tmp_path / "out", **flags)).is_dir()
    with pytest.raises(ConversionError, match="is not met by converting the layers 1: .* at least "):
        convert(tiny_recipe(teacher, text, tmp_path / "float32", save_dtype="float32", **flags))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"layers": None, "cache_budget": "1KiB@2048"}, "cannot be met: with all 3 layers converted"),
        ({"layers": "1", "cache_budget": "4KiB@2048"}, "cannot be met"),
        (
            {"layers": None, "cache_budget": "1MiB@2048"},
            "is met by the teacher as it is, with 768.0 KiB",
        ),
        ({"layers": "1", "cache_budget": "150KiB@2048"}, "is not met by converting the layers 1: "),
        ({"layers": "auto:4"}, "`layers` 'auto:4' is more than the 3 layers of the teacher."),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_sentence_before_anything_is_loaded(teacher, tmp_path, flags, sentence):
    text = save_text(tmp_path / "text.txt")
    with pytest.raises(ConversionError) as caught:
        convert(tiny_recipe(teacher, text, tmp_path / "out", **flags))
    assert sentence in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]
