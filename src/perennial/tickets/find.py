"""Iterative pruning with resetting, and its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from perennial.storage import read_json, read_tensors, write_json, write_tensors
from perennial.tickets.masks import Masks, enforce, remaining, whole
from perennial.tickets.prune import SCOPES, select, shares
from perennial.tickets.scores import SCORES, Evidence, Score
from perennial.trainability.lanes import left_alone, made
from perennial.trainability.learning import bar_for

Weights: TypeAlias = dict[str, Tensor]
"""Parameters and buffers by name, as in a ``state_dict``."""

PRUNED = ("zero", "start")
AFTERWARDS = ("reset", "continue", "rewind_learning_rate", "fine_tune")


@dataclass(frozen=True)
class Stage:
    """One training that is asked of the user's function."""

    model: nn.Module
    """What to train, in place; its pruned weights are held (:func:`perennial.tickets.enforce`)."""
    masks: Masks
    """Which weights it has left."""
    level: int
    """Rounds of pruning that it has been through."""
    start: int
    """The step at which to begin: of data order and learning-rate schedule."""
    stop: int | None
    """The step before which to end; None: at the end of training."""
    seed: int
    """The seed of the search: the same data in the same order for every round."""
    frozen: bool
    """Whether pruned weights are held at their start, not at zero."""
    folder: Path | None
    """Where checkpoints within this training may lie, and are cleared away afterwards; None without a directory."""


Train: TypeAlias = Callable[[Stage], Mapping[str, float] | None]
"""Trains ``stage.model`` from ``stage.start`` to ``stage.stop`` and returns numbers to keep, such as an accuracy."""


@dataclass(frozen=True)
class Pruning:
    """What goes after each round."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rates: Mapping[str, float] = field(default_factory=lambda: {"*": 0.2})
    """Pattern of modules' names -> share of its kept weights pruned a round; the first that matches counts, and layers
    that none matches stay whole."""
    scope: str = "layer"
    """``layer``: the share of each layer; ``global``: of all that have the same share, compared with each other."""
    score: str | Score = "large_final"
    """Which go first: a name of :data:`perennial.tickets.SCORES`, or a function as those are."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {self.scope!r}; it is one of {', '.join(SCOPES)}")
        if isinstance(self.score, str) and self.score not in SCORES:
            raise ValueError(f"there is no score {self.score!r}; there are {', '.join(SCORES)}")

    @property
    def function(self) -> Score:
        """The score as a function."""
        return SCORES[self.score] if isinstance(self.score, str) else self.score


class Level:
    """One round of a search: what was trained, and how it came out."""

    def __init__(self, level: int, masks: Masks, results: Mapping[str, Any], trained: Weights | Path) -> None:
        self.level = level
        """Rounds of pruning before it."""
        self.masks = masks
        """Which weights it had."""
        self.results = dict(results)
        """What the training function returned."""
        self._trained = trained

    @property
    def percent(self) -> float:
        """Of the weights that may be pruned, those that remained."""
        return 100 * remaining(self.masks)

    @property
    def trained(self) -> Weights:
        """The weights at the end of its training; read from disk where the search has a directory."""
        if isinstance(self._trained, Path):
            found: Weights = read_tensors(self._trained)
            return found
        return self._trained

    def __repr__(self) -> str:
        shown = "".join(f", {name} {value:.4g}" for name, value in self.results.items() if isinstance(value, float))
        return f"Level({self.level}: {self.percent:.1f}% of the weights{shown})"


@dataclass(frozen=True)
class Ticket:
    """A subnetwork and the weights that it starts from."""

    masks: Masks
    """Which weights it has."""
    start: Weights
    """Parameters and buffers to start from, of the whole network."""
    levels: tuple[Level, ...]
    """Every round of the search, the whole network first; the last one trained this ticket."""
    step: int = 0
    """The step of training that ``start`` is of: where late rewinding goes back to."""

    def at(self, level: int) -> Ticket:
        """The ticket of an earlier round."""
        if not 0 <= level < len(self.levels):
            raise ValueError(f"there is no level {level}; there are 0 to {len(self.levels) - 1}")
        return replace(self, masks=self.levels[level].masks, levels=self.levels[: level + 1])

    def apply(self, model: nn.Module) -> None:
        """Put the ticket into a model: its start, with zeros where weights are pruned. Hold them with ``enforce``."""
        model.load_state_dict(self.start)
        held = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                held[name].mul_(mask.to(held[name].device))


