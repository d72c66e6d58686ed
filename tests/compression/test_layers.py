"""Cache layers by themselves: what they return, what they keep, and what happens to rows."""

import copy

import pytest
import torch

from hf_memory.compression.polar_quant import decode, encode, rotation
from hf_memory.compression.polar_quant_layer import PolarQuantLayer
from hf_memory.compression.subgen_layer import KCentreLayer, SamplerLayer


CUTS = {"one call": [], "one by one": list(range(1, 60)), "pieces": [1, 17, 18, 40, 59], "behind the window": [8, 9]}


def states(length: int, rows: int = 2, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, width), torch.randn(rows, 2, length, width)


def fill(layer, keys, values, cuts=()):
    for part in zip(keys.tensor_split(cuts, 2), values.tensor_split(cuts, 2)):
        returned = layer.update(*part)
        read_samples(returned)
    return layer, returned


def read_samples(returned) -> None:
    """As the attention of a sampler does."""
    if hasattr(returned[0], "subgen"):
        returned[0].subgen.read()


def polar(window: int = 8) -> PolarQuantLayer:
    return PolarQuantLayer(window)


def kcentre(rows: int = 2, budget: int = 24) -> KCentreLayer:
    layer = KCentreLayer(budget, window=6, sinks=2)
    layer.prompt_padding = torch.zeros(rows, dtype=torch.long)
    return layer


def sampler(rows: int = 2, seed: int = 0, radius: float = 5.0) -> SamplerLayer:
    layer = SamplerLayer(window=6, sinks=2, clusters=4, samples=2, slots=5, radius=radius, seed=seed)
    layer.prompt_padding = torch.zeros(rows, dtype=torch.long)
    return layer


def equal(layer, other) -> bool:
    pairs = list(zip(layer.tensors(), other.tensors(), strict=True))
    return layer.seen_tokens == other.seen_tokens and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("window", [0, 8, 100])
def test_polar_quant_codes_do_not_depend_on_the_calls(cuts, window):
    keys, values = states(60)
    layer, _ = fill(polar(window), keys, values, cuts)
    coded = max(60 - window, 0)
    for x, codes, radii in ((keys, layer.key_codes, layer.key_radii), (values, layer.value_codes, layer.value_radii)):
        expected = encode(x[:, :, :coded], rotation(32))
        assert torch.equal(codes, expected[0]) and torch.equal(radii, expected[1])
    assert torch.equal(layer.keys, keys[:, :, coded:]) and torch.equal(layer.values, values[:, :, coded:])
    assert layer.get_seq_length() == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_quant_returns_decoded_tokens_and_the_window_as_it_is(dtype):
    keys, values = (x.to(dtype) for x in states(60))
    layer, returned = fill(polar(), keys, values, [40, 41])
    # 41 tokens were there, the last 8 of them in the window.
    for x, got in zip((keys, values), returned):
        assert got.dtype == dtype and got.shape == x.shape
        assert torch.equal(got[:, :, 33:], x[:, :, 33:])
        turned = rotation(32)
        assert torch.equal(got[:, :, :33], decode(*encode(x[:, :, :33], turned), turned).to(dtype))
    layer, returned = fill(polar(), keys, values)
    assert all(torch.equal(got, x) for got, x in zip(returned, (keys, values)))


def test_polar_quant_takes_four_bits_per_coordinate():
    keys, values = states(60)
    layer, _ = fill(polar(window=10), keys, values)
    coordinates = 2 * 2 * 50 * 32 * 2
    assert layer.nbytes == coordinates // 2 + (keys[:, :, 50:].numel() + values[:, :, 50:].numel()) * 4
    assert sum(x.untyped_storage().nbytes() for x in layer.tensors()) == layer.nbytes


