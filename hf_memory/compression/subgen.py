"""SubGen (arXiv 2402.06082): few keys stand for many, if keys come in clusters.

Two ways to choose them. `select_centres` takes keys that are far from each other, as the paper's experiments do.
`SamplerState` is the paper's streaming algorithm: samples per cluster estimate the denominator of attention, values
sampled by their norm its numerator. Rows and heads are flattened to N = B H here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


# Tokens absorbed at a time: random numbers are `[N, tokens, slots]`.
_TOKENS_AT_ONCE = 512
# 256 MiB of float32.
_DISTANCES_AT_ONCE = 2**26


def select_centres(keys: Tensor, allowed: Tensor, covered: Tensor, count: int) -> Tensor:
    """Greedy k-centre: the allowed key farthest from all that are chosen or covered, `count` times.

    Args:
        keys: `[N, L, P]`.
        allowed: `[N, L]` bool, which keys may be chosen; at least `count` of each row.
        covered: `[N, L]` bool, which keys count as chosen already. Where there is none, the first centre is the first
            key that is allowed.
        count: number m of centres.

    Returns:
        Indices `[N, m]` in the order of choice. Any two centres are at least as far apart as the key farthest from
        its nearest centre is from that.
    """
    keys = keys.float()
    rows, length, _ = keys.shape
    order = torch.arange(rows, device=keys.device)
    squares = keys.square().sum(-1)
    # All distances at once where they fit and many are asked for, as in streaming; a long prompt asks for few.
    table = None
    if 4 * count > length and rows * length**2 <= _DISTANCES_AT_ONCE:
        table = _squared_distances(keys, squares, keys, squares).flatten(0, 1)

    def distance_to(index: Tensor) -> Tensor:
        if table is not None:
            return table.index_select(0, order * length + index)
        return _squared_distances(keys, squares, keys[order, index, None], squares[order, index, None]).squeeze(2)

    distance = torch.full_like(squares, torch.inf)
    for index in covered.any(0).nonzero().flatten():
        nearer = torch.minimum(distance, distance_to(index.expand(rows)))
        distance = torch.where(covered[:, index, None], nearer, distance)
    # Below any distance, and so are centres once they are chosen: of equal keys each is chosen once.
    distance = distance.masked_fill(~allowed, -torch.inf)
    chosen = []
    for _ in range(count):
        farthest = distance.argmax(1)
        chosen.append(farthest)
        distance = torch.minimum(distance, distance_to(farthest)).scatter_(1, farthest[:, None], -torch.inf)
    return torch.stack(chosen, dim=1) if chosen else order.new_empty(rows, 0)


def _squared_distances(keys: Tensor, squares: Tensor, others: Tensor, other_squares: Tensor) -> Tensor:
    """`[N, L, M]` between keys `[N, L, P]` and others `[N, M, P]`, whose squared norms are given."""
    products = keys @ others.transpose(1, 2)
    return (squares[:, :, None] - 2 * products + other_squares[:, None]).clamp_(min=0)


@dataclass(frozen=True)
class SamplerState:
    """What the streaming algorithm keeps of N streams of keys and values.

    Attributes:
        centres: `[N, m, P]` float32, the first key of each cluster.
        samples: `[N, m, t, P]` float32, t keys drawn with replacement from each cluster.
        counts: `[N, m]` int64, tokens of each cluster; clusters of no token come last.
        slot_keys: `[N, s, P]` float32, keys of s tokens drawn with replacement in proportion to |v|^2.
        slot_values: `[N, s, V]` float32, their values.
        mass: `[N]` float64, the sum of |v|^2 over all tokens.
    """

    centres: Tensor
    samples: Tensor
    counts: Tensor
    slot_keys: Tensor
    slot_values: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, clusters: int, samples: int, slots: int) -> "SamplerState":
        """The state before the first token, for keys `[N, T, P]` and values `[N, T, V]`."""
        rows, device = len(keys), keys.device
        key_width, value_width = keys.shape[-1], values.shape[-1]
        return cls(
            centres=torch.zeros(rows, clusters, key_width, device=device),
            samples=torch.zeros(rows, clusters, samples, key_width, device=device),
            counts=torch.zeros(rows, clusters, dtype=torch.long, device=device),
            slot_keys=torch.zeros(rows, slots, key_width, device=device),
            slot_values=torch.zeros(rows, slots, value_width, device=device),
            mass=torch.zeros(rows, dtype=torch.float64, device=device),
        )

    def absorb(
        self, keys: Tensor, values: Tensor, valid: Tensor, radius: float, generator: torch.Generator
    ) -> "SamplerState":
        """The state after T more tokens, as if they had come one by one.

        A key within `radius` of a centre joins the cluster of the nearest one, another opens a cluster, unless all m
        are open: then it joins the nearest, too. It takes each of the t places of its cluster with probability 1/n, n
        the tokens of the cluster with this one, and each of the s slots with probability |v|^2 / mass, with this one.

        Args:
            keys: `[N, T, P]`.
            values: `[N, T, V]`.
            valid: `[N, T]` bool; tokens where it is false change nothing.
            radius: delta of the paper.
            generator: random numbers, on the CPU.
        """
        state = self
        parts = (x.split(_TOKENS_AT_ONCE, dim=1) for x in (keys.float(), values.float(), valid))
        for part_keys, part_values, part_valid in zip(*parts):
            cluster, centres = assign(part_keys, part_valid, state.centres, state.counts > 0, radius)
            state = replace(state, centres=centres)._sample_keys(part_keys, part_valid, cluster, generator)
            state = state._sample_values(part_keys, part_values, part_valid, generator)
        return state

    def _sample_keys(self, keys: Tensor, valid: Tensor, cluster: Tensor, generator: torch.Generator) -> "SamplerState":
        joins = (cluster[..., None] == torch.arange(self.counts.shape[1], device=keys.device)) & valid[..., None]
        sizes = self.counts[:, None] + joins.cumsum(1)
        size = sizes.gather(2, cluster[..., None])
        draws = _uniform((*keys.shape[:2], self.samples.shape[2]), generator, keys.device)
        taken = (draws * size < 1) & valid[..., None]
        # The last token that takes a place keeps it.
        place = torch.where(taken, 1 + torch.arange(keys.shape[1], device=keys.device)[:, None], 0)
        last = place.new_zeros(self.samples.shape[:3]).scatter_reduce(
            1, cluster[..., None].expand_as(place), place, "amax"
        )
        index = (last - 1).clamp(min=0).flatten(1)[..., None].expand(-1, -1, keys.shape[2])
        samples = torch.where(last[..., None] > 0, keys.gather(1, index).view_as(self.samples), self.samples)
        return replace(self, samples=samples, counts=sizes[:, -1])

    def _sample_values(
        self, keys: Tensor, values: Tensor, valid: Tensor, generator: torch.Generator
    ) -> "SamplerState":
        weights = values.double().square().sum(-1) * valid
        mass = self.mass[:, None] + weights.cumsum(1)
        draws = _uniform((*keys.shape[:2], self.slot_keys.shape[1]), generator, keys.device)
        taken = (draws * mass[..., None] < weights[..., None]) & (weights[..., None] > 0)
        last = torch.where(taken, 1 + torch.arange(keys.shape[1], device=keys.device)[:, None], 0).amax(1)[..., None]
        index = (last - 1).clamp(min=0)
        slot_keys = torch.where(last > 0, keys.gather(1, index.expand(-1, -1, keys.shape[2])), self.slot_keys)
        slot_values = torch.where(last > 0, values.gather(1, index.expand(-1, -1, values.shape[2])), self.slot_values)
        return replace(self, slot_keys=slot_keys, slot_values=slot_values, mass=mass[:, -1])

    def log_weights(self) -> tuple[Tensor, Tensor]:
        """What is added to logits, -inf where nothing is kept.

        Returns:
            `[N, m]`: log(n_c / t) for the samples of a cluster. `[N, s]`: log(mass / (s |v|^2)) for the slots.
        """
        clusters = (self.counts / self.samples.shape[2]).log()
        squares = self.slot_values.double().square().sum(-1)
        slots = (self.mass[:, None] / (self.slot_keys.shape[1] * squares)).log()
        return clusters.float(), torch.where(squares > 0, slots, -torch.inf).float()


def assign(keys: Tensor, valid: Tensor, centres: Tensor, is_open: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Clusters that keys join or open, one by one in their order.

    The loop is over the clusters that are opened, at most one per round and row.

    Args:
        keys: `[N, T, P]`.
        valid: `[N, T]` bool.
        centres: `[N, m, P]`.
        is_open: `[N, m]` bool, true for the first clusters of a row.
        radius: largest distance from the nearest centre at which a key opens no cluster.

    Returns:
        Cluster of each key `[N, T]` (without meaning where it is not valid) and the centres.
    """
    distance = torch.cdist(keys, centres, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, cluster = distance.masked_fill(~is_open[:, None], torch.inf).min(2)
    used = is_open.sum(1)
    rows, order = torch.arange(len(keys), device=keys.device), torch.arange(keys.shape[1], device=keys.device)
    while True:
        outside = valid & (nearest > radius)
        opens = outside.any(1) & (used < centres.shape[1])
        if not opens.any():
            return cluster, centres
        first = outside.long().argmax(1)
        key, slot = keys[rows, first], used.clamp(max=centres.shape[1] - 1)
        # `where` on a copy: rows that open nothing write what is there.
        centres = centres.clone()
        centres[rows, slot] = torch.where(opens[:, None], key, centres[rows, slot])
        to_new = (keys - key[:, None]).norm(dim=-1)
        joins = opens[:, None] & (order >= first[:, None]) & (to_new < nearest)
        nearest, cluster = torch.where(joins, to_new, nearest), torch.where(joins, slot[:, None], cluster)
        used = used + opens


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    # Drawn on the CPU: the same numbers on every device.
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)


