"""Trellis models: the mixer against its description, options, precision, and memories that stay bounded."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional

from hf_memory import TrellisConfig, TrellisForCausalLM, TrellisForSequenceClassification
from hf_memory.models.trellis.modeling_trellis import TrellisMemory


OPTIONS = {
    "default": {},
    "exact": {"chunk_size": 1, "write_map": "l2_silu", "output_map": "identity", "num_slots": 64},
    "identity": {"write_map": "identity", "read_map": "softmax", "conv_value": True, "gate_act": "silu"},
    "silu": {"write_map": "silu", "value_step": "shared", "memory_decay": False, "conv_kernel": 0},
    "learned start": {"learn_initial_memory": True, "refinements": 1, "attention_bias": True},
    "first order": {"hypergrad": 0.0},
}


def config(**fields) -> TrellisConfig:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_slots": 16, "chunk_size": 4}
    return TrellisConfig(**{**sizes, "eos_token_id": None, "pad_token_id": 0, **fields})


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains_and_loads(fields, tmp_path):
    model = TrellisForCausalLM(config(**fields)).eval()
    ids = torch.randint(50, (2, 19))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.save_pretrained(tmp_path)
    half = TrellisForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {name for name, _ in model.named_parameters() if "gates." in name or "initial_memory." in name}
    with torch.no_grad():
        full = model(ids).logits
        assert torch.equal(TrellisForCausalLM.from_pretrained(tmp_path)(ids).logits, full)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids).logits
        for other in (half(ids).logits, mixed):
            assert (other - full).norm() < 0.05 * full.norm()


def test_mixer_is_its_description():
    """Spec (c.4), (f), one token after the other on plain tensors; the exact recurrence with φ = identity."""
    settings = config(write_map="identity", chunk_size=1, step_max=0.5, conv_value=True)
    mixer = TrellisMemory(settings, 0).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 12, 64, dtype=torch.float64)

    def ln_silu(z: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(functional.silu(z), z.shape[-1:], eps=1e-6)

    def heads(name: str, rows: slice) -> torch.Tensor:
        projected = getattr(mixer, name)(x)
        padded = functional.pad(projected, (0, 0, 3, 0))
        taps = mixer.conv.weight[rows]
        return functional.silu(sum(padded[:, i : i + 12] * taps[:, i] for i in range(4))).view(12, 4, 16)

    q, k = heads("q_proj", slice(0, 64)), heads("k_proj", slice(64, 128))
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    v, alpha = heads("v_proj", slice(128, 192)), mixer.target_proj(x).view(12, 4, 16)
    beta = (-mixer.gates.decay_proj(x)).sigmoid().view(12, 4, 1, 1)
    gamma = 0.5 * mixer.gates.step_proj(x).sigmoid().view(12, 4, 1, 1)
    keys = values = torch.zeros(4, 16, 16, dtype=torch.float64)
    outputs = []
    for t in range(12):
        u_k, u_v = (torch.einsum("hmd,hd->hm", s, w[t]) - alpha[t] for s, w in ((keys, k), (values, v)))
        gamma_v = gamma[t] / v[t].square().sum(-1).clamp(min=1)[:, None, None]
        keys = beta[t] * keys - gamma[t] * u_k[..., None] * k[t, :, None]
        values = beta[t] * values - gamma_v * u_v[..., None] * v[t, :, None]
        outputs.append(torch.einsum("hmd,hm->hd", values, ln_silu(torch.einsum("hmd,hd->hm", keys, q[t]))))
    y = ln_silu(torch.stack(outputs)).flatten(1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.o_norm.weight
    expected = mixer.o_proj(y * functional.gelu(mixer.g_proj(x[0])))
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_parameters_missing_from_a_checkpoint_get_their_initial_values(tmp_path):
    model = TrellisForCausalLM(config(learn_initial_memory=True))
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("model.layers.1.mixer")}
    model.save_pretrained(tmp_path, state_dict=state)
    mixer = TrellisForCausalLM.from_pretrained(tmp_path).model.layers[1].mixer
    x = torch.randn(1, 500, 64)
    gates = mixer.gates(0 * x)
    assert 0.098 < gates.step.mean() < 0.102 and 0.979 < gates.log_decay.exp().mean() < 0.981
    assert 0.9 < mixer.initial_memory.weight_0.std() < 1.1
    assert 0.9 < mixer.target_proj(x).std() < 1.1
    assert 0.2 < mixer.conv.weight.std() < 0.35


@pytest.mark.parametrize("write_map", ["identity", "silu", "l2_silu", "ln_silu"])
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_values_of_any_length_leave_the_memory_bounded(write_map, chunk_size):
    """Spec (c.4): repeated tokens, long values, the largest steps; `value_step="shared"` is known to diverge there."""
    model = TrellisForCausalLM(config(write_map=write_map, chunk_size=chunk_size, num_hidden_layers=1))
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.gates.step_proj.bias.fill_(5.0)
        mixer.v_proj.weight.mul_(10)
        sizes = {}
        for rule in ("normalized", "shared"):
            mixer.normalizes_value_step = rule == "normalized"
            _, states = mixer._memorise(torch.randn(1, 1, 64).expand(1, 600, 64), {}, None, None, True)
            sizes[rule] = float(states["memory.memory"].abs().max())
    assert sizes["normalized"] < 50
    assert write_map != "identity" or not sizes["shared"] < 1e3


def test_few_slots_are_chaotic_and_sixteen_are_not():
    """Why the README asks for 16 slots with a normalising map: rounding grows over three."""
    errors = {}
    for slots in (3, 16):
        torch.manual_seed(0)
        model = TrellisForCausalLM(config(num_slots=slots, num_hidden_layers=1, initializer_range=0.2)).eval()
        ids = torch.randint(50, (2, 400))
        with torch.no_grad():
            low = model(ids).logits[:, -100:].double()
            exact = model.double()(ids).logits[:, -100:]
        errors[slots] = float((low - exact).norm() / exact.norm())
    assert errors[16] < 1e-4 and errors[3] > 1e-2, errors


def test_sequence_classification_ignores_padding():
    model = TrellisForSequenceClassification(config(num_labels=3)).eval()
    ids = torch.randint(1, 50, (1, 8))
    with torch.no_grad():
        expected = model(ids).logits
        for padded in (functional.pad(ids, (4, 0)), functional.pad(ids, (0, 4))):
            got = model(padded, attention_mask=(padded != 0).long()).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_derived_defaults_and_round_trip(tmp_path):
    default, linear = TrellisConfig(), TrellisConfig(write_map="identity")
    assert (default.chunk_size, default.step_max, default.num_slots) == (16, 1.0, 64)
    assert (linear.chunk_size, linear.step_max) == (1, 1.0)
    assert TrellisConfig(write_map="silu").step_max == 1 / 16
    assert default.layer_types == ["linear_attention"] * 24
    settings = TrellisConfig(refinements=2, hypergrad=0.5, read_map="softmax")
    settings.save_pretrained(tmp_path)
    assert TrellisConfig.from_pretrained(tmp_path).to_dict() == settings.to_dict()


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"write_map": "softmax"}, "one of"),
        ({"read_map": "relu"}, "one of"),
        ({"output_map": "softmax"}, "one of"),
        ({"value_step": "none"}, "one of"),
        ({"gate_act": "relu"}, "one of"),
        ({"num_slots": 0}, "at least 1"),
        ({"num_slots": 1}, "at least 2"),
        ({"chunk_size": 0}, "at least 1"),
        ({"refinements": 16}, "below `chunk_size`"),
        ({"hypergrad": 1.5}, "between 0 and 1"),
        ({"step_max": -1.0}, "at least 0"),
        ({"write_eps": 0.0}, "above 0"),
        ({"conv_kernel": 0, "conv_value": True}, "set conv_kernel"),
        ({"layer_types": ["hybrid_sliding"] * 24}, "drop `layer_types`"),
    ],
)
def test_refusals_say_what_to_change(fields, advice):
    with pytest.raises((ValueError, StrictDataclassError), match=advice):
        TrellisConfig(**fields)
