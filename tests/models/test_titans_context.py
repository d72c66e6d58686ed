"""Memory as context and memory as layer: the rule token by token, no view of later tokens, the segment grid."""

import copy
from dataclasses import replace

import pytest
import torch
from test_titans import config, logits, randomized
from torch import nn

from hf_memory import TitansConfig, TitansForCausalLM
from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.cache_layers import MemorySegmentCacheLayer, MemorySlidingCacheLayer
from hf_memory.kernels import Gates, anchored_linear, anchored_mlp, force_form
from hf_memory.models.hybrid.configuration_hybrid import MemoryHybridConfig
from hf_memory.models.titans.context import SegmentGrid, TitansContextAttention


SEGMENTS = {"variant": "mac", "segment_size": 8, "num_memory_tokens": 4}
OPTIONS = {
    "deep": {},
    "deep towards zero, every token": {"decay_target": "zero", "num_memory_tokens": 8},
    "linear": {"memory_depth": 1, "chunk_size": 1, "num_memory_tokens": 1},
    "persistent in memory": {"persistent_in_memory": True, "memory_act": "gelu_pytorch_tanh"},
    "plain": {"num_persistent_tokens": 0, "conv_kernel": 0, "memory_momentum": False},
}


def mixer_and_inputs(fields: dict, length: int) -> tuple[TitansContextAttention, torch.Tensor]:
    model = randomized(num_hidden_layers=1, **SEGMENTS | fields)
    return model.model.layers[0].mixer, torch.randn(1, length, 64, dtype=torch.float64)


def rotated(heads: torch.Tensor, position: int, inv_freq: torch.Tensor) -> torch.Tensor:
    """Heads `[H, d]` rotated in the plane of complex numbers, by angles of float32 precision as in transformers."""
    angle = position * inv_freq.float()
    turned = torch.complex(*heads.chunk(2, -1)) * torch.complex(angle.cos().double(), angle.sin().double())
    return torch.cat((turned.real, turned.imag), -1)


def convolved(mixer: TitansContextAttention, x: torch.Tensor) -> torch.Tensor:
    """Queries `[T, D]` behind the convolution."""
    q = mixer.memory.q_proj(x[0])
    if mixer.memory.conv is None:
        return q
    weight = mixer.memory.conv.weight[:64]
    padded = nn.functional.pad(q, (0, 0, 3, 0))
    return sum(padded[i : i + len(q)] * weight[:, i] for i in range(4))


def frozen_answer(mixer: TitansContextAttention, query: torch.Tensor, states: dict | None) -> torch.Tensor:
    """M(q) `[H, d]` of the memory in `states`, written out from its definition."""
    memory, norm = mixer.memory, mixer.memory.initial_memory.norm
    weights = [w.clone() for w in memory.initial_memory.weights]
    for i in range(len(weights)):
        if states is not None:
            offset = states.get(f"memory.offset_{i}")
            weights[i] = states[f"memory.memory_{i}"][0] if offset is None else weights[i] + offset[0]
    q = nn.functional.silu(query).view(4, 16)
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    tanh = "tanh" if memory.options.activation == "gelu_pytorch_tanh" else "none"
    z = torch.einsum("hi,hio->ho", q, weights[0])
    for weight in weights[1:]:
        z = torch.einsum("hi,hio->ho", nn.functional.gelu(z, approximate=tanh), weight)
    if norm is None:
        return z
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return q + z * norm[0] + norm[1]


