"""Teachers spread over devices, streamed from disk or in few bits, and the memory that a conversion takes."""

import json
import shutil

import pytest
import torch
from test_convert_cli import flags, needed, run
from tiny_conversion import save_teacher, save_text, tiny_recipe, weights

from hf_memory._cli.loading import load_config
from hf_memory._cli.state_size import build_without_weights
from hf_memory.conversion.footprint import PeakMeter, expected_peak, waiting
from hf_memory.conversion.footprint import weights as bytes_of
from hf_memory.conversion.loading import layers_on_disk, load_teacher
from hf_memory.conversion.recipe import ConversionError, read_recipe
from hf_memory.conversion.run import convert
from hf_memory.conversion.surgery import build_student, decoder_layers, memory_parameters
from hf_memory.conversion.training import fingerprint
from hf_memory.evaluation.properties_tiny import tiny_config


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def plain(teacher, text, tmp_path_factory):
    """A conversion of a teacher that is wholly in memory."""
    return convert(tiny_recipe(teacher, text, tmp_path_factory.mktemp("plain") / "out"))


def skeleton_of(folder):
    return build_without_weights(load_config(str(folder)), torch.float32)


PLACEMENTS = {
    "streamed": {"stream": True},
    "auto": {"device_map": "auto"},
    "mapping": {"device_map": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                               "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
                               "lm_head": "cpu"}},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "auto" else name for name in PLACEMENTS]
)
def test_where_the_teacher_lies_changes_no_bit(name, teacher, text, plain, tmp_path):
    folder = convert(tiny_recipe(teacher, text, tmp_path / "out", **PLACEMENTS[name]))
    expected, given = weights(plain), weights(folder)
    assert expected.keys() == given.keys()
    assert all(torch.equal(value, given[name]) for name, value in expected.items())


def test_streamed_layers_are_in_memory_only_while_they_work(teacher):
    placed = layers_on_disk(skeleton_of(teacher), CPU)
    streamed = load_teacher(str(teacher), CPU, "float32", device_map=placed)
    plain = load_teacher(str(teacher), CPU, "float32")
    layers = decoder_layers(streamed)
    resident = []

    def look(module, args):
        resident.append([not any(p.is_meta for p in layer.parameters()) for layer in layers])

    for layer in layers:
        # Behind the hook that fetches the layer's weights.
        layer.mlp.act_fn.register_forward_pre_hook(look)
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(streamed(tokens).logits, plain(tokens).logits)
    assert all(all(p.is_meta for p in layer.parameters()) for layer in layers)
    assert len(resident) == 3 and not any(any(now) for now in resident)


def test_a_stage_needs_less_with_a_streamed_teacher(teacher, text, tmp_path):
    expected = {}
    for stream in (False, True):
        recipe = tiny_recipe(teacher, text, tmp_path / "out", stream=stream, stages="init,align")
        skeleton = skeleton_of(teacher)
        with torch.device("meta"):
            student = build_student(skeleton, layers=[1], memory_options=recipe.memory_options)
        footprint = expected_peak(recipe, skeleton, student, CPU)
        new = sum(value.numel() for value in memory_parameters(student).values())
        assert footprint.parts["gradients"] == 4 * new and footprint.parts["moments of Adam"] == 8 * new
        expected[stream] = footprint.parts["teacher"]
    assert expected[False] == bytes_of(skeleton) and expected[True] == bytes_of(skeleton) - waiting(skeleton)
    assert waiting(skeleton) == 2 * sum(4 * value.numel() for value in decoder_layers(skeleton)[0].parameters())


def test_the_control_counts(teacher, text, tmp_path):
    """It trains all of the teacher, where the stages train a memory; in parts no larger than those of a stage."""
    skeleton = skeleton_of(teacher)
    with torch.device("meta"):
        student = build_student(skeleton, layers=[1], memory_options={"memory_depth": 1})
    count, expected = sum(value.numel() for value in skeleton.parameters()), {}
    for accumulate in (1, 2):
        flags = {"controls": ["continued"], "set": [f"distill.accumulate={accumulate}"], "batch_size": 8}
        expected[accumulate] = expected_peak(
            tiny_recipe(teacher, text, tmp_path / "out", **flags), skeleton, student, CPU
        )
        assert expected[accumulate].when == "the control"
        assert expected[accumulate].parts["moments of Adam"] == 8 * count
    assert expected[1].parts["activations"] == 2 * expected[2].parts["activations"]


def test_few_bits_count_and_need_their_package(teacher, text, tmp_path, monkeypatch):
    skeleton = skeleton_of(teacher)
    linear = sum(p.numel() for name, p in skeleton.named_parameters() if "proj" in name)
    assert bytes_of(skeleton) - bytes_of(skeleton, bits=8) == 3 * linear
    assert bytes_of(skeleton) - bytes_of(skeleton, bits=4) == 7 * linear // 2
    monkeypatch.setattr("hf_memory.conversion.loading.find_spec", lambda name: None)
    result = run(*flags(needed(teacher, text, tmp_path / "out") | {"teacher-bits": 4}))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "`teacher_bits` 4 needs the package bitsandbytes, which is not installed" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_cannot_be_one_is_refused_before_it_is_loaded(tmp_path):
    tiny_config("falcon").save_pretrained(tmp_path / "falcon")
    with pytest.raises(ConversionError, match="FalconForCausalLM cannot be converted: its attention does not go"):
        convert(tiny_recipe(tmp_path / "falcon", None, tmp_path / "out", stages="init", tokens=None))


