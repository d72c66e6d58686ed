"""SubGen: choice of centres against brute force, the sampler against the algorithm one token at a time."""

import pytest
import torch

from hf_memory.compression import subgen
from hf_memory.compression.subgen import SamplerState, assign, select_centres, weighted_attention


def greedy_centres(keys: torch.Tensor, allowed: list[int], covered: list[int], count: int) -> list[int]:
    """Greedy k-centre, in words: the allowed key whose nearest chosen or covered key is farthest."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [i for i in allowed if i not in chosen]
        taken = [keys[j] for j in (*covered, *chosen)]
        distances = [min((float((keys[i] - x).norm()) for x in taken), default=float("inf")) for i in rest]
        chosen.append(rest[max(range(len(rest)), key=lambda i: distances[i])])
    return chosen


def mask(length: int, *rows: list[int]) -> torch.Tensor:
    return torch.tensor([[i in row for i in range(length)] for row in rows])


@pytest.mark.parametrize("at_once", [0, 2**26], ids=["one by one", "all distances"])
def test_centres_are_the_greedy_choice(at_once, monkeypatch):
    monkeypatch.setattr(subgen, "_DISTANCES_AT_ONCE", at_once)
    keys = torch.randn(3, 40, 8)
    allowed = [list(range(5, 35)), list(range(10, 40)), list(range(40))]
    covered = [[0, 1], [3], []]
    chosen = select_centres(keys, mask(40, *allowed), mask(40, *covered), 15)
    for row in range(3):
        assert chosen[row].tolist() == greedy_centres(keys[row], allowed[row], covered[row], 15)


def test_centres_are_farther_apart_than_the_covering_radius():
    keys = torch.randn(2, 200, 16)
    everything, nothing = torch.ones(2, 200, dtype=torch.bool), torch.zeros(2, 200, dtype=torch.bool)
    chosen = select_centres(keys, everything, nothing, 20)
    for row in range(2):
        centres = keys[row, chosen[row]]
        covering_radius = torch.cdist(keys[row], centres).amin(1).max()
        apart = torch.pdist(centres).min()
        assert apart >= covering_radius * (1 - 1e-4)


def test_equal_keys_are_chosen_once_each():
    chosen = select_centres(torch.ones(1, 9, 4), mask(9, range(2, 9)), mask(9, []), 7)
    assert sorted(chosen[0].tolist()) == list(range(2, 9))


def test_one_cluster_per_clump():
    clumps = 10 * torch.eye(4)[torch.arange(60) % 4] + 0.01 * torch.randn(60, 4)
    chosen = select_centres(clumps[None], mask(60, range(60)), mask(60, []), 4)
    assert sorted((chosen[0] % 4).tolist()) == [0, 1, 2, 3]


def assign_one_by_one(keys, valid, centres, used, radius):
    """The paper's loop: join the nearest centre within the radius, else open a cluster while there is room."""
    centres, clusters = list(centres[:used]), []
    for key, is_valid in zip(keys, valid):
        if not is_valid:
            clusters.append(None)
            continue
        distances = [float((key - c).norm()) for c in centres]
        nearest = min(range(len(centres)), key=lambda i: distances[i], default=None)
        if nearest is None or (distances[nearest] > radius and len(centres) < MOST):
            centres.append(key)
            nearest = len(centres) - 1
        clusters.append(nearest)
    return clusters, centres


MOST = 6


@pytest.mark.parametrize("radius", [0.5, 2.0, 3.0, 100.0])
def test_clusters_are_those_of_one_token_at_a_time(radius):
    keys, valid = torch.randn(3, 50, 4), torch.rand(3, 50) > 0.2
    begun = torch.randn(3, MOST, 4)
    used = [0, 2, MOST]
    is_open = torch.tensor([[i < n for i in range(MOST)] for n in used])
    clusters, centres = assign(keys, valid, begun, is_open, radius)
    for row in range(3):
        expected, opened = assign_one_by_one(keys[row], valid[row], begun[row], used[row], radius)
        assert [int(c) for c, e in zip(clusters[row], expected) if e is not None] == [
            e for e in expected if e is not None
        ]
        assert torch.equal(centres[row, : len(opened)], torch.stack(opened))


def stream(tokens: int, rows: int = 1, width: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, tokens, width), torch.randn(rows, tokens, 3), torch.ones(rows, tokens, dtype=torch.bool)


def absorbed(keys, values, valid, seed=0, sizes=(8, 3, 16), radius=1.5, cuts=()) -> SamplerState:
    state, generator = SamplerState.empty(keys, values, *sizes), torch.Generator().manual_seed(seed)
    for part in zip(*(x.tensor_split(cuts, dim=1) for x in (keys, values, valid))):
        state = state.absorb(*part, radius, generator)
    return state