def weighted_attention(
    query: Tensor, exact: tuple[Tensor, Tensor, Tensor], state: SamplerState, scaling: float
) -> Tensor:
    """Attention over keys at hand and over the stream behind a state.

        y = (sum_exact e^{q.k} v + sum_slots mass / (s |v|^2) e^{q.k} v)
            / (sum_exact e^{q.k} + sum_clusters n_c / t sum_samples e^{q.k}),   q.k times `scaling`

    Args:
        query: `[N, Q, P]` float32.
        exact: keys `[N, S, P]`, values `[N, S, V]` and what is added to their logits, `[N or 1, Q, S]`, all float32.
        state: of the stream.
        scaling: of the logits.

    Returns:
        `[N, Q, V]` float32.
    """
    keys, values, bias = exact
    query = query * scaling
    of_clusters, of_slots = state.log_weights()
    at_hand = query @ keys.transpose(1, 2) + bias
    denominator = torch.einsum("nqp,nmtp->nqmt", query, state.samples) + of_clusters[:, None, :, None]
    denominator = denominator.flatten(2)
    numerator = query @ state.slot_keys.transpose(1, 2) + of_slots[:, None]
    # One maximum for both: their quotient must not know of it.
    highest = torch.cat((at_hand, denominator, numerator), dim=2).amax(2, keepdim=True)
    at_hand, denominator, numerator = ((x - highest).exp() for x in (at_hand, denominator, numerator))
    weighted = at_hand @ values + numerator @ state.slot_values
    return weighted / (at_hand.sum(2, keepdim=True) + denominator.sum(2, keepdim=True))
