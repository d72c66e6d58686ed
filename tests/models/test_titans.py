"""Titans models: loading, precision, padding, packing, generation, and the reductions of the gated variant."""

import copy

import pytest
import torch
from torch import nn
from transformers import CompileConfig

from hf_memory import TitansConfig, TitansForCausalLM, TitansForSequenceClassification, TitansModel
from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.layers import ShortConvolution, SlidingWindowAttention, create_window_mask
from hf_memory.modeling import find_packing


VARIANTS = {
    "lmm": {},
    "lmm linear": {"memory_depth": 1},
    "mag": {"variant": "mag"},
    "mag additive": {"variant": "mag", "gate": "additive", "memory_depth": 1, "persistent_in_memory": True},
    "mac": {"variant": "mac"},
    "mal": {"variant": "mal"},
}
CORNERS = {
    "gated delta rule": {
        "memory_depth": 1,
        "chunk_size": 1,
        "memory_momentum": False,
        "decay_before_grad": True,
        "theta_norm": "chunk_mean",
        "theta_act": "softplus",
    },
    "TTT-Linear": {"memory_depth": 1, "memory_layer_norm": True, "memory_decay": False, "memory_momentum": False},
    "depth 3": {"memory_depth": 3, "decay_target": "zero", "memory_act": "gelu_pytorch_tanh"},
    "channel gates": {"gate_granularity": "channel", "conv_kernel": 0, "num_persistent_tokens": 0},
}


def config(**fields) -> TitansConfig:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "chunk_size": 4, "num_persistent_tokens": 4, "sliding_window": 8}
    sizes |= {"segment_size": 8, "num_memory_tokens": 4}
    return TitansConfig(**{**sizes, "eos_token_id": None, "pad_token_id": 0, **fields})


