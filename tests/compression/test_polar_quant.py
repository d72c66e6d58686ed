"""The code of PolarQuant: against the paper's formulas one vector at a time, and the figures that the docs claim."""

import itertools
import math

import numpy as np
import polar_oracle as oracle
import pytest
import torch

from hf_memory.compression.polar_quant import CENTRES, decode, decode_rotated, encode, rotation, to_polar


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))


def relative_error(x: torch.Tensor, turned: torch.Tensor) -> float:
    return float((decode(*encode(x, turned), turned) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("level", CENTRES)
def test_centres_are_those_of_the_density(level):
    assert np.abs(oracle.lloyd_max(level) - np.array(CENTRES[level])).max() < 1e-9
    # ... and the density is that of the angles: moments of Gaussian samples.
    angles = to_polar(torch.randn(200000, 16, dtype=torch.float64))[0][level - 1]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    x = math.pi / 4 * (nodes + 1)
    density = weights * np.sin(2 * x) ** oracle.density_power(level)
    variance = float((density * (x - math.pi / 4) ** 2).sum() / density.sum())
    assert float(angles.mean()) == pytest.approx(math.pi / 4, abs=5e-3)
    assert float(angles.var()) == pytest.approx(variance, rel=1e-2)


def test_polar_coordinates_there_and_back():
    x = torch.randn(5, 32, dtype=torch.float64)
    angles, radius = to_polar(x)
    for row, group in itertools.product(range(5), range(2)):
        levels = [level[row, group].tolist() for level in angles]
        expected, expected_radius = oracle.angles_of(x[row, 16 * group : 16 * group + 16].tolist())
        assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(levels, expected))
        assert float(radius[row, group]) == pytest.approx(expected_radius, rel=1e-12)
        back = torch.tensor(oracle.from_angles(levels, float(radius[row, group])), dtype=torch.float64)
        assert torch.allclose(back, x[row, 16 * group : 16 * group + 16], atol=1e-12)


@pytest.mark.parametrize("width", [16, 64, 80])
def test_codes_are_the_nearest_centres(width):
    turned = rotation(width, seed=3)
    x = torch.randn(4, width)
    codes, radii = encode(x, turned)
    assert codes.dtype == torch.uint8 and codes.shape == (4, width // 16 * 6)
    assert radii.dtype == torch.float16 and radii.shape == (4, width // 16)
    decoded = decode_rotated(codes, radii)
    turned_x = (x.double() @ turned.T).tolist()
    for row, group in itertools.product(range(4), range(width // 16)):
        levels, radius = oracle.angles_of(turned_x[row][16 * group : 16 * group + 16])
        expected = oracle.nearest_centres(levels)
        assert codes[row, 6 * group : 6 * group + 6].tolist() == oracle.pack(expected)
        kept_radius = float(torch.tensor(radius, dtype=torch.float64).half())
        assert float(radii[row, group]) == kept_radius
        there = oracle.from_angles(oracle.centres_of(expected), kept_radius)
        assert np.allclose(decoded[row, 16 * group : 16 * group + 16].tolist(), there, rtol=1e-5, atol=1e-6)


def test_every_byte_decodes_and_encodes_to_itself():
    """All values that each byte can have, the others drawn: packing and unpacking agree."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (6 * 256, 6), generator=generator, dtype=torch.uint8)
    for position in range(6):
        codes[256 * position : 256 * (position + 1), position] = torch.arange(256, dtype=torch.uint8)
    codes[:, 5] &= 63
    radii = torch.full((len(codes), 1), 2.0, dtype=torch.float16)
    identity = torch.eye(16, dtype=torch.float64)
    again, again_radii = encode(decode(codes, radii, identity), identity)
    assert torch.equal(again, codes)
    assert torch.equal(again_radii, radii)


def test_error_of_gaussian_vectors(gaussian):
    turned = rotation(64)
    decoded = decode(*encode(gaussian, turned), turned)
    assert relative_error(gaussian, turned) == pytest.approx(0.0321, rel=0.03)
    assert float((gaussian * decoded).sum() / gaussian.square().sum()) == pytest.approx(0.984, abs=2e-3)
    query = torch.randn(gaussian.shape, generator=torch.Generator().manual_seed(1))
    error = ((gaussian - decoded) * query).sum(-1) / (query.norm(dim=-1) * gaussian.norm(dim=-1))
    assert float(error.square().mean().sqrt()) == pytest.approx(0.022, rel=0.03)


def test_norms_are_those_of_the_radii(gaussian):
    turned = rotation(64)
    codes, radii = encode(gaussian, turned)
    norms = decode(codes, radii, turned).norm(dim=-1)
    assert torch.allclose(norms, radii.float().square().sum(-1).sqrt(), rtol=1e-5)
    # float16 has 11 bits.
    assert torch.allclose(norms, gaussian.norm(dim=-1), rtol=2**-11)


def test_codes_of_decoded_vectors_are_the_same(gaussian):
    turned = rotation(64)
    codes, radii = encode(gaussian, turned)
    decoded = decode(codes, radii, turned)
    again, again_radii = encode(decoded, turned)
    assert torch.equal(again, codes)
    assert torch.allclose(decode(again, again_radii, turned), decoded, rtol=0, atol=1e-5)


def test_outliers_need_the_rotation(gaussian):
    outliers = gaussian.clone()
    outliers[:, 3] *= 20
    assert relative_error(outliers, rotation(64)) < 0.04
    assert relative_error(outliers, torch.eye(64, dtype=torch.float64)) > 0.15


@pytest.mark.parametrize("width", [16, 64, 128])
def test_rotation_is_orthogonal_and_fixed(width):
    turned = rotation(width, seed=1)
    assert torch.allclose(turned @ turned.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turned, rotation.__wrapped__(width, seed=1))
    assert not torch.allclose(turned, rotation(width, seed=2))


def test_attention_in_the_rotated_space_is_that_of_decoded_vectors():
    turned = rotation(64)
    query = torch.randn(3, 64)
    keys, values = (encode(torch.randn(50, 64), turned) for _ in range(2))
    expected = (query @ decode(*keys, turned).T).softmax(-1) @ decode(*values, turned)
    rotated = (query @ turned.float().T @ decode_rotated(*keys).T).softmax(-1) @ decode_rotated(*values)
    assert torch.allclose(rotated @ turned.float(), expected, atol=1e-5)


def test_how_many_are_coded_together_does_not_matter(gaussian):
    turned = rotation(64)
    codes, radii = encode(gaussian[:500], turned)
    one_by_one = [encode(x, turned) for x in gaussian[:500]]
    assert torch.equal(codes, torch.stack([c for c, _ in one_by_one]))
    assert torch.equal(radii, torch.stack([r for _, r in one_by_one]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zero_and_large_vectors(dtype):
    turned = rotation(32)
    x = torch.zeros(2, 32, dtype=dtype)
    x[1] = 60000
    decoded = decode(*encode(x, turned), turned)
    assert torch.equal(decoded[0], torch.zeros(32))
    assert decoded.isfinite().all()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="groups of 16.*40"):
        rotation(40)