@pytest.mark.parametrize("removed", [0, 3, 8, 20, 60])
def test_polar_quant_crop(removed):
    keys, values = states(70)
    layer, _ = fill(polar(), keys[:, :, :60], values[:, :, :60])
    layer.crop(-removed)
    shorter, _ = fill(polar(), keys[:, :, : 60 - removed], values[:, :, : 60 - removed])
    assert layer.get_seq_length() == 60 - removed
    assert layer.get_mask_sizes(1) == (61 - removed, 0)
    common = shorter.key_codes.shape[2]
    assert torch.equal(layer.key_codes[:, :, :common], shorter.key_codes)
    # Codes that were made stay; the window has the rest, and the next tokens fill it.
    coded = min(52, 60 - removed)
    assert layer.key_codes.shape[2] == coded
    assert torch.equal(layer.keys, keys[:, :, coded : 60 - removed])
    back = slice(60 - removed, 70)
    layer, _ = fill(layer, keys[:, :, back], values[:, :, back])
    assert equal(layer, fill(polar(), keys, values)[0])
    with pytest.raises(ValueError, match="negative number, got 3"):
        layer.crop(3)


def test_polar_quant_refuses_other_widths():
    with pytest.raises(ValueError, match="keys of this model are 40 wide"):
        polar().update(*states(3, width=40))


