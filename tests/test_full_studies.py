"""Every study of populations that ships, at its full size: it expands, and takes its first steps."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from perennial import Population
from perennial.runs.plan import programs
from perennial.streams.label_permuted import _features
from perennial.studies import Study, factory_of, load, seeds_of, shipped, stream_of, variants_of

DATA = Path(os.environ.get("PERENNIAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
STUDIES = [name for name in sorted(shipped()) if isinstance(load(name), Study)]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_full_setting_expands_and_takes_its_first_steps(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "mini-imagenet" in name and not (DATA / "mini-imagenet").exists():  # made up: the stream is what is tried
        generator = np.random.default_rng(0)
        (tmp_path / "mini-imagenet").mkdir()
        np.savez(tmp_path / "mini-imagenet/features.npz", features=generator.random((300, 2048), dtype=np.float32),
                 labels=np.arange(300) % 100)  # fmt: skip
        monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    else:
        monkeypatch.setenv("PERENNIAL_DATA", str(DATA))
    _features.cache_clear()
    study = load(name)
    assert isinstance(study, Study)
    try:
        every = programs(study)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    lanes = sum(len(found) for _, found in every)
    assert lanes == sum(
        len(variants_of(part, key, key)) * len(seeds_of(part, key)) for key, part in study.parts.items()
    )
    for key, found in every:
        part = study.parts[key]
        stream = stream_of(part, key)
        number, seed = found[0]
        variant = variants_of(part, key, key)[number]
        population = Population(
            factory_of(variant, stream),
            stream,
            [variant.lane(seed)],
            compiled=False,
            plasticity_every=part.plasticity_every,
        )
        population.advance(2)
        assert population.steps_made == 2
        assert math.isfinite(float(population.state.loss))
        assert all(torch.isfinite(w).all() for w in population.state.params.values())
        del population
        gc.collect()