def find_ticket(
    make_model: Callable[[], nn.Module],
    train: Train,
    *,
    prune: Pruning | None = None,
    rounds: int = 15,
    rewind: int = 0,
    after: str = "reset",
    pruned: str = "zero",
    fine_tune_from: int | None = None,
    one_shot: bool = False,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    directory: Path | str | None = None,
    progress: bool = True,
) -> Ticket:
    r"""Find a winning ticket by iterative magnitude pruning.

    Frankle and Carbin (ICLR 2019): draw :math:`\theta_0`; train; prune the share p of the remaining weights that score
    lowest; give the survivors back their values in :math:`\theta_0`; train again; and so on. After r rounds about
    :math:`(1 - p)^r` of the weights remain.

    What becomes of the survivors, ``after`` a round:

    - ``reset``: they go back to the start (the paper's strategy 1), or with ``rewind`` = k to what they were after k
      steps, :math:`\theta_k`, from which training goes on at step k (late rewinding; Frankle, Dziugaite, Roy and
      Carbin, ICML 2020).
    - ``continue``: they keep their trained values, and train for the whole schedule again; only the last round resets
      and trains (strategy 2).
    - ``rewind_learning_rate``: they keep their trained values, and the schedule starts again at step ``rewind`` (Renda,
      Frankle and Carbin, ICLR 2020).
    - ``fine_tune``: they keep their trained values, and train from step ``fine_tune_from`` to the end.

    Args:
        make_model: makes the network, drawing from torch's, NumPy's or Python's global generators.
        train: trains a model in place; see :class:`~perennial.tickets.Stage`. Masks hold by themselves, for any
            torch optimizer.
        prune: shares, scope and score; by default a fifth of each layer, by magnitude.
        rounds: of pruning; 15 leave 3.6%.
        rewind: the step to whose weights survivors are reset.
        after: what becomes of survivors, see above.
        pruned: what becomes of the others: ``zero``, or ``start``, where they are held (Zhou et al., NeurIPS 2019).
        fine_tune_from: see above.
        one_shot: prune once, by as much as all rounds would.
        data: what the score looks at besides weights, as fields of :class:`~perennial.tickets.Evidence`:
            ``batches``, ``loss``, ``example``.
        seed: of the start, and of ties.
        directory: where finished rounds are kept: the same call goes on after the last of them, and a call with more
            rounds adds those.
        progress: show a bar of rounds on stderr, if they take long.

    Raises:
        ValueError: settings that do not fit together; a directory of another search.
        RuntimeError: pruned weights moved in training.
    """
    prune = prune or Pruning()
    if after not in AFTERWARDS:
        raise ValueError(f"after is {after!r}; it is one of {', '.join(AFTERWARDS)}")
    if pruned not in PRUNED:
        raise ValueError(f"pruned is {pruned!r}; it is one of {', '.join(PRUNED)}")
    if rounds < 0 or rewind < 0:
        raise ValueError(f"rounds is {rounds} and rewind {rewind}; both are numbers from 0")
    if (after == "fine_tune") != (fine_tune_from is not None):
        raise ValueError("fine_tune_from is the step to train from, and belongs to after='fine_tune' alone")
    if after == "continue" and rewind:
        raise ValueError("after='continue' trains from the first step; rewind belongs to the other ways")
    settings = {
        "rates": dict(prune.rates),
        "scope": prune.scope,
        "score": prune.score if isinstance(prune.score, str) else getattr(prune.score, "__name__", "a function"),
        "rewind": rewind,
        "after": after,
        "pruned": pruned,
        "fine_tune_from": fine_tune_from,
        "one_shot": rounds if one_shot else False,
        "seed": seed,
    }
    kept = _Kept(Path(directory) if directory is not None else None, settings)
    model = made_apart(make_model, seed, "init")
    with torch.no_grad():
        drawn = kept.tensors("start.pt", lambda: weights_of(model))
    model.load_state_dict(drawn)
    share = shares(model, prune.rates)
    levels: list[Level] = []
    total = 1 if one_shot and rounds else rounds
    with bar_for(progress, total + 1, "rounds of pruning") as advance:

        def run(number: int, masks: Masks, weights: Weights, start: int, stop: int | None, name: str) -> Level:
            done = kept.level(number, masks, name)
            if done is None:
                model.load_state_dict(weights)
                frozen = pruned == "start"
                with enforce(model, masks, frozen=rewound if frozen else None) as held:
                    stage = Stage(model, masks, number, start, stop, seed, frozen, kept.folder(name))
                    results = train(stage) or {}
                    held.check()
                done = kept.save(number, masks, name, results, weights_of(model))
            return done

        masks, rewound = kept.masks("level-00", lambda: whole(model, share)), drawn
        rewound = run(0, masks, drawn, 0, rewind, "rewind").trained if rewind else drawn
        levels.append(run(0, masks, rewound, rewind, None, "level-00"))
        advance()
        for number in range(1, total + 1):
            last = levels[-1].trained

            def chosen(before: Masks = masks, last: Weights = last) -> Masks:
                scores = _score(prune, model, rewound, last, before, data, seed)
                some = {n: 1 - (1 - p) ** rounds for n, p in share.items()} if one_shot else share
                return select(scores, before, some, scope=prune.scope, seed=seed + len(levels))

            name = f"level-{rounds if one_shot else number:02d}"
            masks = kept.masks(name, chosen)
            weights, start = {
                "reset": (rewound, rewind),
                "continue": (last, 0),
                "rewind_learning_rate": (last, rewind),
                "fine_tune": (last, fine_tune_from or 0),
            }[after]
            levels.append(run(rounds if one_shot else number, masks, weights, start, None, name))
            advance()
        if after == "continue" and total:
            levels.append(run(levels[-1].level, masks, drawn, 0, None, f"reset-{total:02d}"))
    return Ticket(masks, rewound, tuple(levels), rewind)


