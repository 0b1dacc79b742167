"""Random numbers as a pure function of (seed, step, name, element).

A generator with a hidden position makes a result depend on who else drew from it. Here nothing is hidden: the number
that unit 3 of lane 7 receives at step 12,345 is the same whether the lane runs alone or among a thousand, in one piece
or resumed, compiled or not. The price is a hash per number, which a compiler fuses into the loop that consumes it.

The hash of an element is a 32-bit integer finalizer with low bias (constants found by C. Wellons' hash prospector,
2018), keyed by 64 bits made of seed, step and name: one word before it and one before a last round, so that two
streams are not shifted copies of each other.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _signed(word: int) -> int:
    """The 32-bit pattern as the Python int that an int32 tensor would show."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


MULTIPLY_1 = _signed(0x7FEB352D)
MULTIPLY_2 = _signed(0x846CA68B)
MULTIPLY_3 = _signed(0x9E3779B9)
"""2^32 over the golden ratio: the pairs of last words that it makes with the second multiplier fill the square."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int32's own ``>>`` would copy the sign bit."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _first_round(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 16)) * MULTIPLY_1
    return x ^ _shift_right(x, 15)


def _finished(x: Tensor, multiplier: int) -> Tensor:
    x = x * multiplier
    return x ^ _shift_right(x, 16)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit. int32 in, int32 out, any shape."""
    return _finished(_first_round(x), MULTIPLY_2)


