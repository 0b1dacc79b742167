"""Random numbers as a pure function of place, and whether they are random."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.func import vmap

from perennial.noise import Noise, _to_unit, elements, seed_key

MANY = 1_000_000
PURPOSES = ("data", "tasks", "init", "method", "probe")
LEAST = 1e-4
"""The p-value below which a test fails; seeds are fixed, so each passes always or never."""


def noise(seed: int = 0, step: int = 0, scope: str = "", purpose: str = "method") -> Noise:
    key = torch.tensor(seed_key(seed, purpose), dtype=torch.int32)
    return Noise(key, torch.tensor(step, dtype=torch.int32), scope)


def count(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int32)


# --- a pure function of place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_part_is_the_part_of_the_whole(kind: str) -> None:
    """Chunks, rows and single elements get what they would get in a draw of everything."""
    draw: Callable[[str, Tensor], Tensor] = getattr(noise(5, 77, "a"), kind)
    whole = draw("w", count(600))
    assert torch.equal(torch.cat([draw("w", part) for part in count(600).split(97)]), whole)
    assert torch.equal(draw("w", count(600).reshape(20, 30)), whole.reshape(20, 30))
    order = torch.randperm(600)
    assert torch.equal(draw("w", order.to(torch.int32)), whole[order])
    assert torch.equal(draw("w", torch.tensor(41, dtype=torch.int32)), whole[41])


@pytest.mark.parametrize("shape", [(5,), (127,), (128,), (129,), (40, 33), (3, 1000)])
@pytest.mark.parametrize("chunk", [None, 1, 300, 10**6])
def test_all_elements_of_a_tensor_get_what_each_would(shape: tuple[int, ...], chunk: int | None) -> None:
    like = torch.zeros(shape)
    whole = replace(noise(5, 77, "a"), chunk=chunk).normal_like("w", like)
    assert torch.equal(whole, noise(5, 77, "a").normal("w", elements(like)))


def test_lanes_under_vmap_get_their_own_numbers() -> None:
    """Alone or among others, a lane draws the same numbers."""
    seeds, steps = [3, 0, 3, 9], [7, 7, 8, 0]
    keys = torch.tensor([seed_key(s, "method") for s in seeds], dtype=torch.int32)
    times = torch.tensor(steps, dtype=torch.int32)
    together = vmap(lambda k, t: Noise(k, t, "m").normal_like("w", torch.zeros(300)))(keys, times)
    for row, seed, step in zip(together, seeds, steps, strict=True):
        assert torch.equal(row, noise(seed, step, "m").normal("w", count(300)))
    for kind in ("uniform", "normal"):
        together = vmap(lambda k, t, kind=kind: getattr(Noise(k, t, "m"), kind)("w", count(50)))(keys, times)
        for row, seed, step in zip(together, seeds, steps, strict=True):
            assert torch.equal(row, getattr(noise(seed, step, "m"), kind)("w", count(50)))


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = noise().normal("w", count(100))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, noise().normal("w", count(100)))


def test_everything_that_names_a_place_changes_the_numbers() -> None:
    base = noise(1, 2, "a").uniform("w", count(64))
    others = {
        "seed": noise(2, 2, "a").uniform("w", count(64)),
        "step": noise(1, 3, "a").uniform("w", count(64)),
        "scope": noise(1, 2, "b").uniform("w", count(64)),
        "name": noise(1, 2, "a").uniform("v", count(64)),
        "purpose": noise(1, 2, "a", "data").uniform("w", count(64)),
    }
    for what, drawn in others.items():
        assert not (drawn == base).any(), what
    assert torch.equal(noise(1, 2).scoped("a").uniform("w", count(64)), base)


def test_elements_numbers_every_entry() -> None:
    numbers = elements(torch.zeros(3, 4, 5, dtype=torch.float64))
    assert numbers.dtype == torch.int32
    assert torch.equal(numbers, count(60).reshape(3, 4, 5))


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_purposes_and_seeds_have_keys_of_their_own() -> None:
    keys = [seed_key(seed, purpose) for seed in range(20_000) for purpose in PURPOSES]
    assert len(set(keys)) == len(keys)
    assert all(-(2**31) <= word < 2**31 for key in keys for word in key)


def test_keys_are_spread_evenly() -> None:
    """Neighbouring seeds are as far apart as any: every bit of a key is a fair coin."""
    keys = np.array([seed_key(seed, "method") for seed in range(20_000)], dtype=np.int64).flatten() & 0xFFFFFFFF
    bits = (keys[:, None] >> np.arange(32)) & 1
    spread = 5 * 0.5 / np.sqrt(len(keys))
    assert np.abs(bits.mean(0) - 0.5).max() < spread
    flips = bits[2:] ^ bits[:-2]
    assert np.abs(flips.mean(0) - 0.5).max() < spread


@pytest.mark.parametrize("seed", [-1, -(2**40)])
def test_a_negative_seed_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        seed_key(seed, "data")


# --- the distributions ----------------------------------------------------------------------------------------------


def test_uniform_is_inside_the_open_interval() -> None:
    """All words there are, at the ends: a 1 would be an index past the end, a 0 an infinite normal."""
    edges = torch.tensor([-1, -2, -255, -256, -257, 0, 1, 255, 256, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for u in (_to_unit(edges), _to_unit(torch.randint(-(2**31), 2**31, (MANY,)).to(torch.int32))):
        assert float(u.min()) > 0
        assert float(u.max()) < 1


def test_uniform_has_23_bits_everywhere() -> None:
    """As documented: rounding takes no number away, in the upper half of the interval either."""
    for start in (0, 2**30, 2**31 - 2**20, 2**32 - 2**20):
        words = torch.tensor([w - 2**32 if w >= 2**31 else w for w in range(start, start + 2**20, 512)])
        assert len(_to_unit(words.to(torch.int32)).unique()) == 2**11


def test_uniform_moments_and_shape() -> None:
    u = noise(3, 11, "m").uniform("0.weight", count(MANY)).double().numpy()
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / MANY)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / MANY)
    assert stats.kstest(u, "uniform").pvalue > LEAST


def test_normal_moments_and_shape() -> None:
    z = noise(3, 11, "m").normal("0.weight", count(MANY)).double().numpy()
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 5.8
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((z**power).mean() - mean) < 5 * np.sqrt(variance / MANY), power
    assert stats.kstest(z, "norm").pvalue > LEAST
    assert np.abs(z).max() > 4.4  # the tails are there


def test_bits_are_balanced() -> None:
    bits = (noise(8, 3).uniform("w", count(MANY)) * 2**24).long()
    share = ((bits[:, None] >> torch.arange(24)) & 1).double().mean(0)[1:]
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / MANY**0.5


@pytest.mark.parametrize("stride", [1, 2, 64, 4096, 2**20 + 1])
def test_strided_elements_are_as_good(stride: int) -> None:
    """A column of a matrix is every so many-th element."""
    n = 200_000 if stride < 10_000 else 2000
    u = noise(2, 9).uniform("w", count(n) * stride).double().numpy()
    assert stats.kstest(u, "uniform").pvalue > LEAST
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(n)


# --- independence ---------------------------------------------------------------------------------------------------

N = 200_000
PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "elements": lambda: (noise().uniform("w", count(N)), noise().uniform("w", count(N) + 1)),
    "elements apart": lambda: (noise().uniform("w", count(N)), noise().uniform("w", count(N) + 1024)),
    "rows": lambda: (noise().uniform("w", count(N) * 2), noise().uniform("w", count(N) * 2 + 1)),
    "steps": lambda: (noise(0, 5).uniform("w", count(N)), noise(0, 6).uniform("w", count(N))),
    "first and second step": lambda: (noise(0, 0).uniform("w", count(N)), noise(0, 1).uniform("w", count(N))),
    "far steps": lambda: (noise(0, 5).uniform("w", count(N)), noise(0, 5 + 2**20).uniform("w", count(N))),
    "seeds": lambda: (noise(0).uniform("w", count(N)), noise(1).uniform("w", count(N))),
    "names": lambda: (noise().uniform("1.weight", count(N)), noise().uniform("3.weight", count(N))),
    "weight and bias": lambda: (noise().uniform("1.weight", count(N)), noise().uniform("1.bias", count(N))),
    "scopes": lambda: (noise(scope="upgd").uniform("w", count(N)), noise(scope="sgd").uniform("w", count(N))),
    "purposes": lambda: (noise(purpose="data").uniform("w", count(N)), noise(purpose="tasks").uniform("w", count(N))),
}


def over_steps(element: int, name: str = "w", steps: int = N) -> Tensor:
    """One element's numbers over many steps."""
    key = torch.tensor(seed_key(0, "method"), dtype=torch.int32)
    return Noise(key[:, None], count(steps)).uniform(name, torch.tensor(element, dtype=torch.int32))


