"""PolarQuant (arXiv 2502.02617): a code of four bits per coordinate for keys and values, with no scale to keep.

A fixed random rotation makes the coordinates of any vector behave like those of a Gaussian one. In polar coordinates,
taken recursively in groups of 16, angles then are independent with laws that are known beforehand, so that one
codebook serves all models, layers and heads. Of a group 15 angles and one radius are kept:

| level | angles | bits each | bytes of the group's code |
|---|---|---|---|
| 1, in [0, 2 pi) | 8 | 4 | 0 to 3: angle 2j of byte j in its low half, angle 2j + 1 in its high half |
| 2, in [0, pi/2] | 4 | 2 | 4: angle j in bits 2j and 2j + 1 |
| 3 | 2 | 2 | 5: angle j in bits 2j and 2j + 1 |
| 4 | 1 | 2 | 5: bits 4 and 5; bits 6 and 7 are zero |

The radius is a float16 beside the code. That is 64 bits for 16 coordinates.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


GROUP = 16
GROUP_BYTES = 6

# Centres that minimise the mean squared error of an angle (Lloyd-Max, two bits) whose density on [0, pi/2] is
# proportional to sin(2 psi)^(2^(level - 1) - 1).
CENTRES = {
    2: (0.3097561170, 0.6339802400, 0.9368160868, 1.2610402098),
    3: (0.4262496931, 0.6743849978, 0.8964113290, 1.1445466337),
    4: (0.5242140911, 0.7059094057, 0.8648869211, 1.0465822357),
}
_SECTORS = 16
_FLOAT16_MAX = torch.finfo(torch.float16).max


@lru_cache(maxsize=64)
def rotation(width: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The rotation S `[P, P]` float64, orthogonal: the Q of a Gaussian matrix, with the signs that make it uniform.

    Args:
        width: P, a multiple of 16.
        seed: of the Gaussian matrix. Codes can be read only with the rotation that they were made with.
        device: of the result.

    Raises:
        ValueError: for a width that does not divide into groups of 16.
    """
    if width % GROUP:
        raise ValueError(f"PolarQuant codes groups of {GROUP} coordinates: a width of {width} is no multiple of it.")
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(device)


def to_polar(x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Recursive polar coordinates of groups of 16.

        psi^l_j = atan2(r^{l-1}_{2j+1}, r^{l-1}_{2j}),   r^l_j = |(r^{l-1}_{2j}, r^{l-1}_{2j+1})|,   r^0 = x

    Args:
        x: `[..., P]`.

    Returns:
        Angles of the levels 1 to 4, `[..., P/16, 8]`, `[..., P/16, 4]`, `[..., P/16, 2]`, `[..., P/16, 1]`, those of
        level 1 in [0, 2 pi], the others in [0, pi/2], and the radius of each group `[..., P/16]`.
    """
    radii = x.unflatten(-1, (-1, GROUP))
    angles = []
    while radii.shape[-1] > 1:
        even, odd = radii[..., ::2], radii[..., 1::2]
        angles.append(torch.atan2(odd, even))
        radii = torch.hypot(even, odd)
    angles[0] = angles[0].remainder(2 * math.pi)
    return angles, radii.squeeze(-1)


def encode(x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Code of vectors.

    It computes in the dtype of the rotation: in float64, how many vectors are coded together does not change a bit of
    their code, as it can in float32, whose sums depend on the shape.

    Args:
        x: `[..., P]`, any floating dtype.
        rotation: S `[P, P]`.

    Returns:
        Codes `[..., 6 P/16]` uint8, and radii `[..., P/16]` float16, cut off at 65,504.
    """
    angles, radii = to_polar(x.to(rotation.dtype) @ rotation.T)
    sectors = (angles[0] * (_SECTORS / (2 * math.pi))).long() % _SECTORS
    two_bits = [torch.bucketize(psi, _boundaries(level, psi)) for level, psi in enumerate(angles[1:], start=2)]
    last = torch.cat((two_bits[1], two_bits[2]), dim=-1)
    packed = (
        sectors[..., ::2] | sectors[..., 1::2] << 4,
        _pack_two_bits(two_bits[0]),
        _pack_two_bits(last),
    )
    codes = torch.cat(packed, dim=-1).to(torch.uint8).flatten(-2)
    return codes, radii.clamp(max=_FLOAT16_MAX).to(torch.float16)


def decode_rotated(codes: Tensor, radii: Tensor) -> Tensor:
    """Vectors `[..., P]` float32 of `encode`, still rotated: S x^.

    Args:
        codes: `[..., 6 P/16]` uint8.
        radii: `[..., P/16]` float16.
    """
    coarse, middle, fine = _tables(codes.device)
    index = codes.unflatten(-1, (-1, GROUP_BYTES)).int()
    # From the radius down: 4 radii of level 2, two halves of each, two coordinates of each of these.
    level_2 = radii.float()[..., None] * _look_up(coarse, index[..., 5])
    level_1 = level_2[..., None] * _look_up(middle, index[..., 4])
    return (level_1[..., None] * _look_up(fine, index[..., :4])).flatten(-4)


def decode(codes: Tensor, radii: Tensor, rotation: Tensor) -> Tensor:
    """Vectors `[..., P]` float32 of `encode`: x^ = S^T (S x^).

    Args:
        codes: `[..., 6 P/16]` uint8.
        radii: `[..., P/16]` float16.
        rotation: S `[P, P]`, that of `encode`.
    """
    return decode_rotated(codes, radii) @ rotation.float()


def _boundaries(level: int, like: Tensor) -> Tensor:
    centres = torch.tensor(CENTRES[level], dtype=like.dtype, device=like.device)
    return (centres[1:] + centres[:-1]) / 2


def _pack_two_bits(codes: Tensor) -> Tensor:
    """`[..., N]` of 0 to 3, N at most 4, to `[..., 1]` bytes, the first in the lowest bits."""
    shifts = 2 * torch.arange(codes.shape[-1], device=codes.device)
    return (codes << shifts).sum(-1, keepdim=True)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What each byte means.

    Returns:
        For a byte of levels 3 and 4 the share of the radius that the four radii of level 2 have, `[256, 4]`; for a
        byte of level 2 cos and sin of its four angles, `[256, 4, 2]`; for a byte of level 1 those of its two angles,
        `[256, 2, 2]`; all float32.
    """
    byte = torch.arange(256)
    two_bits = byte[:, None] >> 2 * torch.arange(4) & 3

    def directions(psi: Tensor) -> Tensor:
        return torch.stack((psi.cos(), psi.sin()), dim=-1)

    centres = {level: torch.tensor(values, dtype=torch.float64) for level, values in CENTRES.items()}
    level_3, level_4 = directions(centres[3][two_bits[:, :2]]), directions(centres[4][two_bits[:, 2]])
    coarse = (level_4[:, :, None] * level_3).flatten(1)
    middle = directions(centres[2][two_bits])
    sectors = torch.stack((byte & 15, byte >> 4), dim=-1)
    fine = directions((sectors + 0.5) * (2 * math.pi / _SECTORS))
    return tuple(table.float().to(device) for table in (coarse, middle, fine))