def _score(
    prune: Pruning,
    model: nn.Module,
    start: Weights,
    trained: Weights,
    masks: Masks,
    data: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Tensor]:
    model.load_state_dict(trained)
    parameters = dict(model.named_parameters())
    first, last = ({n: weights[n].to(w.device) for n, w in parameters.items()} for weights in (start, trained))
    return prune.function(Evidence(model, first, last, masks, seed=seed, **(data or {})))


def made_apart(make_model: Callable[[], nn.Module], seed: int, purpose: str) -> nn.Module:
    """A network of the user's, drawn for one purpose of a seed; global random states are as before."""
    with left_alone(nn.Identity()):
        return made(make_model, seed, purpose)


def weights_of(model: nn.Module) -> Weights:
    """A copy of parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


class _Kept:
    """What a search has on disk, if it has a place there."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        if path is None:
            return
        found = read_json(path / "search.json")
        if found is None:
            if path.is_dir() and any(path.iterdir()):
                raise ValueError(f"{path} is not empty and holds no search for a ticket; name another directory")
            write_json(path / "search.json", settings)
        elif found != settings:
            differing = ", ".join(
                f"{k} was {found.get(k)!r} and is {settings.get(k)!r}"
                for k in sorted(settings.keys() | found.keys())
                if found.get(k) != settings.get(k)
            )
            raise ValueError(f"{path} holds another search: {differing}; name another directory")

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.path is None:
            return make()
        found: dict[str, Tensor] | None = read_tensors(self.path / name)
        if found is None:
            found = make()
            write_tensors(self.path / name, found)
        return found

    def masks(self, name: str, make: Callable[[], Masks]) -> Masks:
        return self.tensors(f"{name}/masks.pt", make)

    def folder(self, name: str) -> Path | None:
        return None if self.path is None else self.path / name

    def level(self, number: int, masks: Masks, name: str) -> Level | None:
        if self.path is None:
            return None
        results = read_json(self.path / name / "results.json")
        return None if results is None else Level(number, masks, results, self.path / name / "trained.pt")

    def save(self, number: int, masks: Masks, name: str, results: Mapping[str, Any], trained: Weights) -> Level:
        if self.path is None:
            return Level(number, masks, results, trained)
        place = self.path / name
        write_tensors(place / "trained.pt", trained)
        write_json(place / "results.json", dict(results))  # the last: it says that the round is finished
        for left in place.glob("checkpoint*"):
            left.unlink()
        return Level(number, masks, results, place / "trained.pt")
