"""Lattice models: configuration, initial values, precision, and what a conversion makes of them."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_memory import LatticeConfig, LatticeForCausalLM, LatticeForSequenceClassification
from hf_memory.conversion.surgery import OPEN_GATES, build_student
from hf_memory.evaluation.properties_tiny import random_model, tiny_config


VARIANTS = {
    "dec": {},
    "enc, few slots": {"objective": "enc", "num_slots": 6},
    "sim, many slots": {"objective": "sim", "num_slots": 24, "qk_norm": "softmax"},
    "lazy": {"normalization": "lazy", "memory_decay": True, "conv_kernel": 0},
}


def config(**fields) -> LatticeConfig:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "chunk_size": 4, "eos_token_id": None, "pad_token_id": 0}
    return LatticeConfig(**{**sizes, **fields})


def logits(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_defaults():
    default = LatticeConfig()
    assert (default.head_dim, default.num_slots, default.chunk_size, default.objective) == (64, 64, 16, "dec")
    assert (default.normalization, default.gamma_max, default.gamma_init) == ("retract", 1.0, 0.1)
    assert default.tie_word_embeddings and default.layer_types == ["linear_attention"] * 24


def test_round_trip(tmp_path):
    before = config(objective="enc", num_slots=6, normalization="lazy", memory_decay=True)
    before.save_pretrained(tmp_path)
    assert LatticeConfig.from_pretrained(tmp_path).to_dict() == before.to_dict()


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"objective": "code"}, "one of"),
        ({"normalization": "frobenius"}, "one of"),
        ({"qk_norm": "rms"}, "one of"),
        ({"num_slots": 0}, "at least 1"),
        ({"chunk_size": 0}, "at least 1"),
        ({"gamma_init": 1.0}, "between 0 and `gamma_max`"),
        ({"memory_decay": True}, 'normalization="lazy"'),
        ({"layer_types": ["hybrid_sliding"] * 2}, "drop `layer_types`"),
    ],
)
def test_refusals_say_what_to_change(fields, advice):
    with pytest.raises(StrictDataclassError, match=advice):
        config(**fields)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_saved_model_loads_bit_exact_and_keeps_float32_parts(fields, tmp_path):
    model = LatticeForCausalLM(config(**fields)).eval()
    model.save_pretrained(tmp_path)
    loaded = LatticeForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, loaded.state_dict()[name]), name
    half = LatticeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {name for name, _ in model.named_parameters() if "gates." in name or "initial_memory." in name}
    ids = torch.randint(50, (2, 19))
    full = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, ids)
    for other in (logits(half, ids), mixed):
        assert (other - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("num_slots", [6, 16, 24])
def test_a_fresh_memory_has_orthonormal_slots_and_small_steps(num_slots):
    mixer = LatticeForCausalLM(config(num_slots=num_slots)).model.layers[1].mixer
    slots = mixer.initial_memory.slots.detach()
    gram = slots @ slots.mT if num_slots <= 16 else slots.mT @ slots
    assert torch.allclose(gram, torch.eye(min(num_slots, 16)).expand_as(gram), atol=1e-5)
    assert not torch.allclose(slots[0], slots[1])
    step = mixer.gates(torch.zeros(1, 1, 64)).step
    assert torch.allclose(step, torch.full_like(step, 0.1), atol=1e-6)


def test_parameters_missing_from_a_checkpoint_get_their_initial_values(tmp_path):
    model = LatticeForCausalLM(config())
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("model.layers.1.mixer")}
    model.save_pretrained(tmp_path, state_dict=state)
    mixer = LatticeForCausalLM.from_pretrained(tmp_path).model.layers[1].mixer
    slots = mixer.initial_memory.slots
    assert torch.allclose(slots.norm(dim=-1), torch.ones(4, 16), atol=1e-5)
    assert torch.allclose(mixer.gates.step_proj.bias, torch.tensor(-2.1972), atol=1e-3)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_all_parameters(fields):
    model = LatticeForCausalLM(config(**fields)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(50, (2, 14))
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_repeated_tokens_leave_the_slots_unit_vectors():
    for chunk_size in (1, 16, 64):
        model = LatticeForCausalLM(config(chunk_size=chunk_size, gamma_init=0.9)).eval()
        with torch.no_grad():
            out = model(torch.full((1, 640), 7), use_cache=True)
        assert out.logits.isfinite().all()
        for layer in out.past_key_values.layers:
            assert torch.allclose(layer.states["memory.slots"].norm(dim=-1), torch.ones(1, 4, 16), atol=1e-6)


def test_a_quarter_of_the_slots_is_a_quarter_of_the_state():
    sizes = {}
    for num_slots in (4, 16):
        model = LatticeForCausalLM(config(num_slots=num_slots, conv_kernel=0)).eval()
        with torch.no_grad():
            cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True).past_key_values
        sizes[num_slots] = sum(x.nbytes for layer in cache.layers for n, x in layer.states.items() if "phase" not in n)
    assert sizes[16] == 4 * sizes[4] == 2 * 2 * 4 * 16 * 16 * 4


def test_sequence_classification_ignores_padding():
    model = LatticeForSequenceClassification(config(num_labels=3)).eval()
    ids = torch.randint(1, 50, (1, 8))
    for sides in ((4, 0), (0, 4)):
        padded = nn.functional.pad(ids, sides)
        got = logits(model, padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(got, logits(model, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_slots", [16, 4])
def test_a_converted_layer_inherits_what_fits(num_slots):
    teacher = random_model(tiny_config("llama"))
    options = {"chunk_size": 4, "num_slots": num_slots}
    student = build_student(teacher, layers=[1], memory="lattice", memory_options=options)
    attention, memory = teacher.model.layers[1].self_attn, student.model.layers[1].self_attn.memory
    assert torch.equal(memory.o_proj.weight, attention.o_proj.weight)
    assert torch.equal(memory.v_proj.weight[:16], attention.v_proj.weight[:16])
    if num_slots == 16:
        assert torch.equal(memory.q_proj.weight, attention.q_proj.weight)
    assert memory.q_proj.weight.shape == (4 * num_slots, 64) and memory.q_proj.weight.std() > 0.01
    assert (memory.g_proj.bias == OPEN_GATES["silu"]).all() and not memory.g_proj.weight.any()
    assert (memory.gates.step_proj.bias < -2).all()
    ids = torch.randint(3, 100, (2, 12))
    assert logits(student, ids).isfinite().all()
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)
