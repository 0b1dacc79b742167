"""Random numbers as a pure function of (seed, step, name, element).

A generator with a hidden position makes a result depend on who else drew from it. Here nothing is hidden: the number
that unit 3 of lane 7 receives at step 12,345 is the same whether the lane runs alone or among a thousand, in one piece
or resumed, compiled or not. The price is a hash per number, which a compiler fuses into the loop that consumes it.

The hash is two rounds of a 32-bit integer finalizer with low bias (constants found by C. Wellons' hash prospector,
2018), keyed by 64 bits made of seed, step and name, so that two streams are not shifted copies of each other.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _signed(word: int) -> int:
    """The 32-bit pattern as the Python int that an int32 tensor would show."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


_MULTIPLY_1 = _signed(0x7FEB352D)
_MULTIPLY_2 = _signed(0x846CA68B)
_GOLDEN = _signed(0x9E3779B9)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int32's own ``>>`` would copy the sign bit."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit. int32 in, int32 out, any shape."""
    x = (x ^ _shift_right(x, 16)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 15)) * _MULTIPLY_2
    return x ^ _shift_right(x, 16)


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

    def scoped(self, scope: str) -> Noise:
        """The same noise under another scope."""
        return replace(self, scope=scope)

    def _words(self, name: str, element: Tensor) -> tuple[Tensor, Tensor]:
        label = f"{self.scope}/{name}".encode()
        # Two stamps, combined with the step in two ways: one alone would let a name at one step be another at another.
        first = _mix(self.key[0] ^ _mix(self.step ^ _signed(zlib.crc32(label))))
        second = _mix((self.key[1] ^ _mix(self.step + _signed(zlib.crc32(label[::-1])))) + first)
        word = _mix(_mix(element ^ first) + second)
        return word, _mix(word ^ _GOLDEN)

    def uniform(self, name: str, element: Tensor) -> Tensor:
        """Uniform on the open interval (0, 1), float32, the shape of ``element`` (int32). 23 bits of resolution."""
        return _to_unit(self._words(name, element)[0])

    def normal(self, name: str, element: Tensor) -> Tensor:
        """Standard normal by Box and Muller (1958), float32, the shape of ``element`` (int32); ``|z| < 5.8``."""
        first, second = self._words(name, element)
        radius = torch.sqrt(-2.0 * torch.log(_to_unit(first)))
        return radius * torch.cos((2.0 * math.pi) * _to_unit(second))


def _to_unit(word: Tensor) -> Tensor:
    # 23 bits, not 24: with 24 the largest would round to 1, and the smallest must not be 0
    return _shift_right(word, 9).to(torch.float32) * 2.0**-23 + 2.0**-24


def elements(like: Tensor) -> Tensor:
    """The number of every element of a tensor, int32, its shape: what a draw for the whole tensor is indexed by."""
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device).reshape(like.shape)