def test_counts_and_mass_are_exact_and_samples_are_members():
    keys, values, valid = stream(70, rows=2)
    valid[1, :20] = False
    state = absorbed(keys, values, valid)
    assert state.counts.sum(1).tolist() == [70, 50]
    assert torch.allclose(state.mass, (values.double().square().sum(-1) * valid).sum(1))
    clusters, _ = assign(keys, valid, torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool), 1.5)
    for row in range(2):
        for cluster in range(8):
            members = keys[row][(clusters[row] == cluster) & valid[row]]
            assert int(state.counts[row, cluster]) == len(members)
            for sample in state.samples[row, cluster] if len(members) else ():
                assert (members == sample).all(1).any()
        for key, value in zip(state.slot_keys[row], state.slot_values[row]):
            found = ((keys[row] == key).all(1) & (values[row] == value).all(1) & valid[row]).nonzero()
            assert len(found) == 1


def test_same_seed_same_state_and_pieces_do_not_change_counts(monkeypatch):
    keys, values, valid = stream(60)
    first, again, other = (absorbed(keys, values, valid, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    assert not torch.equal(first.slot_keys, other.slot_keys)
    in_pieces = absorbed(keys, values, valid, cuts=(1, 30, 31))
    monkeypatch.setattr(subgen, "_TOKENS_AT_ONCE", 7)
    for state in (in_pieces, absorbed(keys, values, valid)):
        assert torch.equal(state.counts, first.counts)
        assert torch.equal(state.centres, first.centres)
        assert torch.allclose(state.mass, first.mass)


def test_samples_are_drawn_with_the_probabilities_of_the_paper():
    """Uniform over a cluster, in proportion to |v|^2 over the stream, in whatever pieces it comes."""
    tokens, streams = 8, 4000
    keys = torch.arange(tokens).float()[:, None].expand(streams, tokens, 1)
    values = torch.tensor([1.0, 2, 1, 3, 1, 0, 1, 2])[:, None].expand(streams, tokens, 1)
    state = absorbed(
        keys, values, torch.ones(streams, tokens, dtype=torch.bool), sizes=(1, 2, 3), radius=9, cuts=(3, 4)
    )
    squares = values[0, :, 0].square()
    for drawn, expected in (
        (state.samples, torch.full((tokens,), 1 / tokens)),
        (state.slot_keys, squares / squares.sum()),
    ):
        total = drawn.numel()
        shares = drawn.flatten().long().bincount(minlength=tokens) / total
        error = (expected * (1 - expected) / total).sqrt()
        assert ((shares - expected).abs() <= 4 * error).all()


def test_estimates_have_no_bias():
    """Over 2,000 streams the means of numerator and denominator are within 4 standard errors of the sums."""
    keys, values, _ = stream(40)
    copies = [x.expand(2000, -1, -1) for x in (keys, values)]
    state = absorbed(*copies, torch.ones(2000, 40, dtype=torch.bool), sizes=(4, 2, 6), cuts=(1, 25))
    query = torch.randn(4)
    of_clusters, of_slots = state.log_weights()
    tau = ((state.samples @ query) + of_clusters[..., None]).exp().sum((1, 2))
    z = ((state.slot_keys @ query) + of_slots).exp()[..., None].mul(state.slot_values).sum(1)
    exact = (keys[0] @ query).exp()
    for estimates, expected in ((tau[:, None], exact.sum()[None]), (z, exact @ values[0])):
        error = estimates.std(0) / len(estimates) ** 0.5
        assert ((estimates.mean(0) - expected).abs() < 4 * error).all()
        assert (error < 0.1 * exact.sum()).all()


def test_equal_keys_make_one_cluster_and_an_exact_denominator():
    _, values, valid = stream(50)
    keys = torch.ones(1, 50, 4)
    state = absorbed(keys, values, valid)
    assert state.counts[0].tolist() == [50] + [0] * 7
    query = torch.randn(4)
    tau = ((state.samples @ query) + state.log_weights()[0][..., None]).exp().sum()
    assert float(tau) == pytest.approx(50 * float((keys[0, 0] @ query).exp()), rel=1e-5)


def test_weighted_attention_is_the_quotient_of_the_estimates():
    keys, values, valid = stream(30, rows=2)
    state = absorbed(keys, values, valid)
    query, at_hand, at_hand_values = torch.randn(2, 5, 4), torch.randn(2, 7, 4), torch.randn(2, 7, 3)
    bias = torch.zeros(1, 5, 7).masked_fill(torch.rand(1, 5, 7) < 0.3, -torch.inf)
    result = weighted_attention(query, (at_hand, at_hand_values, bias), state, 0.5)
    of_clusters, of_slots = state.log_weights()
    for row in range(2):
        for i in range(5):
            q = 0.5 * query[row, i].double()
            exact = ((at_hand[row].double() @ q) + bias[0, i]).exp()
            slots = (state.slot_keys[row].double() @ q + of_slots[row]).exp()
            clusters = (state.samples[row].double() @ q + of_clusters[row, :, None]).exp()
            z = exact @ at_hand_values[row].double() + slots @ state.slot_values[row].double()
            assert torch.allclose(result[row, i].double(), z / (exact.sum() + clusters.sum()), rtol=1e-4, atol=1e-5)


def test_values_of_nothing_are_never_sampled():
    keys, values, valid = stream(20)
    values[:, 5:] = 0
    state = absorbed(keys, values, valid)
    assert all((keys[0, :5] == key).all(1).any() for key in state.slot_keys[0])
    nothing = absorbed(keys, torch.zeros_like(values), valid)
    assert nothing.log_weights()[1].eq(-torch.inf).all()
