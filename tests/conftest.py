"""Settings of every test session."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def in_double() -> Iterator[None]:
    """Seed 0, and float64 wherever a test does not say otherwise."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


_tests_begun = 0


def pytest_runtest_setup() -> None:
    """What libraries and earlier tests have made is hidden from the garbage collector, every few tests: tracing a
    network looks through all that the collector shows, which otherwise takes most of the time of thousands of tests."""
    global _tests_begun
    if _tests_begun % 25 == 0:
        gc.collect()
        gc.freeze()
    _tests_begun += 1


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiles: compiles a step, which takes seconds where nothing is cached")
