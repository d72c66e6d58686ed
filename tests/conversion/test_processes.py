"""Several processes end where one does, and one that fails alone ends them all."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_conversion import CONTEXT, save_teacher, save_text, tiny_recipe, weights

from hf_memory.conversion.processes import plain
from hf_memory.conversion.recipe import ConversionError
from hf_memory.conversion.run import convert


HERE = Path(__file__).parent
BATCH, STEPS = 4, 6
OPTIONS = {
    "batch_size": BATCH,
    "tokens": STEPS * BATCH * CONTEXT,
    "checkpoint_seconds": 0,
    "set": ["distill.trainable=all", "distill.accumulate=2"],
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}


class Workplace:
    """A folder with a teacher, a text, and conversions of one by the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, ""
        self.teacher, self.text = save_teacher(folder / "teacher"), save_text(folder / "text.txt")

    def recipe(self, name: str, **flags: object) -> Path:
        file = self.folder / f"{name}.yaml"
        recipe = tiny_recipe(self.teacher, self.text, self.folder / name, **(OPTIONS | flags))
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        return file

    def run(self, *arguments: str) -> None:
        program = [sys.executable, str(HERE / "several_processes.py"), str(free_port())]
        result = subprocess.run([*program, *arguments], env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        self.said = result.stdout
        self.errors = result.stderr

    def codes(self, argument: str) -> str:
        return re.search(rf"^ended {re.escape(argument)} (\[.*\]) after", self.said, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """One process, two, and two in which the second goes wrong; all in one process that imports the libraries once."""
    place = Workplace(tmp_path_factory.mktemp("processes"))
    for name in ("one", "two", "unreadable", "lost", "asked", "nan"):
        place.recipe(name)
    place.recipe("odd", batch_size=3)
    for name in ("one_auto", "two_auto"):
        place.recipe(name, layers="auto:1", auto_blocks=3, auto_tokens=2 * BATCH * CONTEXT)
    named = [f"2:{place.folder / name}.yaml:{name}" for name in ("unreadable", "lost", "asked", "nan")]
    runs = ((1, "one"), (2, "two"), (2, "odd"), (1, "one_auto"), (2, "two_auto"))
    plain_runs = [f"{count}:{place.folder / name}.yaml" for count, name in runs]
    place.run(*plain_runs, *named, f"2:{place.folder / 'asked'}.yaml")
    return place


def test_two_processes_end_within_rounding_of_one(place):
    one, two = weights(place.folder / "one"), weights(place.folder / "two")
    before = weights(place.teacher)
    assert set(one) == set(two)
    moved = max((one[name] - before[name]).abs().max().item() for name in set(one) & set(before))
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    print(f"weights moved by up to {moved:.1e}, one and two processes are up to {apart:.1e} apart")
    # A step of Adam has the size of the learning rate whatever the gradient's: where that is nearly 0, rounding shows.
    assert moved > 1e-3 and apart < 1e-5


def test_two_processes_leave_what_one_leaves(place):
    one, two = ({entry.name for entry in (place.folder / name).iterdir()} for name in ("one", "two"))
    assert one == two and not (place.folder / "two.converting").exists()
    reports = [
        json.loads((place.folder / name / "report.json").read_text(encoding="utf-8")) for name in ("one", "two")
    ]
    first, second = ([curve["loss"] for curve in report["curves"]] for report in reports)
    for mine, other in zip(first, second):
        assert len(mine) == STEPS and mine == pytest.approx(other, rel=1e-4)
    qualities = [report["models"]["student"]["quality"]["whole"]["bits_per_token"] for report in reports]
    assert qualities[0] == pytest.approx(qualities[1], rel=1e-4)


# One of each kind, on text of the teacher's own; 4 steps of each.
KINDS = """
data: teacher
stages:
- init
- {name: align, target: matrix, tokens: 256}
- {name: align, target: heads, trainable: new, tokens: 256}
- {name: align, target: mixer, stream: student, lora_rank: 2, tokens: 256}
- {name: distill, layer_weight: 0.5, trainable: all, accumulate: 2, tokens: 256}
- {name: on_policy, prompt_tokens: 4, new_tokens: 8, tokens: 192}
- {name: distill, lora_rank: 2, lora_merge: false, tokens: 256}
"""


@pytest.mark.slow
def test_every_kind_of_stage_ends_alike(tmp_path):
    place = Workplace(tmp_path)
    for name in ("one", "two"):
        file = place.recipe(name, stages="init", set=[], tokens=None)
        values = yaml.safe_load(file.read_text(encoding="utf-8")) | yaml.safe_load(KINDS)
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
    place.run(f"1:{tmp_path / 'one'}.yaml", f"2:{tmp_path / 'two'}.yaml")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert set(one) == set(two)
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4


def test_what_is_said_is_said_once(place):
    assert place.errors.count(f"unfinished work lies in {place.folder / 'two'}.converting") == 1


def test_rows_that_cannot_be_shared_evenly_are_refused(place):
    sentence = "`batch_size` 3 of stage align cannot be shared evenly among 2 processes: give a multiple of 2."
    assert f"0: {sentence}\n" in place.said and f"1: {sentence}\n" in place.said
    assert place.codes(f"2:{place.folder / 'odd'}.yaml") == "[2, 2]"
    assert not list(place.folder.glob("odd*/"))


def test_what_one_cannot_read_ends_all_with_the_same_sentence(place):
    assert place.codes(f"2:{place.folder / 'unreadable'}.yaml:unreadable") == "[2, 2]"
    assert "0: The data is on another machine.\n" in place.said and "1: The data is on" in place.said


def test_a_process_that_dies_ends_the_others(place):
    assert place.codes(f"2:{place.folder / 'lost'}.yaml:lost") == "[2, 9]"
    assert "0: Another process of this conversion has ended; it said why (last good checkpoint: align-000003)." in (
        place.said
    )


def test_what_is_not_finite_in_one_process_is_traced_there(place):
    assert place.codes(f"2:{place.folder / 'nan'}.yaml:nan") == "[2, 2]"
    sentence = "The loss of stage align is nan in step 4 of 6; it began in the output of layer 1 (model.layers.1.mlp)"
    assert f"0: {sentence}" in place.said and f"1: {sentence}" in place.said


def test_one_that_is_asked_to_stop_stops_all_and_they_go_on_together(place):
    assert place.codes(f"2:{place.folder / 'asked'}.yaml:asked") == "[130, 130]"
    assert "Stopped after the checkpoint align-000004" in place.errors
    assert place.codes(f"2:{place.folder / 'asked'}.yaml") == "[0, 0]"
    resumed, expected = weights(place.folder / "asked"), weights(place.folder / "two")
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_half_an_environment_of_a_launcher_is_refused(place, monkeypatch):
    recipe = tiny_recipe(place.teacher, place.text, place.folder / "half")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConversionError, match="WORLD_SIZE is 2 but RANK is not set: start several processes with"):
        convert(recipe)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    recipe.device = "cpu:0"
    with pytest.raises(ConversionError, match="`device` 'cpu:0' is one device for 2 processes: name 'cpu', of which"):
        convert(recipe)


def test_settings_by_one_name_each():
    settings = {"a": 1, "b": None, "c": [1, 2], "d": {"e": "x"}, "stages": [{"name": "align", "lr": 0.1}]}
    assert plain(settings) == {
        "a": 1,
        "c": "[1, 2]",
        "d.e": "x",
        "stages.0.name": "align",
        "stages.0.lr": 0.1,
    }


def test_processes_choose_the_layers_together(place):
    """Each measures on its share of the blocks, and all convert what one process would have converted."""
    one, two = (
        json.loads((place.folder / name / "sensitivity.json").read_text()) for name in ("one_auto", "two_auto")
    )
    assert one["layers"] == two["layers"] and len(one["layers"]) == 1
    costs = [list(result["steps"][0]["costs"].values()) for result in (one, two)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3) and min(costs[0]) > 0
    one, two = weights(place.folder / "one_auto"), weights(place.folder / "two_auto")
    assert set(one) == set(two)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_command_under_a_launcher(place, tmp_path, launcher):
    recipe = tiny_recipe(place.teacher, place.text, tmp_path / "out", **OPTIONS)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    module = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    }[launcher]
    port = [f"--main_process_port={free_port()}" if launcher == "accelerate" else f"--master_port={free_port()}"]
    command = [sys.executable, "-m", *module, *port, "-m", "hf_memory.cli", "convert"]
    result = subprocess.run(
        [*command, "--recipe", str(tmp_path / "recipe.yaml")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The converted model is in") == 1
    expected, found = weights(place.folder / "two"), weights(tmp_path / "out")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