def half_of_the_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def in_few_bits(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (half_of_the_weights, "holds no model that can be read: Error while deserializing"),
        (in_few_bits, "needs a package that is not installed: .*GPTQ"),
        (without_tokenizer, "holds no tokenizer that can be read"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_one_sentence(teacher, text, tmp_path, damage, sentence):
    shutil.copytree(teacher, tmp_path / "teacher")
    damage(tmp_path / "teacher")
    with pytest.raises(ConversionError, match=sentence) as caught:
        convert(tiny_recipe(tmp_path / "teacher", text, tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_placements_that_do_not_fit_are_one_sentence(teacher, text, tmp_path):
    with pytest.raises(ConversionError, match="`stream` and `device_map` both say"):
        tiny_recipe(teacher, text, tmp_path / "out", stream=True, device_map="auto")
    with pytest.raises(ConversionError, match="`device_map` must be auto, balanced.*'everywhere'"):
        tiny_recipe(teacher, text, tmp_path / "out", device_map="everywhere")
    with pytest.raises(ConversionError, match="`teacher_bits` must be 8 or 4, got 3"):
        tiny_recipe(teacher, text, tmp_path / "out", teacher_bits=3)
    with pytest.raises(ConversionError, match="cannot be placed as `device_map`.*"):
        convert(tiny_recipe(teacher, text, tmp_path / "out", device_map={"": "abacus"}))
    with pytest.raises(ConversionError, match="`device_map` leaves the teacher's embedding on disk: place it on"):
        convert(tiny_recipe(teacher, text, tmp_path / "all", device_map={"": "disk"}))


def test_a_streamed_teacher_gives_the_same_student(teacher):
    streamed = load_teacher(str(teacher), CPU, "float32", device_map=layers_on_disk(skeleton_of(teacher), CPU))
    plain = load_teacher(str(teacher), CPU, "float32")
    assert fingerprint(streamed) == fingerprint(plain)
    for mode in ("replace", "retrofit"):
        given, expected = (build_student(model, layers=[1], mode=mode).state_dict() for model in (streamed, plain))
        assert given.keys() == expected.keys()
        assert all(torch.equal(value, given[name]) for name, value in expected.items())
    assert all(p.is_meta for p in decoder_layers(streamed).parameters())


def test_a_peak_is_measured_beyond_what_was_there():
    before = torch.ones(2**22)
    meter = PeakMeter(CPU)
    during = torch.ones(2**24)
    del during
    # The kernel counts pages in batches.
    assert abs(meter.measure() - 2**26) < 2**22
    assert before.sum() == 2**22


@pytest.mark.slow
def test_the_expected_peak_of_the_demos_teacher(root, run_python, tmp_path):
    """In a process of its own: memory that earlier tests gave back is used again, and would not count."""
    text = save_text(tmp_path / "text.txt", lines=3000)
    recipe = {"teacher": str(root / "examples" / "demo_teacher"), "data": str(text), "output": str(tmp_path / "out"),
              "layers": "odd", "context": 512, "batch_size": 4, "tokens": 4096, "device": "cpu", "code": False,
              "held_out_blocks": 4}  # fmt: skip
    assert read_recipe(flags=recipe).layers == "odd"
    run_python(
        "from hf_memory.conversion.recipe import read_recipe\n"
        "from hf_memory.conversion.run import convert\n"
        f"convert(read_recipe(flags={recipe!r}))"
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    peak = report["peak"]
    assert sum(peak["parts"].values()) == peak["expected"]
    assert 1 / 1.5 < peak["used"] / peak["expected"] < 1.5
    assert any("MiB used" in note for note in report["notes"])


ALIGN = """
import sys
import torch
from hf_memory._cli.loading import load_config
from hf_memory._cli.state_size import build_without_weights
from hf_memory.conversion.footprint import PeakMeter
from hf_memory.conversion.loading import layers_on_disk, load_teacher
from hf_memory.conversion.stage_options import AlignStage
from hf_memory.conversion.stages import make_stage, only_these_train
from hf_memory.conversion.surgery import build_student

cpu, folder, streamed = torch.device("cpu"), sys.argv[1], sys.argv[2] == "True"
placed = layers_on_disk(build_without_weights(load_config(folder), torch.float32), cpu) if streamed else None
meter = PeakMeter(cpu)
teacher = load_teacher(folder, cpu, "float32", device_map=placed)
student = build_student(teacher, layers=[1], memory_options={"memory_depth": 1, "chunk_size": 8})
stage = make_stage(AlignStage(), teacher, student)
stage.prepare()
with only_these_train(student, stage.parameters_by_name):
    stage(torch.arange(3, 35)[None])[0].backward()
print(meter.measure())
"""


@pytest.mark.slow
def test_teacher_and_student_are_never_in_memory_together(run_python, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "head_dim": 64}
    teacher = save_teacher(tmp_path / "teacher", **sizes)
    both = 2 * (teacher / "model.safetensors").stat().st_size
    used = {}
    for streamed in (False, True):
        told = run_python(f"import sys\nsys.argv = ['', {str(teacher)!r}, '{streamed}']\n{ALIGN}")
        used[streamed] = int(told.split()[-1])
    assert used[True] < 0.75 * both < both < used[False]