def token_by_token(mixer: TitansContextAttention, x: torch.Tensor, literal: bool = False) -> torch.Tensor:
    """Spec (c6) for one row, one token after the other; `literal` shows all memory tokens to the whole segment."""
    cfg, attention = mixer.attention.config, mixer.attention
    size, count, prefix = cfg.segment_size, cfg.num_memory_tokens, cfg.num_persistent_tokens
    per_token, length = size // count, x.shape[1]
    freq, queries = attention.rotary_emb.inv_freq, convolved(mixer, x)

    def pair(row: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        return rotated(attention.k_proj(row).view(4, 16), position, freq), attention.v_proj(row).view(4, 16)

    persistent = attention.persistent()[0] if prefix else []
    states = mixer.memory.start(attention.persistent if mixer.persistent_in_memory else None, 1)
    outputs = []
    for start in range(0, length, size):
        stop, frozen = min(start + size, length), states
        context = []
        for i in range(count):
            group = queries[start + i * per_token : start + (i + 1) * per_token]
            answer = frozen_answer(mixer, group.mean(0) if len(group) else queries[0], frozen)
            context.append(pair(mixer.context_norm(answer.flatten()), prefix + i))
        text = [pair(x[0, t], prefix + count + t - start) for t in range(start, stop)]
        for t in range(start, stop):
            j = t - start
            seen = [pair(row, i) for i, row in enumerate(persistent)]
            seen += context if literal else [c for i, c in enumerate(context) if (i + 1) * per_token - 1 <= j]
            seen += text[: j + 1]
            keys, values = (torch.stack(parts) for parts in zip(*seen))
            query = rotated(attention.q_proj(x[0, t]).view(4, 16), prefix + count + j, freq)
            weights = torch.einsum("hd,khd->hk", query, keys).div(4).softmax(-1)
            attended = attention.o_proj(torch.einsum("hk,khd->hd", weights, values).flatten())
            joined = mixer.inner_norm(x[0, t] + attended)
            with force_form("reference"):
                read, states = mixer.memory.memorise(joined[None, None], states, None, None, True)
            gate = nn.functional.silu(mixer.memory_norm(read.flatten()))
            outputs.append(mixer.o_proj(mixer.attention_norm(attended) * gate))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_segments_are_the_rule_token_by_token(fields):
    """Spec (c6), with inner gradients by autograd of the stated loss; one segment cut short."""
    mixer, x = mixer_and_inputs(fields, 19)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), token_by_token(mixer, x), atol=1e-10, rtol=1e-8)


def test_outer_gradients_are_those_of_the_rule():
    mixer, x = mixer_and_inputs({}, 19)
    found = []
    for compute in (mixer, lambda x: token_by_token(mixer, x)):
        inputs = x.clone().requires_grad_()
        loss = (compute(inputs) * torch.linspace(-1, 1, 64, dtype=x.dtype)).sum()
        found.append(torch.autograd.grad(loss, [inputs, *mixer.parameters()]))
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-6)


def changed_one_by_one(x: torch.Tensor) -> torch.Tensor:
    """Row 0 is `x [1, T, D]`, row i + 1 another value at place i."""
    rows = x.repeat(x.shape[1] + 1, 1, 1)
    places = torch.arange(x.shape[1])
    rows[places + 1, places] = torch.randn(x.shape[1], x.shape[2], dtype=x.dtype)
    return rows


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
def test_no_output_depends_on_later_tokens(fields):
    """Spec (j) 3 for MAC, at every place of two segments and into a third."""
    mixer, x = mixer_and_inputs(fields, 20)
    with torch.no_grad():
        out = mixer(changed_one_by_one(x))
    change = (out[1:] - out[:1]).abs().amax(-1)
    place = torch.arange(20)
    assert change[place[:, None] > place].max() < 1e-12
    assert (change.diagonal() > 1e-6).all(), "every token changes its own output"
    assert (change[:8, 8:].amax(1) > 1e-9).all(), "and those of later segments"


def test_the_rule_as_printed_leaks():
    """The check above can fail: with all memory tokens visible, the first output knows the whole segment."""
    mixer, x = mixer_and_inputs({}, 8)
    with torch.no_grad():
        changed = x.clone()
        changed[:, 7] += 1
        before, after = (token_by_token(mixer, rows, literal=True) for rows in (x, changed))
    assert (before - after)[:, 0].abs().max() > 1e-6


