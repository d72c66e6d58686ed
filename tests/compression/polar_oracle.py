"""PolarQuant as the paper states it, one vector at a time in float64, and the density of its angles."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def density_power(level: int) -> int:
    """The density of an angle of levels 2 to 4 on [0, pi/2] is proportional to sin(2 psi) to this power."""
    return 2 ** (level - 1) - 1


@lru_cache
def lloyd_max(level: int, rounds: int = 100) -> np.ndarray:
    """Centres of the best quantiser of two bits for that density, by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)

    def integral(start: float, end: float, moment: int) -> float:
        x = (end - start) / 2 * nodes + (start + end) / 2
        return (end - start) / 2 * float((weights * x**moment * np.sin(2 * x) ** density_power(level)).sum())

    centres = (np.arange(4) + 0.5) * math.pi / 8
    for _ in range(rounds):
        edges = [0.0, *((centres[1:] + centres[:-1]) / 2), math.pi / 2]
        centres = np.array([integral(a, b, 1) / integral(a, b, 0) for a, b in zip(edges, edges[1:])])
    return centres


def angles_of(group: Sequence[float]) -> tuple[list[list[float]], float]:
    """Angles of levels 1 to 4 and the radius of 16 coordinates."""
    radii, levels = list(map(float, group)), []
    while len(radii) > 1:
        pairs = list(zip(radii[::2], radii[1::2]))
        levels.append([math.atan2(odd, even) % (2 * math.pi) for even, odd in pairs])
        radii = [math.hypot(even, odd) for even, odd in pairs]
    return levels, radii[0]


def from_angles(levels: Sequence[Sequence[float]], radius: float) -> list[float]:
    """16 coordinates: from level 4 down each radius becomes (r cos psi, r sin psi)."""
    radii = [radius]
    for angles in reversed(levels):
        radii = [part for r, psi in zip(radii, angles) for part in (r * math.cos(psi), r * math.sin(psi))]
    return radii


def nearest_centres(levels: Sequence[Sequence[float]]) -> list[list[int]]:
    """Index of the centre nearest to each angle, level 1 on the circle."""
    sectors = (np.arange(16) + 0.5) * 2 * math.pi / 16
    codes = []
    for level, angles in enumerate(levels, start=1):
        centres = sectors if level == 1 else lloyd_max(level)
        distance = np.abs(np.array(angles)[:, None] - centres)
        codes.append(np.minimum(distance, 2 * math.pi - distance).argmin(1).tolist())
    return codes


def centres_of(codes: Sequence[Sequence[int]]) -> list[list[float]]:
    """Angles that codes stand for."""
    sectors = (np.arange(16) + 0.5) * 2 * math.pi / 16
    return [
        [float((sectors if level == 1 else lloyd_max(level))[code]) for code in row]
        for level, row in enumerate(codes, start=1)
    ]


def pack(codes: Sequence[Sequence[int]]) -> list[int]:
    """The six bytes of a group, as the table in `hf_memory.compression.polar_quant` has them."""
    first, second, third, fourth = codes
    halves = [first[2 * j] + 16 * first[2 * j + 1] for j in range(4)]
    return [*halves, sum(c * 4**j for j, c in enumerate(second)), third[0] + 4 * third[1] + 16 * fourth[0]]
