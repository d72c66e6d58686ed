"""The schema: YAML, flags and Python give the same recipe, and a wrong value gives one sentence."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hf_memory.conversion.recipe import ConversionError, Recipe, read_recipe
from hf_memory.conversion.stage_options import STAGES, AlignStage, DistillStage, InitStage, OnPolicyStage


NEEDED = {"teacher": "t", "output": "o", "data": "text.txt"}


def from_yaml(folder: Path, text: str, **flags: object) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(file, NEEDED | flags)


def test_yaml_flags_and_python_agree(tmp_path):
    text = "layers: [1, 3]\nbatch_size: 4\nstages: [init, {name: align, lr: 1e-3, tokens: 100}, distill]\n"
    flags = {"layers": "1,3", "batch_size": "4", "set": ["align.lr=1e-3", "align.tokens=100"]}
    stages = [InitStage(), AlignStage(lr=1e-3, tokens=100), DistillStage()]
    recipe = Recipe(teacher="t", output="o", data="text.txt", layers=[1, 3], batch_size=4, stages=stages)
    assert from_yaml(tmp_path, text) == recipe == read_recipe(flags=NEEDED | flags)


def test_yaml_of_a_recipe_gives_it_back(tmp_path):
    recipe = read_recipe(flags=NEEDED | {"memory_options": {"chunk_size": 4}, "held_out": "0.1", "layers": "even"})
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(tmp_path / "again.yaml") == recipe
    assert list(yaml.safe_load(recipe.to_yaml())) == [entry.name for entry in fields(Recipe)]


def test_flags_win_over_the_file(tmp_path):
    text = "seed: 3\ncontext: 64\nmemory_options: {chunk_size: 4, memory_depth: 1}\n"
    recipe = from_yaml(tmp_path, text, seed="5", memory_options={"chunk_size": 8})
    assert (recipe.seed, recipe.context) == (5, 64)
    assert recipe.memory_options == {"chunk_size": 8, "memory_depth": 1}


def test_stages_are_chosen_by_name(tmp_path):
    text = "stages: [init, {name: align, tokens: 7}, {name: distill, tokens: 9}]\n"
    assert [stage.name for stage in from_yaml(tmp_path, text, stages="init").stages] == ["init"]
    chosen = from_yaml(tmp_path, text, stages="init,distill", lr="0.5")
    assert chosen.stages == [InitStage(), DistillStage(tokens=9, lr=0.5)]
    assert read_recipe(flags=NEEDED | {"stages": "init,align"}).stages == [InitStage(), AlignStage()]


def test_a_stage_may_come_twice_with_labels_of_its_own(tmp_path):
    stages = "[init, {name: distill, tokens: 33}, {name: distill, tokens: 64, context: 16}]"
    text = f"context: 8\nbatch_size: 2\nstages: {stages}"
    recipe = from_yaml(tmp_path, text)
    assert list(recipe.training_stages) == ["distill", "distill2"]
    assert [recipe.steps_of(stage) for stage in recipe.training_stages.values()] == [3, 2]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("odd", [1, 3]),
        ("even", [0, 2, 4]),
        ("lower", [0, 1]),
        ("none", []),
        ("", []),
        ("3,1", [1, 3]),
    ],
)
def test_layers_in_words_and_numbers(layers, expected):
    assert read_recipe(flags=NEEDED | {"layers": layers}).layer_numbers(5) == expected


def test_nothing_to_replace_may_be_said_as_an_empty_list(tmp_path):
    assert from_yaml(tmp_path, "layers: []").layer_numbers(4) == []


def test_a_layer_beyond_the_teacher_is_refused():
    with pytest.raises(ConversionError, match=r"Layer 5 does not exist: the teacher has 5 layers, 0 to 4"):
        read_recipe(flags=NEEDED | {"layers": "1,5"}).layer_numbers(5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour: red", "Unknown key `colour`; the keys there are: teacher, "),
        ("batch_size: 0", "`batch_size` must be a whole number of at least 1, got 0."),
        ("batch_size: 1.5", "`batch_size` must be a whole number of at least 1, got 1.5."),
        ("batch_size: true", "`batch_size` must be a whole number of at least 1, got True."),
        ("batch_size: many", "`batch_size` must be a whole number of at least 1, got 'many'."),
        ("seed: -1", "`seed` must be a whole number from 0 to 2**32 - 1, got -1."),
        ("mode: swap", "`mode` must be one of replace, retrofit, got 'swap'."),
        ("layers: [1, 1]", "`layers` names a layer twice: [1, 1]."),
        ("layers: [one]", "`layers` must be a list of layer numbers, all, odd, even, lower or none, got ['one']."),
        (
            "layers: some",
            "`layers` must be layer numbers such as 1,3,5, or one of all, odd, even, lower, none, got 'some'.",
        ),
        ("held_out: 1.5", "`held_out` must be a share between 0 and 1, or a file or folder, got 1.5."),
        ("window: 8", "`window` (8) belongs to mode retrofit"),
        ("dtype: int8", "`dtype` must be one of auto, float32, bfloat16, got 'int8'."),
        ("stages: align", "`stages` must be a list of init, align, distill, on_policy, got 'align'."),
        ("stages: [init, polish]", "`stages` must be made of init, align, distill, on_policy, got 'polish'."),
        ("stages: [align]", "`stages` must begin with init and name it once, got ['align']."),
        ("stages: [init, {name: align, steps: 3}]", "Unknown key `align.steps`; the keys there are: tokens, lr, "),
        ("stages: [init, {name: align, lr: -1}]", "`align.lr` must be a number above 0, got -1."),
        ("stages: [init, {name: align, lr: .nan}]", "`align.lr` must be a number above 0, got nan."),
        ("stages: [init, {name: align, warmup: 2}]", "`align.warmup` must be a number from 0 to 1, got 2."),
        ("stages: [init, {name: distill, kl_weight: 0}]", "`kl_weight` and `ce_weight` are both 0"),
        ("stages: [{name: init, lr: 1}]", "Unknown key `init.lr`; the keys there are: none."),
        (
            "stages: [init, {name: align, target: logits}]",
            "`align.target` must be one of block, mixer, heads, matrix, got 'logits'.",
        ),
        (
            "stages: [init, {name: align, betas: [0.9]}]",
            "`align.betas` must be two numbers of at least 0 and below 1, got [0.9].",
        ),
        (
            "stages: [init, {name: align, schedule: step}]",
            "`align.schedule` must be one of cosine, linear, constant, wsd",
        ),
        (
            "stages: [init, {name: align, schedule: wsd, warmup: 0.95}]",
            "`warmup` (0.95) and `decay` (0.1) are shares of the steps: make them 1 at most (stage align).",
        ),
        ("stages: [init, {name: align, lora_merge: false}]", "say something about adapters: set `lora_rank` too"),
        (
            "stages: [init, {name: align, lora_rank: 4, trainable: new}]",
            "`lora_rank` adapts weights that exist and `trainable` new has none: set it to memory or all",
        ),
        (
            "stages: [init, {name: align, lora_rank: 4, lora_merge: false}, distill]",
            "`lora_merge` false keeps adapters beside the weights: only the last stage can do that.",
        ),
        (
            "stages: [init, {name: on_policy, context: 64}]",
            "`context` is `prompt_tokens` and `new_tokens` together, 192, not 64: leave it out (stage on_policy).",
        ),
        (
            "{mode: retrofit, stages: [init, {name: align, target: heads}]}",
            "`target` heads compares a memory with the attention in whose place it stands, and mode retrofit",
        ),
        ("[1, 2]", "must be a mapping from keys to values, got [1, 2]."),
        ("a: [", "is no YAML: "),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_it(tmp_path, text, sentence):
    with pytest.raises(ConversionError) as caught:
        from_yaml(tmp_path, text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"teacher": None}, "`teacher` is missing: name a folder or a Hub id."),
        ({"output": None}, "`output` is missing: name a folder that does not exist yet."),
        ({"data": None}, "`data` is missing: name a text file, a folder or a dataset, or stop with the stage init."),
        (
            {"set": ["lr=1"]},
            "`set` takes STAGE.KEY=VALUE with a stage of this run (init, align, distill), got 'lr=1'.",
        ),
        ({"set": ["align.lr"]}, "`set` takes NAME=VALUE, got 'align.lr'."),
        ({"stages": "init,align", "set": ["distill.lr=1"]}, "a stage of this run (init, align), got 'distill.lr=1'."),
        ({"stages": "init,aling"}, "`stages` must be made of init, align, distill, on_policy, got 'aling'."),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, sentence):
    with pytest.raises(ConversionError) as caught:
        read_recipe(flags=NEEDED | flags)
    assert sentence in str(caught.value)


def test_a_missing_file_is_one_sentence():
    with pytest.raises(ConversionError, match="The recipe 'nowhere.yaml' cannot be read: No such file"):
        read_recipe("nowhere.yaml", NEEDED)


def test_surgery_alone_needs_no_data():
    assert read_recipe(flags={"teacher": "t", "output": "o", "stages": "init"}).data is None


def test_every_field_says_what_it_accepts():
    for schema in (Recipe, *STAGES.values()):
        assert all(entry.metadata["accepts"] for entry in fields(schema))


def test_blocks_are_as_long_as_the_stage_needs():
    recipe = read_recipe(flags=NEEDED | {"context": 1024})
    lengths = {
        1024: AlignStage(),
        256: AlignStage(target="matrix"),
        512: AlignStage(target="matrix", context=512),
        96: OnPolicyStage(prompt_tokens=32, new_tokens=64),
    }
    assert [recipe.context_of(stage) for stage in lengths.values()] == list(lengths)
    assert read_recipe(flags=NEEDED | {"context": 64}).context_of(AlignStage(target="matrix")) == 64
