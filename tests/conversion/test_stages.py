"""What the stages minimise and what they leave alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_conversion import random_teacher, save_teacher, save_text, tiny_recipe, weights
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hf_memory.conversion.layer_targets import LayerTarget, teacher_layers
from hf_memory.conversion.losses import DIVERGENCES, logit_kl, relative_l2
from hf_memory.conversion.run import convert
from hf_memory.conversion.sampling import continue_rows
from hf_memory.conversion.stage_options import AlignStage, DistillStage, OnPolicyStage
from hf_memory.conversion.stages import Align, Distill, make_stage, only_these_train, patterns
from hf_memory.conversion.surgery import build_student, decoder_layers, memory_parameters
from hf_memory.conversion.training import as_masters, learning_rate, make_optimizer


@pytest.fixture(scope="module")
def teacher():
    return random_teacher()


@pytest.fixture
def student(teacher):
    return build_student(teacher, layers=[0, 2], memory_options={"chunk_size": 4}).requires_grad_(True)


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(64, (2, 13))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    def missing(*args):
        raise ImportError

    monkeypatch.setattr("hf_memory.conversion.report.plot", missing)


def train(stage, student, blocks: torch.Tensor, steps: int) -> list[float]:
    as_masters(stage.parameters_by_name)
    stage.prepare()
    optimizer, losses = make_optimizer(stage), []
    with only_these_train(student, stage.parameters_by_name):
        for _ in range(steps):
            optimizer.zero_grad()
            loss, _ = stage(blocks)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_recorded_layers_are_those_of_the_forward_pass(teacher, student, blocks):
    hidden = teacher(input_ids=blocks, output_hidden_states=True).hidden_states
    hooks = [len(layer._forward_hooks) for layer in decoder_layers(teacher)]
    calls = teacher_layers(LayerTarget("block", teacher, student), blocks)
    assert list(calls) == [0, 2]
    call = calls[0]
    assert torch.equal(call.hidden_states, hidden[0]) and torch.equal(call.value, hidden[1])
    assert torch.equal(decoder_layers(teacher)[0](*call.args, **call.kwargs), call.value)
    assert [len(layer._forward_hooks) for layer in decoder_layers(teacher)] == hooks


def test_align_compares_every_block_on_the_teachers_own_input(teacher, student, blocks):
    stage = Align(AlignStage(), teacher, student)
    total, figures = stage(blocks)
    hidden = teacher(input_ids=blocks[:, :-1], output_hidden_states=True).hidden_states
    layer, context = decoder_layers(student)[0], torch.arange(12)[None]
    given = layer(hidden[0], position_embeddings=teacher.model.rotary_emb(hidden[0], context))
    assert float(figures["layer 0"]) == pytest.approx(relative_l2(given, hidden[1], hidden[0]).item(), rel=1e-5)
    assert total.item() == pytest.approx(float(figures["layer 0"] + figures["layer 2"]), rel=1e-5)


def test_align_treats_layers_independently(teacher, student, blocks):
    stage = Align(AlignStage(), teacher, student)
    _, before = stage(blocks)
    with torch.no_grad():
        decoder_layers(student)[0].self_attn.memory.o_proj.weight.mul_(3)
    _, after = stage(blocks)
    assert after["layer 2"] == before["layer 2"] and after["layer 0"] != before["layer 0"]


def test_retrofit_starts_at_loss_zero_inside_the_window(teacher, blocks):
    student = build_student(teacher, layers=[0, 1], mode="retrofit", window=16)
    loss, _ = Align(AlignStage(), teacher, student)(blocks)
    assert loss.item() < 1e-5
    divergence, _ = Distill(DistillStage(), teacher, student)(blocks)
    assert divergence.item() < 1e-6


def test_align_learns_and_leaves_the_teachers_tensors_alone(teacher, student, blocks):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    own = set(memory_parameters(student))
    losses = train(Align(AlignStage(lr=3e-3), teacher, student), student, blocks, 25)
    assert losses[-1] < 0.8 * losses[0]
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in own)
    assert all(parameter.grad is None for name, parameter in student.named_parameters() if name not in own)
    theirs = teacher.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in after.items() if name not in own)


# Each stage and target, what it trains, and the share of its loss that is left behind a few steps on one batch.
LINEAR = {"memory_depth": 1, "chunk_size": 4}
OVERFITS = {
    "block": (AlignStage(), 0.8),
    "block on the student's stream": (AlignStage(stream="student"), 0.8),
    "block with all of the layer": (AlignStage(trainable="all"), 0.8),
    "block with adapters": (AlignStage(lora_rank=4), 0.9),
    "mixer": (AlignStage(target="mixer"), 0.8),
    "heads": (AlignStage(target="heads"), 0.5),
    "heads with new parameters": (AlignStage(target="heads", trainable="new"), 0.8),
    "matrix": (AlignStage(target="matrix"), 0.9),
    "matrix on the student's stream": (AlignStage(target="matrix", stream="student"), 0.9),
    "distill": (DistillStage(temperature=2.0), 0.8),
    "distill all": (DistillStage(temperature=2.0, trainable="all"), 0.8),
    "distill with the layers' loss": (DistillStage(layer_weight=0.5), 0.8),
    "distill adapters everywhere": (DistillStage(lora_rank=4, trainable="all"), 0.8),
    "next token": (DistillStage(kl_weight=0, ce_weight=1, trainable="all"), 0.8),
    "on policy, forward": (OnPolicyStage(prompt_tokens=4, new_tokens=9, divergence="forward"), 0.8),
    "on policy, reverse": (OnPolicyStage(prompt_tokens=4, new_tokens=9), 0.8),
    "on policy, jsd": (OnPolicyStage(prompt_tokens=4, new_tokens=9, divergence="jsd", top_k=20), 0.8),
}


@pytest.mark.parametrize(("options", "left"), OVERFITS.values(), ids=OVERFITS)
def test_every_stage_reduces_its_own_loss_and_moves_nothing_frozen(teacher, blocks, options, left):
    student = build_student(teacher, layers=[0, 2], memory_options=LINEAR)
    theirs = copy.deepcopy(teacher.state_dict())
    stage = make_stage(replace(options, lr=1e-2), teacher, student, 1)
    before, trains = copy.deepcopy(student.state_dict()), set(stage.parameters_by_name)
    losses = train(stage, student, blocks, 15)
    assert sum(losses[-3:]) < 3 * left * losses[0]
    after = student.state_dict()
    # Biases and rows that say nothing about this batch may rest.
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert moved <= trains and len(moved) > 0.8 * len(trains)
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.state_dict().items())


def test_distill_adds_the_loss_of_the_layers(teacher, student, blocks):
    plain, _ = Distill(DistillStage(), teacher, student)(blocks)
    layers, by_layer = Align(AlignStage(), teacher, student)(blocks)
    total, figures = Distill(DistillStage(layer_weight=0.25), teacher, student)(blocks)
    assert total.item() == pytest.approx((plain + 0.25 * layers).item(), rel=1e-5)
    assert {name: value.item() for name, value in by_layer.items()} == pytest.approx(
        {name: figures[name].item() for name in by_layer}
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_policy_judges_what_the_student_wrote(teacher, student, blocks, divergence):
    options = OnPolicyStage(prompt_tokens=5, new_tokens=6, temperature=1.5, top_k=30, divergence=divergence)
    stage = make_stage(options, teacher, student)
    stage.prepare()
    stage.step_seed = 3
    loss, figures = stage(blocks)
    text = continue_rows(student, blocks[:, :5], 6, seed=3, top_k=30)
    given, expected = student(text).logits[:, 4:10], teacher(text).logits[:, 4:10]
    assert loss.item() == pytest.approx(DIVERGENCES[divergence](given, expected, 1.5).item(), rel=1e-5)
    assert figures == {divergence: loss.detach()}
    stage.step_seed = 4
    assert stage(blocks)[0].item() != pytest.approx(loss.item(), rel=1e-6)


def test_every_loss_is_the_mean_over_parts_of_a_batch(teacher, student):
    """What accumulation and several processes rely on."""
    blocks = torch.randint(64, (4, 13))
    for options in (AlignStage(), AlignStage(target="mixer"), AlignStage(target="heads"), DistillStage(ce_weight=0.5)):
        stage = make_stage(options, teacher, student)
        parts = torch.stack([stage(part)[0] for part in blocks.chunk(2)])
        torch.testing.assert_close(stage(blocks)[0], parts.mean(), rtol=1e-5, atol=0)
    stage = make_stage(OnPolicyStage(prompt_tokens=4, new_tokens=9), teacher, student)
    parts = torch.stack([stage(part)[0] for part in (blocks[::2], blocks[1::2])])
    torch.testing.assert_close(stage(blocks)[0], parts.mean(), rtol=1e-5, atol=0)


def test_distill_weighs_divergence_and_cross_entropy(teacher, student, blocks):
    options = DistillStage(temperature=2.0, kl_weight=0.5, ce_weight=0.25)
    total, figures = Distill(options, teacher, student)(blocks)
    given, expected = student(blocks[:, :-1]).logits, teacher(blocks[:, :-1]).logits
    cross_entropy = functional.cross_entropy(given.flatten(0, 1), blocks[:, 1:].flatten())
    assert float(figures["kl"]) == pytest.approx(logit_kl(given, expected, 2.0).item(), rel=1e-5)
    assert float(figures["ce"]) == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert total.item() == pytest.approx(0.5 * float(figures["kl"]) + 0.25 * float(figures["ce"]), rel=1e-5)


def test_what_the_teacher_has_may_learn_more_slowly(teacher, student):
    stage = Distill(DistillStage(lr=1e-2, kept_lr=1e-3, weight_decay=0.1, trainable="all"), teacher, student)
    groups = make_optimizer(stage).param_groups
    by_parameter = {id(p): (group["peak"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert by_parameter[id(student.model.norm.weight)] == (1e-3, 0.0)
    assert by_parameter[id(student.lm_head.weight)] == (1e-3, 0.1)
    memory = decoder_layers(student)[0].self_attn.memory
    assert by_parameter[id(memory.q_proj.weight)] == (1e-2, 0.1)
    assert by_parameter[id(memory.q_proj.bias)] == (1e-2, 0.0)
    assert len(by_parameter) == len(list(student.parameters()))


def test_learning_rate_rises_and_falls():
    options = AlignStage(warmup=0.2, floor=0.1)
    rates = [learning_rate(options, 2.0, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates == rates[:4] + sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert rates[-1] > 0.2 == pytest.approx(learning_rate(options, 2.0, 20, 20))


def test_names_are_shown_by_pattern(student):
    lines = patterns(dict(student.named_parameters()))
    assert lines["model.layers.{0-2}.mlp.{gate_proj,up_proj,down_proj}"] == 3 * 3 * 32 * 48
    assert lines["model.layers.{1}.self_attn.{q_proj,k_proj,v_proj,o_proj}"] == sum(
        parameter.numel() for parameter in decoder_layers(student)[1].self_attn.parameters()
    )
    assert "model.layers.{0,2}.self_attn.memory.gates.{step_proj,decay_proj,momentum_proj}" in lines
    assert sum(lines.values()) == student.num_parameters()


def test_kept_tensors_are_those_of_the_checkpoint_bit_for_bit(tmp_path):
    """Through a whole conversion and a load, of a teacher in bfloat16 that is computed with in float32."""
    source = save_teacher(tmp_path / "teacher", torch.bfloat16)
    text = save_text(tmp_path / "text.txt")
    folder = convert(tiny_recipe(source, text, tmp_path / "out", stages="init,align", tokens=64))
    theirs, ours = weights(source), weights(folder)
    kept = set(ours) & set(theirs)
    assert kept == {name for name in theirs if "layers.1.self_attn" not in name}
    assert all(ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], theirs[name]) for name in kept)
    gates = [value for name, value in ours.items() if ".gates." in name or ".initial_memory." in name]
    assert gates and all(value.dtype == torch.float32 for value in gates)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in ours.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_dtype(tmp_path, dtype):
    source = save_teacher(tmp_path / "teacher")
    folder = convert(tiny_recipe(source, None, tmp_path / "out", stages="init", save_dtype=dtype))
    wanted = getattr(torch, dtype)
    for name, value in weights(folder).items():
        assert value.dtype == (torch.float32 if ".gates." in name or ".initial_memory." in name else wanted)


def test_bfloat16_trains_float32_masters(tmp_path):
    source, text = save_teacher(tmp_path / "teacher"), save_text(tmp_path / "text.txt")
    flags = {"dtype": "bfloat16", "tokens": 64, "set": ["distill.trainable=all", "distill.ce_weight=0.5"]}
    folder = convert(tiny_recipe(source, text, tmp_path / "out", **flags))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights(folder).values())


def test_no_layer_replaced_and_everything_trained_continues_the_teacher(tmp_path):
    source, text = save_teacher(tmp_path / "teacher"), save_text(tmp_path / "text.txt")
    flags = {"layers": "none", "set": ["distill.trainable=all", "distill.kl_weight=0", "distill.ce_weight=1"]}
    folder = convert(tiny_recipe(source, text, tmp_path / "out", **flags))
    theirs, ours = weights(source), weights(folder)
    assert set(ours) == set(theirs) and not torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])
