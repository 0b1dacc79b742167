"""Compiling: what Inductor is kept from doing wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

OVER_THE_END = """
import torch
from perennial.compiler import compile_step

def step(out, x, w, b):
    z = torch.bmm(x.movedim(-1, 0), w.movedim(-1, 0)) + b.T[:, None]
    return [z.argmax(2).T.float() + torch.logsumexp(z, 2).T]

x, w, b = torch.rand(20, 5, LANES), torch.rand(5, 3, LANES), torch.rand(3, LANES)
compiled = compile_step(step, [torch.zeros(20, LANES)], [x, w, b], LANES, 1)
for _ in range(50):
    out = torch.zeros(20, LANES)
    compiled([out, x, w, b])
    torch.testing.assert_close(out, step(out, x, w, b)[0])
"""


@pytest.mark.parametrize("lanes", [10, 18, 34])
def test_a_reduction_writes_no_further_than_its_lanes(lanes: int) -> None:
    """In a process of its own: what is written over the end of a buffer ends it (pytorch issue 196681)."""
    code = OVER_THE_END.replace("LANES", str(lanes))
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
