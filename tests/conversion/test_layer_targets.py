"""What is compared in a layer: found in the right place, equal to a recomputation by hand, independent by layer."""

import pytest
import torch
from tiny_conversion import random_teacher

from hf_memory.conversion import layer_targets
from hf_memory.conversion.layer_targets import LayerTarget, teacher_layers
from hf_memory.conversion.losses import matrix_frobenius, relative_l2
from hf_memory.conversion.mixer_matrix import mixer_matrix
from hf_memory.conversion.schema import ConversionError
from hf_memory.conversion.stage_options import AlignStage
from hf_memory.conversion.stages import Align
from hf_memory.conversion.surgery import build_student, decoder_layers, memory_parameters, memory_slots, new_parameters
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


LINEAR = {"memory_depth": 1, "chunk_size": 4}
TARGETS = ("block", "mixer", "heads", "matrix")


@pytest.fixture(scope="module")
def teacher():
    return random_teacher()


@pytest.fixture
def student(teacher):
    return build_student(teacher, layers=[0, 2], memory_options=LINEAR).requires_grad_(True)


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(64, (2, 13))


def test_values_of_the_teacher(teacher, student, blocks):
    calls = {target: teacher_layers(LayerTarget(target, teacher, student), blocks) for target in TARGETS}
    attention = decoder_layers(teacher)[2].self_attn
    read = calls["mixer"][2].hidden_states
    assert torch.equal(calls["mixer"][2].value, attention.o_proj(calls["heads"][2].value))
    heads, shared = (getattr(teacher.config, f"num_{name}_heads") for name in ("attention", "key_value"))
    value = attention.v_proj(read).unflatten(-1, (shared, -1)).repeat_interleave(heads // shared, 2)
    mixed = torch.einsum("bhts,bshd->bthd", calls["matrix"][2].value, value).flatten(2)
    torch.testing.assert_close(mixed, calls["heads"][2].value)
    assert teacher.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gemma3_text"])
def test_other_names_and_layouts(family):
    torch.manual_seed(0)
    other = random_model(tiny_config(family)).requires_grad_(False)
    student = build_student(other, layers=[0, 1], memory_options=LINEAR)
    for target in TARGETS:
        for stream in ("teacher", "student"):
            loss, figures = Align(AlignStage(target=target, stream=stream), other, student)(torch.randint(60, (2, 9)))
            assert set(figures) == {"layer 0", "layer 1"} and 0.01 < loss.item() < 1e5


def test_matrix_of_a_memory_is_what_it_does_to_values(student):
    """Against the memory itself, from a start of zeros, with values that nothing but the matrix has seen."""
    memory = memory_slots(student)[0].memory.double()
    read = torch.randn(2, 70, 32, dtype=torch.float64)  # more tokens than are looked at together
    matrix = mixer_matrix(memory, read)
    _, _, value, _ = memory.project(read)
    with torch.no_grad():
        memory.initial_memory.weight_0.zero_()
    output, _ = memory.memorise(read, None, None, None, False)
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", matrix, value), output)
    assert torch.equal(matrix, matrix.tril())


def test_matrix_under_autocast_and_its_gradients(student):
    memory = memory_slots(student)[0].memory
    read = torch.randn(1, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = mixer_matrix(memory, read)
    exact = mixer_matrix(memory, read)
    torch.testing.assert_close(low.float(), exact, atol=0.05, rtol=0.05)
    exact.square().sum().backward()
    reached = {name for name, value in memory.named_parameters() if value.grad is not None}
    parts = {name.partition(".")[0] for name in reached}
    assert parts == {"q_proj", "k_proj", "v_proj", "conv", "gates"}
    assert not memory.v_proj.weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"memory_depth": 1, "gate_granularity": "channel"}])
def test_memories_without_a_matrix_are_refused(teacher, blocks, options):
    student = build_student(teacher, layers=[0], memory_options=options)
    with pytest.raises(ConversionError, match="needs a memory that is linear in the values"):
        Align(AlignStage(target="matrix"), teacher, student)


@pytest.mark.parametrize("memory", ["lattice", "trellis"])
def test_other_memories(teacher, blocks, memory):
    student = build_student(teacher, layers=[0], memory=memory)
    assert Align(AlignStage(target="mixer"), teacher, student)(blocks)[0].isfinite()
    with pytest.raises(ConversionError, match="needs a memory that is linear in the values"):
        Align(AlignStage(target="matrix"), teacher, student)


@pytest.mark.parametrize("target", ["heads", "matrix"])
def test_what_stands_for_attention_is_not_compared_beside_it(teacher, target):
    student = build_student(teacher, layers=[0], memory_options=LINEAR, mode="retrofit")
    with pytest.raises(ConversionError, match="mode retrofit keeps that: use `target` mixer or block"):
        Align(AlignStage(target=target), teacher, student)


def test_a_student_with_the_teachers_matrix_has_loss_zero(teacher, student, blocks, monkeypatch):
    stage = Align(AlignStage(target="matrix"), teacher, student)
    expected = teacher_layers(stage.layer_target, blocks[:, :-1])
    loss, figures = stage(blocks)
    assert loss.item() > 0 and loss.isfinite()
    by_hand = matrix_frobenius(
        mixer_matrix(memory_slots(student)[2].memory, expected[2].hidden_states), expected[2].value
    )
    assert float(figures["layer 2"]) == pytest.approx(by_hand.item(), rel=1e-6)
    theirs = {id(slot.memory): expected[index].value for index, slot in memory_slots(student).items()}
    monkeypatch.setattr(layer_targets, "mixer_matrix", lambda memory, _: theirs[id(memory)])
    assert stage(blocks)[0].item() == 0