@pytest.mark.parametrize("fields", [{}, {"memory_depth": 1, "chunk_size": 1}], ids=["deep", "linear"])
def test_recall_is_what_the_op_reads_when_it_learns_and_forgets_nothing(fields):
    mixer, x = mixer_and_inputs(fields, 16)
    memory = mixer.memory
    query = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        _, states = memory.memorise(x, None, None, None, True)
        answers = memory.recall(query, memory.anchor(states, 1))
        q = nn.functional.silu(query)
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        nothing = torch.zeros(1, 3, 4, memory.initial_memory.depth, dtype=torch.float64)
        gates = Gates(nothing, nothing, nothing - torch.inf)
        weights, norm = memory.initial_memory.weights, memory.initial_memory.norm
        op, weights = (anchored_linear, weights[0]) if len(weights) == 1 else (anchored_mlp, weights)
        states = {name.removeprefix("memory."): x for name, x in states.items() if name.startswith("memory.")}
        options = replace(memory.options, form="reference")
        expected, _ = op(q, q, q, gates, weights, norm, initial_state=states, options=options)
    torch.testing.assert_close(answers, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    "make", [MemoryCache, lambda config: StaticMemoryCache(config, 32)], ids=["dynamic", "static"]
)
def test_a_segment_ends_by_clearing_its_keys_and_freezing_the_memory(make):
    model = randomized(**SEGMENTS)
    cache = make(model.config)
    layer = cache.layers[0]
    assert isinstance(layer, MemorySegmentCacheLayer)
    ids = torch.randint(50, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 3:6] = 0  # row 1 is three tokens behind
    size = None
    for t in range(16):
        before = layer.states.get("segment.frozen_0")
        before = None if before is None else before.clone()
        logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        read = mask[:, : t + 1].sum(1)
        states = layer.states
        assert torch.equal(states["segment.position"], read % 8)
        filled = states["segment.keys"].abs().amax((1, 3)) > 0
        assert torch.equal(filled.sum(1), read % 8)
        recalled = states["segment.context_values"].abs().amax((1, 3)) > 0
        assert torch.equal(recalled.sum(1), read % 8 // 2)
        for row in range(2):
            ended = read[row] % 8 == 0 and mask[row, t]
            if ended:
                assert torch.equal(states["segment.frozen_0"][row], states["memory.offset_0"][row])
            elif before is not None:
                assert torch.equal(states["segment.frozen_0"][row], before[row])
        size = size or cache.nbytes
        assert cache.nbytes == size, "the state has its full size from the first token on"


def test_state_of_a_layer_has_the_documented_size():
    """README.md: 2 (C + N) H d keys and values, and two copies of the memory beside its own state."""
    settings = config(**SEGMENTS, num_hidden_layers=1)
    model = TitansForCausalLM(settings).eval()
    lmm = TitansForCausalLM(config(num_hidden_layers=1, num_persistent_tokens=0)).eval()
    sizes = {}
    for name, one in (("mac", model), ("lmm", lmm)):
        with torch.no_grad():
            sizes[name] = one(torch.randint(50, (1, 1)), use_cache=True).past_key_values.nbytes
    heads, width = 4, 16
    keys_and_values = 2 * (8 + 4 + 4) * heads * width * 4
    frozen = 2 * heads * width * 4 * width * 4
    waiting, tail, position = heads * width * 4, 3 * heads * width * 4, 8
    assert sizes["mac"] - sizes["lmm"] == keys_and_values + frozen + waiting + tail + position


@pytest.mark.parametrize("masked", [False, True])
def test_pieces_of_a_call_hold_every_valid_token_once(masked):
    position = torch.tensor([0, 3, 7, 7])
    mask = torch.rand(4, 21) < 0.6
    mask[3] = False
    grid = SegmentGrid(4, 21, 8, position, mask if masked else None)
    mask = mask if masked else torch.ones_like(mask)
    tokens = torch.arange(1.0, 22.0).repeat(4, 1)[..., None]
    taken = [grid.take(tokens, piece) for piece in grid.pieces]
    assert torch.equal(grid.join(taken), tokens * mask[..., None])
    for row in range(4):
        place, seen = int(position[row]), []
        for piece, tokens_of_piece in zip(grid.pieces, taken):
            valid = tokens_of_piece[row, :, 0]
            valid = valid if piece.valid is None else valid[piece.valid[row]]
            assert len(valid) == 0 or place + len(valid) <= piece.stop <= 8
            place = (place + len(valid)) % 8
            seen += valid.tolist()
        assert seen == tokens[row, mask[row], 0].tolist()


def test_positions_say_nothing_about_the_length_of_the_text():
    """Far behind `max_position_embeddings` the rotations are those of the first segment."""
    model = randomized(**SEGMENTS, num_hidden_layers=1, memory_depth=1, theta_max=0, memory_decay=False, conv_kernel=0)
    segment = torch.randint(50, (1, 8))
    out = logits(model, segment.repeat(1, 5))
    torch.testing.assert_close(out[:, 32:], out[:, :8], atol=1e-12, rtol=1e-10)


def test_layers_of_mal_take_turns():
    model = randomized(variant="mal", num_hidden_layers=3, layer_types=None)
    assert model.config.layer_types == ["linear_attention", "sliding_attention", "linear_attention"]
    with torch.no_grad():
        cache = model(torch.randint(50, (1, 30)), use_cache=True).past_key_values
    assert isinstance(cache.layers[1], MemorySlidingCacheLayer) and not cache.layers[1].states
    assert cache.layers[1].keys.shape == (1, 4, 7, 16) and cache.layers[1].prefix[0].shape == (1, 4, 4, 16)
    assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3


def test_mal_takes_any_pattern_of_its_two_layers():
    pattern = ["sliding_attention", "linear_attention", "linear_attention", "sliding_attention"]
    model = randomized(variant="mal", num_hidden_layers=4, layer_types=pattern)
    ids = torch.randint(50, (2, 21))
    with torch.no_grad():
        head = model(ids[:, :10], use_cache=True)
        tail = model(ids[:, 10:], past_key_values=head.past_key_values)
    got = torch.cat((head.logits, tail.logits), 1)
    torch.testing.assert_close(got, logits(model, ids), atol=1e-10, rtol=1e-8)


def test_attention_of_mal_sees_its_window_and_the_memory_the_rest():
    model = randomized(variant="mal", num_persistent_tokens=0, conv_kernel=0)
    ids = torch.randint(50, (1, 24))
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 50
    assert (logits(model, ids) - logits(model, other))[:, -1].abs().max() > 1e-6
    blind = copy.deepcopy(model)
    with torch.no_grad():
        blind.model.layers[0].mixer.o_proj.weight.zero_()
    change = (logits(blind, ids) - logits(blind, other)).abs().amax((0, 2))
    assert (change[:8] > 1e-9).all() and (change[8:] == 0).all()


@pytest.mark.parametrize("variant", ["mag", "mac", "mal"])
def test_hybrids_refuse_memories_that_bring_attention(variant):
    with pytest.raises(ValueError, match="memories that stand alone.*leave `variant`"):
        MemoryHybridConfig(num_hidden_layers=2, memory_layers=[0], memory={"variant": variant})


def test_rounding_does_not_grow_over_segments():
    """What a memory recalls changes what it reads next: over 16 segments this must not amplify rounding."""
    fields = SEGMENTS | {"segment_size": 64, "num_memory_tokens": 32, "chunk_size": 16, "initializer_range": 0.1}
    model = randomized(num_hidden_layers=1, num_attention_heads=1, **fields)
    with torch.no_grad():
        model.model.layers[0].mixer.memory.gates.decay_proj.bias.add_(2)  # a memory that forgets 5 % per token
    ids = torch.randint(50, (1, 1024))
    exact, rounded = logits(model, ids), logits(copy.deepcopy(model).float(), ids)
    error = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error[0, -50:].mean() < 1e-5


@pytest.mark.parametrize("decay_target", ("init", "zero"))
def test_a_checkpoint_loaded_in_float64(decay_target, tmp_path):
    # Its initial memory stays in float32, as in every model.
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "chunk_size": 4}
    config = TitansConfig(**sizes, **SEGMENTS, num_attention_heads=2, decay_target=decay_target)
    TitansForCausalLM(config).save_pretrained(tmp_path)
    model = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    model.set_attn_implementation("eager")
    assert model.model.layers[0].mixer.memory.initial_memory.weights[0].dtype == torch.float32
    ids = torch.arange(11)[None]
    with torch.no_grad():
        logits = model(ids).logits
        expected = TitansForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected.double(), rtol=1e-4, atol=1e-5)
