"""Settings of every test session."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiles: compiles a step, which takes seconds where nothing is cached")