@pytest.mark.parametrize("target", TARGETS)
def test_layers_on_the_teachers_stream_are_independent(teacher, student, blocks, target):
    stage = Align(AlignStage(target=target), teacher, student)
    _, before = stage(blocks)
    with torch.no_grad():
        for value in memory_slots(student)[0].memory.parameters():
            value.add_(torch.randn_like(value) / 4)
    _, after = stage(blocks)
    assert after["layer 2"] == before["layer 2"] and after["layer 0"] != before["layer 0"]


@pytest.mark.parametrize("target", TARGETS)
def test_layers_on_the_students_stream_read_what_the_student_made(teacher, student, blocks, target):
    stage = Align(AlignStage(target=target, stream="student"), teacher, student)
    teacher_forced = Align(AlignStage(target=target), teacher, student)
    (_, own), (_, forced) = stage(blocks), teacher_forced(blocks)
    # The first converted layer is the first of all: both read the embeddings.
    torch.testing.assert_close(own["layer 0"], forced["layer 0"])
    with torch.no_grad():
        memory_slots(student)[0].memory.o_proj.weight.mul_(3)
    assert stage(blocks)[1]["layer 2"] != own["layer 2"]


def test_student_stream_by_hand(teacher, student, blocks):
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        layer = decoder_layers(student)[2]
        hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        student(input_ids=blocks[:, :-1], use_cache=False)
        hook.remove()
        theirs = teacher_layers(LayerTarget("block", teacher, student), blocks[:, :-1])[2]
    by_hand = relative_l2(seen[0], theirs.value, theirs.hidden_states).item()
    _, figures = Align(AlignStage(stream="student"), teacher, student)(blocks)
    assert float(figures["layer 2"]) == pytest.approx(by_hand, rel=1e-5)


def gradients(stage, blocks: torch.Tensor) -> set[str]:
    stage.student.zero_grad()
    stage(blocks)[0].backward()
    return {name for name, value in stage.student.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("trainable", ["new", "memory", "all"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_parameter_that_trains_has_a_gradient(teacher, student, blocks, target, trainable):
    """Several processes wait for the gradient of each of them."""
    stage = Align(AlignStage(target=target, trainable=trainable), teacher, student)
    assert set(stage.parameters_by_name) <= gradients(stage, blocks)
    layer = {name for name in stage.parameters_by_name if name.startswith("model.layers.0.")}
    assert layer and all(name.startswith(("model.layers.0.", "model.layers.2.")) for name in stage.parameters_by_name)
    if trainable == "all" and target == "block":
        assert layer == {f"model.layers.0.{name}" for name, _ in decoder_layers(student)[0].named_parameters()}
    if trainable == "new":
        assert not any(name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in layer)


def test_what_the_loss_of_heads_and_matrix_leaves_alone(teacher, student):
    names = {target: set(Align(AlignStage(target=target), teacher, student).parameters_by_name) for target in TARGETS}
    assert names["block"] == names["mixer"] == set(memory_parameters(student))
    assert names["mixer"] - names["heads"] == {
        f"model.layers.{i}.self_attn.memory.o_proj.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    assert {name.split(".")[5] for name in names["matrix"]} == {"q_proj", "k_proj", "v_proj", "conv", "gates"} - {
        "v_proj"
    }


def test_new_is_what_attention_has_no_counterpart_for(teacher, student):
    leaves = {name.split("memory.", 1)[1].partition(".")[0] for name in new_parameters(student)}
    assert leaves == {"g_proj", "conv", "gates", "initial_memory", "o_norm"}
    # Slots of another number than a head is wide: their projections were not inherited either.
    narrow = build_student(teacher, layers=[0], memory="lattice", memory_options={"num_slots": 4})
    inherited = set(memory_parameters(narrow)) - set(new_parameters(narrow))
    assert {name.split("memory.", 1)[1].partition(".")[0] for name in inherited} == {"v_proj", "o_proj"}


def test_retrofit_mixer_is_attention_and_memory(teacher, blocks):
    student = build_student(teacher, layers=[0, 2], memory_options=LINEAR, mode="retrofit", window=64)
    loss, _ = Align(AlignStage(target="mixer"), teacher, student)(blocks)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        memory_slots(student)[0].scale.fill_(1)
    assert Align(AlignStage(target="mixer"), teacher, student)(blocks)[0].item() > 0.01


def test_heads_of_another_width_are_refused(teacher):
    student = build_student(teacher, layers=[0], memory="lattice", memory_options={"num_slots": 4, "objective": "enc"})
    with pytest.raises(ConversionError, match="32 channels of the teacher and 16 of this memory"):
        Align(AlignStage(target="heads"), teacher, student)


def test_the_teacher_is_no_part_of_the_stage(teacher, student):
    stage = Align(AlignStage(), teacher, student)
    assert {id(value) for value in stage.parameters()} == {id(value) for value in student.parameters()}
