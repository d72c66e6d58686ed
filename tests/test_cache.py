"""The memory cache, layer by layer and under a model."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_memory import TitansConfig, TitansForCausalLM
from hf_memory.cache import MemoryCache, StaticMemoryCache
from hf_memory.cache_layers import (
    MemoryCacheLayer,
    MemorySlidingCacheLayer,
    StaticMemorySlidingCacheLayer,
    window_positions,
)


def tiny(**fields) -> TitansForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "chunk_size": 4, "num_persistent_tokens": 4, "sliding_window": 8}
    sizes |= {"segment_size": 8, "num_memory_tokens": 4}
    return TitansForCausalLM(TitansConfig(**sizes, eos_token_id=None, **fields)).eval()


@pytest.fixture(params=["lmm", "mag", "mac", "mal"])
def model(request) -> TitansForCausalLM:
    return tiny(variant=request.param)


def make_cache(model: TitansForCausalLM, kind: str) -> MemoryCache | StaticMemoryCache:
    return MemoryCache(model.config) if kind == "dynamic" else StaticMemoryCache(model.config, max_cache_len=64)


def read(model: TitansForCausalLM, ids: torch.Tensor, cache=None, **kwargs) -> tuple[torch.Tensor, object]:
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True, **kwargs)
    return out.logits, out.past_key_values


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_row_operations_equal_reading_the_rows(model, kind):
    ids, more = torch.randint(50, (3, 13)), torch.randint(50, (4, 5))
    operations = {
        "reorder_cache": (torch.tensor([2, 2, 0]), [2, 2, 0]),
        "batch_select_indices": (torch.tensor([1, 0]), [1, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for name, (argument, rows) in operations.items():
        _, cache = read(model, ids, make_cache(model, kind))
        getattr(cache, name)(argument)
        tokens = more[torch.arange(len(rows)) % 4]
        got, _ = read(model, tokens, cache)
        expected, _ = read(model, torch.cat((ids[rows], tokens), 1))
        torch.testing.assert_close(got, expected[:, 13:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_returns_to_the_learned_start(model, kind):
    ids = torch.randint(50, (2, 11))
    first, cache = read(model, ids, make_cache(model, kind))
    cache.reset()
    assert int(cache.seen_tokens) == 0 and cache.layers[0].get_states() is None
    again, cache = read(model, ids, cache)
    assert torch.equal(first, again) and int(cache.seen_tokens) == 11
    cache.reset()
    wider, _ = read(model, ids.repeat(2, 1), cache)
    torch.testing.assert_close(wider, first.repeat(2, 1, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda cache: cache.clone()], ids=["deepcopy", "clone"])
def test_fork(model, kind, copy_of):
    ids, a, b = torch.randint(50, (1, 9)), torch.randint(50, (1, 6)), torch.randint(50, (1, 6))
    _, cache = read(model, ids, make_cache(model, kind))
    fork = copy_of(cache)
    read(model, a, cache)
    got, _ = read(model, b, fork)
    expected, _ = read(model, torch.cat((ids, b), 1))
    torch.testing.assert_close(got, expected[:, 9:], atol=1e-5, rtol=1e-4)


def test_bytes_do_not_grow(model):
    ids = torch.randint(50, (2, 64))
    _, cache = read(model, ids[:, :16])
    size = cache.nbytes
    assert size == sum(layer.nbytes for layer in cache.layers) > 0
    read(model, ids, cache)
    assert cache.nbytes == size and cache.seen_tokens == 80


def test_static_cache_keeps_its_addresses(model):
    _, cache = read(model, torch.randint(50, (2, 6)), make_cache(model, "static"))
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    for _ in range(9):
        read(model, torch.randint(50, (2, 1)), cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    read(model, torch.randint(50, (2, 5)), cache)
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    assert isinstance(cache.seen_tokens, torch.Tensor) and cache.is_compileable


def test_dynamic_cache_is_never_compiled_by_generate(model):
    assert not MemoryCache(model.config).is_compileable


def test_rollback_is_refused(model):
    _, cache = read(model, torch.randint(50, (1, 6)))
    cache.crop(0)
    for refused in (lambda: cache.crop(-1), cache.activate_past_recording):
        with pytest.raises(ValueError, match=r"cannot take back tokens.*clone"):
            refused()
    assert not cache.is_croppable


def test_offloaded_layer_comes_back_by_itself(model):
    ids = torch.randint(50, (1, 12))
    _, cache = read(model, ids[:, :7])
    for layer in cache.layers:
        layer.offload()
        assert layer.is_offloaded
    got, _ = read(model, ids[:, 7:], cache)
    torch.testing.assert_close(got, read(model, ids)[0][:, 7:], atol=1e-5, rtol=1e-4)


def test_gradients_pass_through_a_cached_state():
    model = tiny()
    ids = torch.randint(50, (1, 20))
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    first = model(inputs_embeds=embeds[:, :10], use_cache=True)
    second = model(inputs_embeds=embeds[:, 10:], past_key_values=first.past_key_values)
    (pieces,) = torch.autograd.grad(second.logits.square().sum(), embeds)
    (whole,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, 10:].square().sum(), embeds)
    assert pieces[:, :10].norm() > 0
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-3)
    assert all(not t.requires_grad for t in first.past_key_values.clone().layers[0].tensors())


def test_unfit_caches_get_a_sentence(model):
    ids = torch.randint(50, (1, 4))
    with pytest.raises(ValueError, match=r"pass a `MemoryCache\(config\)`"):
        model(ids, past_key_values=DynamicCache())
    windowed = tiny(variant="mag")
    for stock in (DynamicCache(config=windowed.config), StaticCache(config=windowed.config, max_cache_len=16)):
        with pytest.raises(ValueError, match=r"pass a `MemoryCache\(config\)`"):
            windowed(ids, past_key_values=stock)


@pytest.mark.parametrize("variant", ["mag", "mac", "mal"])
def test_cache_of_another_variant_gets_a_sentence(variant):
    ids = torch.randint(50, (1, 4))
    _, cache = read(tiny(variant="lmm"), ids)
    with pytest.raises(ValueError, match="needs a Memory.*has a MemoryCacheLayer there: a cache continues only"):
        tiny(variant=variant)(ids, past_key_values=cache)


def test_cache_of_another_batch_size_gets_a_sentence(model):
    _, cache = read(model, torch.randint(50, (2, 4)))
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        model(torch.randint(50, (3, 1)), past_key_values=cache)


def test_memory_layer_has_no_keys():
    layer = MemoryCacheLayer()
    for call in (layer.update, layer.update_conv_state, layer.update_recurrent_state):
        with pytest.raises(NotImplementedError, match="update_states"):
            call(torch.zeros(1))


@pytest.mark.parametrize("make", [MemorySlidingCacheLayer, lambda **kw: StaticMemorySlidingCacheLayer(99, **kw)])
def test_window_holds_the_last_valid_tokens(make):
    layer = make(sliding_window=4)
    columns = torch.arange(1.0, 13.0).view(1, 1, 12, 1).expand(2, 1, 12, 1)
    valid = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]]).bool()
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        mask = valid[:, start:stop]
        queries, keys = window_positions(layer, stop - start, mask, mask.device)
        full, _ = layer.update(columns[:, :, start:stop], columns[:, :, start:stop], padding_mask=mask)
        assert keys.shape == (2, full.shape[2])
        assert torch.equal(queries[mask], (valid.cumsum(1)[:, start:stop] - 1)[mask])
    kept = layer.keys[:, 0, :, 0]
    assert kept[0].tolist() == [6, 7, 9] and layer.key_positions[0].tolist() == [3, 4, 5]
    seen = layer.key_positions[1] >= 0
    assert kept[1][seen].tolist() == [10, 12] and layer.key_positions[1][seen].tolist() == [0, 1]