def over_seeds(element: int, step: int = 0, seeds: int = 50_000) -> Tensor:
    """One element's number for many seeds."""
    keys = torch.tensor([seed_key(seed, "method") for seed in range(seeds)], dtype=torch.int32)
    return Noise(keys.T, torch.tensor(step, dtype=torch.int32)).uniform("w", torch.tensor(element, dtype=torch.int32))


PAIRS |= {
    "elements, over steps": lambda: (over_steps(0), over_steps(1)),
    "names, over steps": lambda: (over_steps(0, "1.bias"), over_steps(0, "3.bias")),
    "consecutive steps, over steps": lambda: (over_steps(0)[1:], over_steps(0)[:-1]),
    "elements, over seeds": lambda: (over_seeds(0), over_seeds(1)),
    "steps, over seeds": lambda: (over_seeds(0, 0), over_seeds(0, 1)),
    "neighbouring seeds, over seeds": lambda: (over_seeds(0)[1:], over_seeds(0)[:-1]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_neighbours_are_independent(pair: str) -> None:
    """No correlation, and all 16 x 16 cells of the unit square equally full."""
    left, right = (t.double().numpy() for t in PAIRS[pair]())
    for one in (left, right):
        assert stats.kstest(one, "uniform").pvalue > LEAST
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(len(left))
    cells = np.histogram2d(left, right, bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.flatten()).pvalue > LEAST
    low = np.histogram2d(left * 256 % 1, right * 256 % 1, bins=16, range=[[0, 1], [0, 1]])[0]  # the lower bits too
    assert stats.chisquare(low.flatten()).pvalue > LEAST


def test_triples_fill_the_cube() -> None:
    u = noise(4, 2).uniform("w", count(3 * N)).double().numpy().reshape(-1, 3)
    cells = np.histogramdd(u, bins=8, range=[(0, 1)] * 3)[0]
    assert stats.chisquare(cells.flatten()).pvalue > LEAST


@pytest.mark.parametrize("apart", [1, 2, 63, 64, 65, 128, 784])
def test_normal_pairs_are_independent(apart: int) -> None:
    """Those that share a radius, 64 apart, too."""
    z = noise(4, 2).normal("w", count(N)).double().numpy()
    left, right = z[apart:], z[:-apart]
    assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(N)
    assert abs(np.corrcoef(left**2, right**2)[0, 1]) < 5 / np.sqrt(N)
    cells = np.histogram2d(stats.norm.cdf(left), stats.norm.cdf(right), bins=32, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.flatten()).pvalue > LEAST


def test_normal_numbers_of_two_steps_are_independent() -> None:
    left, right = (stats.norm.cdf(noise(4, step).normal("w", count(N)).numpy()) for step in (2, 3))
    cells = np.histogram2d(left, right, bins=32, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(cells.flatten()).pvalue > LEAST


def test_no_two_places_share_a_stream() -> None:
    """The first numbers of many seeds, steps, scopes and names: none begins like another."""
    begun = []
    for seed, scope, name in itertools.product(range(20), ("sgd", "upgd"), ("1.weight", "1.bias", "3.weight")):
        key = torch.tensor(seed_key(seed, "method"), dtype=torch.int32)
        begun.append(Noise(key[:, None, None], count(1000)[:, None], scope).uniform(name, count(4)))
    rows = torch.cat(begun)
    assert len(rows.unique(dim=0)) == len(rows)


def _close_names() -> tuple[str, str, int, int]:
    """Two parameter names whose checksums are close, and the checksums."""
    numbers = {zlib.crc32(f"/blocks.{layer}.weight".encode()): f"blocks.{layer}.weight" for layer in range(40_000)}
    near = sorted(numbers)
    first, second = min(itertools.pairwise(near), key=lambda pair: pair[1] - pair[0])
    return numbers[first], numbers[second], first, second


def test_a_name_is_not_another_name_at_another_step() -> None:
    """A name enters by more than a sum or an exclusive-or with the step: else, where two checksums are close, one name
    gets at a step what the other gets some steps before."""
    name, other, checksum, other_checksum = _close_names()
    assert max(checksum ^ other_checksum, other_checksum - checksum) < 10_000_000
    at = 20_000_000
    drawn = noise(0, at).uniform(name, count(8))
    for step in (at ^ checksum ^ other_checksum, at + checksum - other_checksum, at - checksum + other_checksum):
        assert not torch.equal(drawn, noise(0, step).uniform(other, count(8)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**31 - 1), name=st.text(max_size=20))
def test_any_place_has_good_numbers(seed: int, step: int, name: str) -> None:
    u = noise(seed, step).uniform(name, count(4000)).double().numpy()
    assert 0.45 < u.mean() < 0.55
    assert stats.kstest(u, "uniform").pvalue > 1e-7