def seed_key(seed: int, purpose: str) -> tuple[int, int]:
    """Two 32-bit words for one purpose ("data", "tasks", "init", "method") of a seed, as signed ints.

    Purposes of one seed are independent streams, so a method's noise never moves the data.
    The words come from two rounds of the splitmix64 finalizer over the seed and the CRC-32 of the purpose.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}: a seed is a whole number from 0")
    z = (seed * 0x9E3779B97F4A7C15 + zlib.crc32(purpose.encode()) * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK64
    for _ in range(2):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return _signed(z >> 32), _signed(z)


def torch_seed(seed: int, purpose: str) -> int:
    """The same as one number from 0 to 2^64 - 1, for a generator of torch's that a factory draws from."""
    high, low = seed_key(seed, purpose)
    return (high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def label_words(scope: str, name: str) -> tuple[int, int]:
    """Two 32-bit words for a name within a scope, as signed ints."""
    label = f"{scope}/{name}".encode()
    return _signed(zlib.crc32(label)), _signed(zlib.crc32(label[::-1]))


@dataclass(frozen=True)
class Noise:
    """The random numbers that a method may draw in one step.

    ``noise.normal("0.weight", element)`` is a function of the seed, the step, the scope (which method), the name and
    the element alone. Draw with element numbers, never with a shape: a method that needs three rows of a matrix asks
    for the elements of those rows, and gets what it would have got by drawing the whole matrix.
    """

    key: Tensor
    """int32 [2]: :func:`seed_key` of the lane's seed."""
    step: Tensor
    """int32 []: optimizer steps made before this one."""
    scope: str = ""
    """Who draws; two methods that draw for one parameter must not get the same numbers."""
    labels: Mapping[str, Tensor] | None = None
    """:func:`label_words` of every name, int32 [2], where a name shall not be a constant of a compiled program; then
    no other names are known."""
    chunk: int | None = None
    """Normal numbers made at a time, so that all that lies between stays in a processor's cache; None: all at once, for
    a device, and for a compiler, which sees to it by itself."""

    def scoped(self, scope: str) -> Noise:
        """The same noise under another scope."""
        return replace(self, scope=scope)

    def _stamps(self, name: str) -> tuple[Tensor, Tensor]:
        """Two words for all elements of a name at this step."""
        one, two = label_words(self.scope, name) if self.labels is None else self.labels[name].unbind()
        # Two, combined with the step in two ways: one alone would let a name at one step be another at another.
        first = once(_mix(self.key[0] ^ _mix(self.step ^ one)))
        return first, once(_mix((self.key[1] ^ _mix(self.step + two)) + first))

    def uniform(self, name: str, element: Tensor) -> Tensor:
        """Uniform on the open interval (0, 1), float32, the shape of ``element`` (int32). 23 bits of resolution."""
        return _to_unit(_finished(_scrambled(element, self._stamps(name)), MULTIPLY_2))

    def normal(self, name: str, element: Tensor) -> Tensor:
        """Standard normal by Box and Muller (1958), float32, the shape of ``element`` (int32); ``|z| < 5.8``.

        Logarithm and cosine are polynomials; a number is within 1e-5 of what exact ones would give.
        """
        # Elements at the same place of two neighbouring blocks share a radius, and lie at right angles on it.
        pair = ((element >> (_BLOCK_BITS + 1)) << _BLOCK_BITS) | (element & (BLOCK - 1))
        second = (element >> _BLOCK_BITS) & 1
        radius, angle = _polar(pair, self._stamps(name))
        return radius * _cosine(angle - (second << 30))

    def normal_like(self, name: str, like: Tensor) -> Tensor:
        """:meth:`normal` for every element of a tensor, its shape: the same numbers, a radius for every two."""
        count = like.numel()
        if count < 2 * BLOCK:
            return self.normal(name, elements(like))
        blocks = (count + 2 * BLOCK - 1) // (2 * BLOCK)
        # A sum, because a compiled loop makes the running numbers of a vector one by one, and of a float, because it
        # loads integers by a detour: both cost a tenth of a number and more.
        place = once(torch.arange(BLOCK, dtype=torch.float32, device=like.device)).to(torch.int32)
        pair = torch.arange(blocks, dtype=torch.int32, device=like.device).unsqueeze(1) * BLOCK + place
        stamps = self._stamps(name)
        parts = [pair] if self.chunk is None else pair.split(max(1, self.chunk // (2 * BLOCK)))
        drawn = [_both(part, stamps) for part in parts]
        return (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).reshape(-1)[:count].view(like.shape)


def _scrambled(element: Tensor, stamps: tuple[Tensor, Tensor]) -> Tensor:
    """A word for each element, to be taken through a last round, :func:`_finished`."""
    return _mix(element ^ stamps[0]) + stamps[1]


_BLOCK_BITS = 6
BLOCK = 1 << _BLOCK_BITS


def _polar(pair: Tensor, stamps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Radius, float32, and angle, int32 in 2^-32 of a turn, of pairs of normal numbers."""
    word = _scrambled(pair, stamps)
    return torch.sqrt(_minus_twice_log(_to_unit(_finished(word, MULTIPLY_2)))), _finished(word, MULTIPLY_3)


def _both(pair: Tensor, stamps: tuple[Tensor, Tensor]) -> Tensor:
    """Both normal numbers of every pair, [blocks, 2, BLOCK] of [blocks, BLOCK]."""
    radius, angle = _polar(pair, stamps)
    return torch.stack((radius * _cosine(angle), radius * _cosine(angle - (1 << 30))), 1)


def _cosine(angle: Tensor) -> Tensor:
    turns = angle.to(torch.float32) * 2.0**-32
    return _series(turns * turns, COS_SERIES)


def _to_unit(word: Tensor) -> Tensor:
    # 23 bits, not 24: with 24 the largest would round to 1, and the smallest must not be 0
    return (word >> 9).to(torch.float32) * 2.0**-23 + (0.5 + 2.0**-24)


def once(small: Tensor) -> Tensor:
    """The same numbers. A compiler computes what is small again for every element of what it is broadcast against,
    unless it is the result of a reduction (measured: 5 of the 6 ns of a uniform number)."""
    return torch.stack((small, small)).amax(0)


# Minimax polynomials (Lawson's iteration on 4,000 Chebyshev nodes) for what a library computes to the last bit and a
# compiled loop therefore calls instead of inlining it: together a third of the time of a normal number.
LOG_SERIES = (-2.0000240802764893, 0.99971163272857666, -0.66456061601638794, 0.50928688049316406,
               -0.44629266858100891, 0.2867480218410492)  # fmt: skip
"""-2 log(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1], lowest power first; the logarithm is within 1.7e-6."""
COS_SERIES = (-0.9999992251396179, 19.738983154296875, -64.92872619628906, 85.27239990234375, -58.794036865234375,
               21.076778411865234)  # fmt: skip
"""-cos(2 pi t), as good as the cosine, in powers of t^2 for t in [-1/2, 1/2], lowest power first; within 8e-7."""
ROOT_HALF = 0x3F3504F3
"""The bits of sqrt(1/2)."""


def _series(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        total = total * x + coefficient
    return total


def _minus_twice_log(x: Tensor) -> Tensor:
    """-2 log(x) of positive, normal float32: x = 2^e (1 + f), the exponent taken from the bits."""
    bits = x.view(torch.int32) - ROOT_HALF
    f = ((bits & 0x7FFFFF) + ROOT_HALF).view(torch.float32) - 1.0
    return f * _series(f, LOG_SERIES) + (bits >> 23).to(torch.float32) * (-2 * math.log(2))


def elements(like: Tensor) -> Tensor:
    """The number of every element of a tensor, int32, its shape: what a draw for the whole tensor is indexed by."""
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device).reshape(like.shape)
