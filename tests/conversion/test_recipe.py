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
        ("layers: [one]", "`layers` must be layer numbers such as 1,3,5, or one of all, odd, even, lower, none, "),
        ("layers: some", "every:K, ratio:R, auto:K, auto, got 'some'."),
        ("layers: every:1", "`layers` every:... takes a whole number of at least 2, got 'every:1'."),
        ("layers: ratio:2", "`layers` ratio:... takes a number from 0 to 1, got 'ratio:2'."),
        ("layers: auto", "`layers` auto:K says how many layers, auto lets `cache_budget` say it: give one of the two"),
        ("{layers: auto:2, cache_budget: 1MiB@64}", "give one of the two, got 'auto:2' and cache_budget '1MiB@64'."),
        (
            "cache_budget: 64MB@9",
            "`cache_budget` must be a size in KiB, MiB or GiB and a length in tokens, such as 64",
        ),
        ("chosen_layers: [1]", "`chosen_layers` belongs to `layers: auto`, not to 'odd'."),
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
        ({"stages": "init,aling"}, "got 'aling', did you mean `align`?"),
        ({"scale": "-1"}, "`scale` must be a number above 0, got '-1'."),
        (
            {"cache_budget": "1MiB@8", "data": None, "stages": "init"},
            "`data` is missing: `layers` auto measures on text",
        ),
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


LINES = """\
# A comment
teacher: t
memory: titans
memory_options:
  chunk_size: 16
  memory_depth: {depth}
stages:
- init
- name: align
  lr: {lr}
  tokens: 64
- {{name: distill, kl_weight: {kl}}}
"""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": "fast"}, "recipe.yaml, line 10: `align.lr` must be a number above 0, got 'fast'."),
        ({"kl": "0"}, "recipe.yaml, line 12: `kl_weight` and `ce_weight` are both 0"),
        ({"kl": "-1"}, "recipe.yaml, line 12: `distill.kl_weight` must be a number of at least 0, got -1."),
        ({"depth": "deep"}, "recipe.yaml, line 6: `memory_options.memory_depth` of titans does not take 'deep': "),
        (
            {"depth": "1\n  chunk_sise: 4"},
            "line 7: Unknown key `memory_options.chunk_sise`, did you mean `chunk_size`? The",
        ),
        (
            {"lr": "1\n  token: 4"},
            "line 11: Unknown key `align.token`, did you mean `tokens`? The keys there are: tokens, ",
        ),
        (
            {"kl": "1}\n- polish #"},
            "recipe.yaml, line 13: `stages` must be made of init, align, distill, on_policy, got 'polish'",
        ),
        (
            {"lr": "1\n- name: allign"},
            "recipe.yaml, line 11: `stages` must be made of init, align, distill, on_policy, ",
        ),
        ({"lr": "1\n  lr: 2"}, "recipe.yaml, line 11: `lr` is given on line 10 already."),
        ({"kl": "1}\nteacher: again #"}, "recipe.yaml, line 13: `teacher` is given on line 2 already."),
        ({"kl": "1}\nwindow: 8 #"}, "recipe.yaml, line 13: `window` (8) belongs to mode retrofit"),
        ({"kl": "1}\nlayers: [1, 1] #"}, "recipe.yaml, line 13: `layers` names a layer twice: [1, 1]."),
        (
            {"kl": "1}\nlayers: odds #"},
            "recipe.yaml, line 13: `layers` must be layer numbers such as 1,3,5, or one of all",
        ),
        (
            {"kl": "1}\nlayrs: odd #"},
            "recipe.yaml, line 13: Unknown key `layrs`, did you mean `layers`? The keys there",
        ),
        ({"kl": "1}\n[1]: odd #"}, "recipe.yaml, line 13: a key must be a word."),
        ({"kl": "1}\nseed: 2024-99-99 #"}, "is no YAML: month must be in 1..12."),
        ({"kl": "]"}, "recipe.yaml, line 12: this is no YAML: "),
        ({"kl": "!!python/name:os 1"}, "recipe.yaml, line 12: this is no YAML: could not determine a constructor"),
    ],
)
def test_sentences_name_the_line(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    text = LINES.format(**{"depth": 1, "lr": "1e-3", "kl": 1} | changes)
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConversionError) as caught:
        read_recipe("recipe.yaml", {"output": "o", "data": "d"})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_that_is_wrong_names_no_line(tmp_path):
    text = LINES.format(depth=1, lr=1, kl=1)
    for flags in ({"lr": "fast"}, {"set": ["align.lr=fast"]}):
        with pytest.raises(ConversionError) as caught:
            from_yaml(tmp_path, text, **flags)
        assert str(caught.value) == "`align.lr` must be a number above 0, got 'fast'."
    with pytest.raises(ConversionError, match="^`memory_options.memory_depth` of titans does not take 'deep'"):
        from_yaml(tmp_path, text, memory_options={"memory_depth": "deep"})