def randomized(**fields) -> TitansForCausalLM:
    """A float64 model whose every parameter, zero-initialised ones too, is away from its special value."""
    model = TitansForCausalLM(config(**fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def model(request) -> TitansForCausalLM:
    torch.manual_seed(0)
    return randomized(**request.param)


def logits(model: nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def spread(ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Write each row of `ids` into the valid columns of that row."""
    return torch.zeros(valid.shape, dtype=ids.dtype).masked_scatter(valid, ids)


@pytest.mark.parametrize("fields", [*VARIANTS.values(), *CORNERS.values()], ids=[*VARIANTS, *CORNERS])
def test_saved_model_loads_bit_exact_and_keeps_float32_parts(fields, tmp_path):
    model = TitansForCausalLM(config(**fields)).eval()
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, loaded.state_dict()[name]), name

    half = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    exact = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {name for name, _ in model.named_parameters() if "gates." in name or "initial_memory." in name}
    ids = torch.randint(50, (2, 19))
    full = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, ids)
    for other in (logits(half, ids), mixed):
        assert (other - full).norm() < 0.05 * full.norm()


def test_parameters_missing_from_a_checkpoint_get_their_initial_values(tmp_path):
    model = TitansForCausalLM(config())
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("model.layers.1.mixer")}
    model.save_pretrained(tmp_path, state_dict=state)
    mixer = TitansForCausalLM.from_pretrained(tmp_path).model.layers[1].mixer
    assert mixer.gates.decay_proj.bias.unique() == -5 and mixer.gates.step_proj.bias.unique() == -2
    assert mixer.gates.momentum_proj.bias.unique() == 0
    assert 0.2 < mixer.initial_memory.weight_0.std() < 0.3 and mixer.initial_memory.norm_weight.unique() == 1
    assert 0.2 < mixer.conv.weight.std() < 0.35 and 0.01 < mixer.persistent.tokens.std() < 0.03


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 4, 8), (12, 13, 21)])
def test_split_prompt(model, cuts):
    ids = torch.randint(50, (2, 25))
    cache, pieces = None, []
    for start, stop in zip((0, *cuts), (*cuts, 25)):
        with torch.no_grad():
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("cuts", [(), (7, 8, 9, 20)], ids=["whole", "split"])
def test_padding_changes_nothing(model, side, cuts):
    ids = torch.randint(1, 50, (2, 22))
    valid = torch.ones(2, 30, dtype=torch.bool)
    columns = {"left": range(8), "right": range(22, 30), "anywhere": (3, 4, 5, 7, 8, 11, 12, 23)}[side]
    valid[0, list(columns)] = False
    valid[1, :8] = False
    padded, pieces, cache = spread(ids, valid), [], None
    for start, stop in zip((0, *cuts), (*cuts, 30)):
        with torch.no_grad():
            out = model(
                padded[:, start:stop],
                attention_mask=valid[:, :stop].long(),
                past_key_values=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        pieces.append(out.logits)
    got = torch.cat(pieces, 1)
    assert torch.isfinite(got).all()
    expected = logits(model, ids)
    for row in range(2):
        torch.testing.assert_close(got[row, valid[row]], expected[row], atol=1e-10, rtol=1e-8)


def test_packing_equals_separate_rows(model):
    lengths = [1, 11, 2, 9]
    rows = [torch.randint(50, (1, n)) for n in lengths]
    expected = torch.cat([logits(model, row) for row in rows], 1)
    packed, bounds = torch.cat(rows, 1), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for kwargs in ({"cu_seq_lens_q": bounds}, {"position_ids": positions}):
        torch.testing.assert_close(logits(model, packed, **kwargs), expected, atol=1e-10, rtol=1e-8)


def test_packing_is_refused_where_it_would_mix_sequences(model):
    ids, positions = torch.randint(50, (2, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    cache = model(ids[:1]).past_key_values
    with pytest.raises(ValueError, match="one row"):
        model(ids, position_ids=positions.expand(2, -1))
    with pytest.raises(ValueError, match="with padding"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 3, 6]), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="without `past_key_values`"):
        model(ids[:1], position_ids=positions, past_key_values=cache)
    assert find_packing(None, torch.arange(5, 11)[None], ids, None) is None


def test_masks_that_say_nothing_about_tokens_are_refused(model):
    ids = torch.randint(50, (1, 6))
    for mask in (torch.ones(1, 1, 6, 6), torch.ones(1, 4), torch.ones(1, 8), torch.ones(2, 6)):
        with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_persistent_tokens_are_a_prefix_read_once():
    model = randomized(num_hidden_layers=1)
    layer = model.model.layers[0]
    x = torch.randn(2, 13, 64, dtype=torch.float64)
    prefix = layer.mixer.persistent().expand(2, -1, -1)
    got = layer.mixer(x)
    layer.mixer.persistent = None
    torch.testing.assert_close(got, layer.mixer(torch.cat((prefix, x), 1))[:, 4:], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("mode", ["greedy", "sample", "beams", "static", "static beams", "chunked prefill"])
@pytest.mark.parametrize("variant", ["lmm", "mag", "mac", "mal"])
def test_generate(variant, mode):
    model = randomized(variant=variant)
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    arguments = {
        "greedy": {},
        "sample": {"do_sample": True, "num_return_sequences": 2},
        "beams": {"num_beams": 3},
        "static": {"cache_implementation": "static"},
        "static beams": {"num_beams": 3, "cache_implementation": "static"},
        "chunked prefill": {"prefill_chunk_size": 4},
    }[mode]
    common = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | arguments
    torch.manual_seed(1)
    got = model.generate(ids, **common)
    torch.manual_seed(1)
    for cached_only in ("cache_implementation", "prefill_chunk_size"):
        common.pop(cached_only, None)
    expected = model.generate(ids, **common, use_cache=False)
    assert torch.equal(got, expected)


def test_generation_continues_from_a_returned_cache(model):
    ids = torch.randint(1, 50, (1, 9))
    first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(second, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_assisted_decoding_is_refused_in_both_roles(model):
    ids = torch.randint(1, 50, (1, 5))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=model, max_new_tokens=3)
    draft = {"is_assistant": True, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="cannot take back"):
        model.generate(ids, **draft)


@pytest.mark.parametrize("variant", ["mag", "mac", "mal"])
def test_decode_compiles_once(variant):
    model = TitansForCausalLM(config(variant=variant, num_hidden_layers=2 if variant == "mal" else 1)).eval()
    ids = torch.randint(1, 50, (2, 6))
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    common = {"max_new_tokens": 12, "do_sample": False}
    got = model.generate(ids, **common, cache_implementation="static", compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, model.generate(ids, **common))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("fields", [*VARIANTS.values(), *CORNERS.values()], ids=[*VARIANTS, *CORNERS])
def test_gradients_reach_all_parameters_and_survive_checkpointing(fields):
    model = randomized(**fields).train()
    ids = torch.randint(50, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    plain, loss = gradients(model, ids, mask)
    assert torch.isfinite(loss) and all(gradient is not None for gradient in plain.values())
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.gradient_checkpointing_enable()
    again, _ = gradients(model, ids, mask)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def gradients(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict, torch.Tensor]:
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, loss.detach()


def test_inference_mode_state_goes_on_under_no_grad(model):
    ids = torch.randint(50, (1, 9))
    with torch.inference_mode():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    got = logits(model, ids[:, 6:], past_key_values=cache)
    torch.testing.assert_close(got, logits(model, ids)[:, 6:], atol=1e-10, rtol=1e-8)


def test_sequence_classification_ignores_padding():
    model = TitansForSequenceClassification(config(num_labels=3)).eval()
    ids = torch.randint(1, 50, (1, 8))
    left, right = nn.functional.pad(ids, (4, 0)), nn.functional.pad(ids, (0, 4))
    expected = logits(model, ids)
    for padded in (left, right):
        got = logits(model, padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_base_model_returns_hidden_states_and_attention_weights():
    model = TitansModel(config(variant="mag")).eval()
    model.set_attn_implementation("eager")
    out = model(torch.randint(50, (2, 12)), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and [a.shape for a in out.attentions] == [(2, 4, 12, 16)] * 2
    weights = out.attentions[0]
    assert (weights[:, :, 11, :4] > 0).all(), "the prefix is always visible"
    assert (weights[:, :, 11, 4:8] == 0).all() and (weights[:, :, 11, 8:] > 0).all(), "the window ends after 8 tokens"


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_eager_and_sdpa_agree_under_padding(variant):
    model = randomized(variant=variant)
    ids = torch.randint(1, 50, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, 2:9] = 0
    sdpa = logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    eager = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(eager[mask.bool()], sdpa[mask.bool()], atol=1e-10, rtol=1e-8)


def test_additive_gate_at_zero_is_prefix_window_attention():
    """Spec (j) 14."""
    model = randomized(variant="mag", gate="additive", num_hidden_layers=1)
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.memory_scale.zero_()
    x, time = torch.randn(2, 20, 64, dtype=torch.float64), torch.arange(20)
    position_embeddings = model.model.rotary_emb(x, time[None])
    got = mixer(x, position_embeddings, create_window_mask(model.config, x))

    attention = mixer.attention
    heads = [p(x).view(2, 20, 4, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    angle = time[:, None] * model.model.rotary_emb.inv_freq.double()
    rotation = torch.polar(torch.ones_like(angle), angle)
    query, key = (unpaired(torch.complex(*h.chunk(2, -1)) * rotation) for h in heads[:2])
    rows = attention.persistent()
    prefix = [
        p(rows).view(1, 4, 4, 16).transpose(1, 2).expand(2, -1, -1, -1) for p in (attention.k_proj, attention.v_proj)
    ]
    scores = torch.cat((query @ prefix[0].mT, query @ key.mT), -1) / 4
    distance = time[:, None] - time
    hidden = nn.functional.pad((distance < 0) | (distance >= 8), (4, 0))
    read = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ torch.cat((prefix[1], heads[2]), 2)
    torch.testing.assert_close(got, attention.o_proj(read.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


def unpaired(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.real, x.imag), -1)


def test_wide_window_without_prefix_is_causal_attention():
    """Spec (j) 15."""
    settings = config(variant="mag", num_persistent_tokens=0, sliding_window=64)
    settings._attn_implementation = "sdpa"
    attention = SlidingWindowAttention(settings, 0).double()
    x = torch.randn(2, 20, 64, dtype=torch.float64)
    no_rotation = torch.ones(1, 20, 16, dtype=torch.float64), torch.zeros(1, 20, 16, dtype=torch.float64)
    got, _ = attention(x, no_rotation, create_window_mask(settings, x))
    heads = [p(x).view(2, 20, 4, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    read = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, attention.o_proj(read), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_convolution_runs_over_valid_tokens(kernel_size):
    conv = ShortConvolution(5, kernel_size).double()
    nn.init.normal_(conv.weight)
    rows = torch.randn(3, 9, 5, dtype=torch.float64)
    padded = nn.functional.pad(rows, (0, 0, kernel_size - 1, 0))
    expected = sum(padded[:, i : i + 9] * conv.weight[:, i] for i in range(kernel_size))

    out, tail = conv(rows)
    torch.testing.assert_close(out, expected)
    assert torch.equal(tail, padded[:, 9:])

    valid = torch.rand(3, 15).argsort(1) < 9
    scattered = torch.full((3, 15, 5), torch.pi, dtype=torch.float64).masked_scatter(valid[..., None], rows)
    outs, tail = [], None
    for start, stop in ((0, 1), (1, 2), (2, 10), (10, 15)):
        out, tail = conv(scattered[:, start:stop], tail, valid[:, start:stop])
        outs.append(out)
    outs = torch.cat(outs, 1)
    torch.testing.assert_close(outs[valid].view(3, 9, 5), expected)
    assert (outs[~valid] == 0).all() and torch.equal(tail, padded[:, 9:])


def test_convolution_does_not_cross_packed_boundaries():
    conv = ShortConvolution(5, 4).double()
    nn.init.normal_(conv.weight)
    lengths, tails = [1, 7, 0, 2], torch.randn(4, 3, 5, dtype=torch.float64)
    rows = [torch.randn(1, n, 5, dtype=torch.float64) for n in lengths]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    out, new_tails = conv(torch.cat(rows, 1), tails, cu_seqlens=bounds)
    for n, row in enumerate(rows):
        window = torch.cat((tails[n : n + 1], row), 1)
        assert torch.equal(new_tails[n : n + 1], window[:, lengths[n] :])
        if lengths[n]:
            torch.testing.assert_close(out[:, bounds[n] : bounds[n + 1]], conv(row, tails[n : n + 1])[0])


def test_static_cache_reads_its_prompt_in_pieces(model):
    ids = torch.randint(50, (2, 21))
    cache, pieces = StaticMemoryCache(model.config, max_cache_len=32), []
    for start, stop in ((0, 5), (5, 6), (6, 18), (18, 21)):
        pieces.append(logits(model, ids[:, start:stop], past_key_values=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, ids), atol=1e-10, rtol=1e-8)


def test_repeated_tokens_leave_every_default_memory_bounded():
    """A chunk of equal keys takes all its steps from one start; they must not overshoot."""
    for depth in (1, 2):
        for chunk_size in (1, 16, 64):
            torch.manual_seed(0)
            model = TitansForCausalLM(config(memory_depth=depth, chunk_size=chunk_size, head_dim=64)).eval()
            with torch.no_grad():
                cache = model(torch.full((1, 1500), 7), use_cache=True).past_key_values
            states = [x for layer in cache.layers for name, x in layer.states.items() if name != "memory.phase"]
            assert max(float(x.abs().max()) for x in states) < 100, (depth, chunk_size)


def test_checkpointing_cannot_continue_from_a_cache(model):
    ids = torch.randint(50, (1, 6))
    model = copy.deepcopy(model).train()
    cache = model(ids).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Gradient checkpointing cannot continue"):
        model(ids, past_key_values=cache)


def test_empty_input_gets_a_sentence(model):
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize(
    "make", [MemoryCache, lambda config: StaticMemoryCache(config, 32)], ids=["dynamic", "static"]
)
def test_cache_made_in_inference_mode_goes_on_with_gradients(model, make):
    ids = torch.randint(50, (1, 9))
    expected = model(ids).logits[:, 6:]
    with torch.inference_mode():
        cache = make(model.config)
        model(ids[:, :6], past_key_values=cache)
    logits = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    logits.sum().backward()


def test_static_cache_forgets_the_prefix_of_earlier_weights(model):
    ids, model = torch.randint(50, (1, 9)), copy.deepcopy(model)
    with torch.no_grad():
        cache = StaticMemoryCache(model.config, 32)
        model(ids, past_key_values=cache)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_short_static_cache_keeps_the_whole_window(model):
    ids = torch.randint(50, (1, 20))
    with torch.no_grad():
        logits = model(ids, past_key_values=StaticMemoryCache(model.config, 2)).logits
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-4)