@pytest.mark.parametrize("make", [polar, kcentre, sampler])
def test_rows_are_moved_as_if_they_had_been_read_there(make):
    keys, values = states(50, rows=3)
    rows = {
        "reorder_cache": (torch.tensor([2, 2, 0]), [2, 2, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for method, (argument, origin) in rows.items():
        layer, _ = fill(make(*([3] if make is not polar else [])), keys, values)
        before = copy.deepcopy(layer)
        getattr(layer, method)(argument)
        for moved, old in zip(layer.tensors(), before.tensors(), strict=True):
            assert torch.equal(moved, old[origin])
        assert layer.get_seq_length() == 50
        new = states(1, rows=len(origin))
        returned, _ = layer.update(*new)
        assert returned.shape[0] == len(origin) and torch.equal(returned[:, :, -1:], new[0])


@pytest.mark.parametrize("make", [polar, kcentre, sampler])
def test_reset_and_offload(make):
    keys, values = states(50)
    layer, _ = fill(make(), keys, values)
    layer.offload()
    layer.prefetch()
    again = copy.deepcopy(layer)
    assert equal(layer, fill(make(), keys, values)[0])
    layer.reset()
    assert layer.get_seq_length() == 0 and not list(layer.tensors()) and layer.nbytes == 0
    fill(layer, keys, values)
    assert equal(layer, again)


@pytest.mark.parametrize("make", [polar, kcentre, sampler])
def test_states_of_inference_mode_go_on_with_gradients(make):
    keys, values = states(50)
    with torch.inference_mode():
        layer, _ = fill(make(), keys, values, [20])
    returned, _ = layer.update(*(x.requires_grad_() for x in states(1)))
    returned.sum().backward()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("budget", [10, 24, 41])
def test_kcentre_keeps_sinks_window_and_no_more_than_the_budget(cuts, budget):
    keys, values = states(60)
    layer, seen = kcentre(budget=budget), 0
    for part in zip(keys.tensor_split(cuts, 2), values.tensor_split(cuts, 2)):
        offered = torch.cat((layer.keys, part[0]), 2) if layer.is_initialized else part[0]
        slots, offset = layer.get_mask_sizes(part[0].shape[2])
        returned, _ = layer.update(*part)
        assert torch.equal(returned, offered)
        seen += part[0].shape[2]
        assert (slots, offset) == (returned.shape[2], seen - returned.shape[2])
        assert layer.keys.shape[2] <= budget and layer.values.shape[2] <= budget
        assert layer.get_seq_length() == seen
        assert torch.equal(layer.keys[:, :, :2], keys[:, :, :2][:, :, :seen])
        recent = slice(max(seen - 6, 0), seen)
        assert torch.equal(layer.keys[:, :, -6:], keys[:, :, recent])
        assert torch.equal(layer.values[:, :, -6:], values[:, :, recent])
    if budget < 60:
        assert layer.keys.shape[2] >= budget - (budget - 8) // 16


def test_kcentre_keeps_pairs_and_their_order():
    """Every kept key has its own value beside it, once, in the order of the text, whichever head."""
    keys, _ = states(60)
    numbers = torch.arange(60.0)[:, None].expand(2, 2, 60, 32)
    layer = kcentre()
    for part in zip(keys.tensor_split(60, 2), numbers.tensor_split(60, 2)):
        layer.update(*part)
        kept = layer.values[..., 0].long()
        assert (kept.diff(dim=2) > 0).all()
        assert torch.equal(keys.gather(2, kept[..., None].expand(-1, -1, -1, 32)), layer.keys)
    assert not torch.equal(kept[0, 0], kept[0, 1])


@pytest.mark.parametrize("make", [kcentre, sampler])
@pytest.mark.parametrize("first", [3, 12, 34, 40])
def test_padded_tokens_are_never_kept(make, first):
    """Values number the tokens, padded ones -1, in rows with nothing to drop, something, and nothing valid yet."""
    padding = torch.tensor([0, 5, 30])
    keys, _ = states(60, rows=3)
    numbers = torch.arange(60.0).expand(3, 60)
    numbers = torch.where(numbers < padding[:, None], -1.0, numbers)
    values = numbers[:, None, :, None].expand(3, 2, 60, 32)
    layer = make(3)
    for cuts in ([first], [first, 45, 46, 47]):
        layer.reset()
        layer.prompt_padding = padding
        fill(layer, keys, values, cuts)
        slots = layer.values.shape[2]
        # The mask that transformers makes shows these columns of the 2-D mask.
        shown = torch.arange(60 - slots, 60) >= padding[:, None]
        for row, count in enumerate(padding.tolist()):
            for kept in layer.values[row, :, :, 0]:
                valid = kept[shown[row]].long()
                assert (kept[~shown[row]] == -1).all() and (valid.diff() > 0).all()
                assert valid[:2].tolist() == [count, count + 1] and valid[-6:].tolist() == list(range(54, 60))
        if make is sampler:
            assert layer.counts.sum(2).tolist() == [[60 - int(p) - 8] * 2 for p in padding]
            assert (layer.slot_values >= 0).all()


def test_a_padded_row_keeps_what_the_same_row_keeps_alone():
    keys, values = states(60, rows=2)
    layer = kcentre()
    layer.prompt_padding = torch.tensor([0, 11])
    fill(layer, keys, values)
    alone, _ = fill(kcentre(rows=1), keys[1:, :, 11:], values[1:, :, 11:])
    assert torch.equal(layer.keys[1:], alone.keys)


def test_sampler_state_has_a_fixed_size_and_repeats_its_seed():
    keys, values = states(200)
    layer, _ = fill(sampler(), keys[:, :, :20], values[:, :, :20])
    size = layer.nbytes
    fill(layer, keys[:, :, 20:], values[:, :, 20:], [100, 101, 102])
    assert layer.nbytes == size and layer.keys.shape[2] == 8
    again, _ = fill(sampler(), keys[:, :, :20], values[:, :, :20])
    assert equal(fill(again, keys[:, :, 20:], values[:, :, 20:], [100, 101, 102])[0], layer)
    other, _ = fill(sampler(seed=1), keys, values)
    assert not torch.equal(other.slot_keys, layer.slot_keys)
    assert torch.equal(other.counts.sum(2), layer.counts.sum(2))


@pytest.mark.parametrize("make", [kcentre, sampler])
def test_what_was_dropped_does_not_come_back(make):
    layer, _ = fill(make(), *states(30))
    layer.crop(0)
    for call in (lambda: layer.crop(-1), layer.activate_past_recording):
        with pytest.raises(ValueError, match="cannot take back tokens"):
            call()


def test_rows_of_unknown_padding_are_refused():
    layer = kcentre()
    layer.prompt_padding = None
    with pytest.raises(ValueError, match="which tokens of these 2 rows are padding"):
        layer.update(*states(5))
    layer.prompt_padding = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="has 2 rows, the input has 3"):
        layer.update(*states(5, rows=3))