def test_what_yaml_shares_is_not_given_twice(tmp_path):
    text = "shared: &shared {tokens: 7, lr: 1}\nstages: [init, {<<: *shared, name: align, lr: 2}]"
    with pytest.raises(ConversionError, match="line 1: Unknown key `shared`"):
        from_yaml(tmp_path, text)
    text = "stages: [init, &first {name: align, tokens: 7, lr: 1}, {<<: *first, lr: 2}]"
    assert from_yaml(tmp_path, text).stages == [InitStage(), AlignStage(tokens=7, lr=1), AlignStage(tokens=7, lr=2)]


def test_budgets_are_scaled_and_flags_win(tmp_path):
    text = "auto_tokens: 50\nstages: [init, {name: align, tokens: 1e4}, {name: align, tokens: 33}, distill]\n"
    recipe = from_yaml(tmp_path, text, scale="0.1")
    budgets = [stage.tokens for stage in recipe.training_stages.values()]
    assert budgets == [1000, 3, DistillStage().tokens // 10] and recipe.auto_tokens == 5
    recipe = from_yaml(tmp_path, text, scale="0.1", set=["align2.tokens=77"])
    assert [stage.tokens for stage in recipe.training_stages.values()][:2] == [1000, 77]
    recipe = from_yaml(tmp_path, text, scale="1e-9", tokens="9")
    assert {stage.tokens for stage in recipe.training_stages.values()} == {9} and recipe.auto_tokens == 1


def test_sizes_of_blocks_as_flags_hold_for_all_stages(tmp_path):
    text = "context: 64\nstages: [init, {name: align, context: 32, batch_size: 4}, distill]\n"
    recipe = from_yaml(tmp_path, text, context="16", batch_size="2")
    sizes = {(recipe.context_of(stage), recipe.batch_size_of(stage)) for stage in recipe.training_stages.values()}
    assert sizes == {(16, 2)}


def test_a_cache_budget_alone_lets_auto_choose(tmp_path):
    assert read_recipe(flags=NEEDED | {"cache_budget": "1MiB@64"}).layers == "auto"
    assert from_yaml(tmp_path, "cache_budget: 1MiB@64\nlayers: [1]").layers == [1]


def test_layers_as_flags_take_the_place_of_those_that_a_search_found(tmp_path):
    """The recipe beside a converted model has both; a flag that asks for other layers must not be lost on it."""
    text = "layers: auto:2\nchosen_layers: [2, 3]\n"
    assert from_yaml(tmp_path, text).chosen_layers == [2, 3]
    for flags in ({"layers": "auto:3"}, {"layers": "odd"}, {"layers": "auto", "cache_budget": "1MiB@64"}):
        recipe = from_yaml(tmp_path, text, **flags)
        assert (recipe.layers, recipe.chosen_layers) == (flags["layers"], None)
    text = "layers: auto\ncache_budget: 2MiB@64\nchosen_layers: [2, 3]\n"
    assert from_yaml(tmp_path, text, cache_budget="1MiB@64").chosen_layers is None


def test_another_memory_as_a_flag_leaves_the_options_of_the_file_out(tmp_path):
    text = "memory: titans\nmemory_options: {memory_depth: 1}\n"
    recipe = from_yaml(tmp_path, text, memory="lattice", memory_options={"chunk_size": 8})
    assert (recipe.memory, recipe.memory_options) == ("lattice", {"chunk_size": 8})
    assert from_yaml(tmp_path, text, memory="titans").memory_options == {"memory_depth": 1}
    assert from_yaml(tmp_path, "memory_options: {memory_depth: 1}", memory="titans").memory_options
    assert read_recipe("radlads", NEEDED | {"memory": "trellis"}).memory_options == {}


def test_one_layer_may_be_given_as_a_number(tmp_path):
    assert from_yaml(tmp_path, "layers: 3").layers == [3]


@pytest.mark.parametrize("text", ["controls: off", "controls: [off]"])
def test_off_is_a_word(tmp_path, text):
    """YAML reads a bare `off` as false."""
    assert from_yaml(tmp_path, text).controls == ["off"]


@pytest.mark.parametrize("key", ["1", "yes", "~", "2024-01-01"])
def test_a_key_that_is_no_word_has_its_line_too(tmp_path, key):
    with pytest.raises(ConversionError, match=r"recipe.yaml, line 2: (Unknown key|a key must be a word)"):
        from_yaml(tmp_path, f"seed: 1\n{key}: 2\n")


def test_what_yaml_shares_may_be_shared_again(tmp_path):
    text = "stages: [init, &one {name: align, tokens: 7}, &two {<<: *one, tokens: 9}, *two, {<<: *two, lr: 1}]"
    assert [stage.tokens for stage in from_yaml(tmp_path, text).training_stages.values()] == [7, 9, 9, 9]


def test_a_stage_without_its_name_is_told_the_form(tmp_path):
    with pytest.raises(ConversionError, match=r"line 3: .* got \{'align': \{'tokens': 5\}\}: write `- name: align`"):
        from_yaml(tmp_path, "stages:\n- init\n- align:\n    tokens: 5\n")


def test_a_budget_that_is_no_number_is_not_scaled(tmp_path):
    with pytest.raises(ConversionError, match="`align.tokens` must be a whole number of at least 1, got True"):
        from_yaml(tmp_path, "stages: [init, {name: align, tokens: true}]", scale="0.5")
