"""A language model that learns one text task after another, by many methods."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from perennial.lm.data import ORDERS, TextTask, read_task
from perennial.lm.measures import adapter_measures, collision, relative_threshold, row_overlap, update_cosine
from perennial.lm.models import Asked, Family, Reader, load_model, trained_modules
from perennial.lm.penalties import PENALTIES, ElasticWeights, Penalty, PenaltyMixin
from perennial.lm.stack import AdapterStack
from perennial.methods import REGISTRY, Intervention
from perennial.noise import torch_seed
from perennial.optim import OPTIMIZERS
from perennial.parallel import run_jobs
from perennial.storage import read_json, read_tensors, write_json, write_tensors

_STRICT: dict[str, str] = {"extra": "forbid"}
_FISHER_EXAMPLES = 64
"""Examples from which elastic weight consolidation takes the Fisher information of a task."""


@dataclass(frozen=True)
class TextTraining:
    """How each task is trained: AdamW without decay at a constant rate, as in the papers, unless a method says other."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    steps: int = 100
    """Optimizer steps a task."""
    batch_size: int = 16
    """Examples a batch."""
    accumulate: int = 1
    """Batches a step."""
    lr: float = 1e-3
    """Step size."""
    max_length: int = 128
    """Tokens of a text."""
    clip: float = 1.0
    """Longest norm of the gradient; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Adapters:
    """The LoRA adapters; the defaults are the papers'."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    rank: int = 8
    """r."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.1
    """On an adapter's input, in training."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Which linear layers, by the end of their names; ``q`` and ``v`` of T5, ``q_proj`` and ``v_proj`` of Llama."""


@dataclass(frozen=True)
class Recipe:
    """A method: what is trained, on what, with which pulls and rules."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    label: str = ""
    """How figures call it."""
    trains: Literal["adapter_each", "adapter_one", "all", "osf"] = "adapter_each"
    """A new adapter for each task on top of the frozen earlier ones, one for all tasks, all weights, or all weights
    within the orthogonal subspaces of peft's OSF (Nayak et al., 2025)."""
    tasks: Literal["in_turn", "alone", "together"] = "in_turn"
    """One after another; each by itself from the pretrained weights; all at once, with as many steps as all have."""
    penalties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each penalty by its name, see :data:`~perennial.lm.PENALTIES`."""
    ewc: float = 0.0
    """Strength of elastic weight consolidation."""
    replay: int = 0
    """Examples kept of each task and mixed with those of later ones."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """An optimizer rule of this project by name, with its settings; AdamW if left out."""
    interventions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each intervention on the trained model by its name."""
    lr: float | None = None
    """In place of the training's."""

    def __post_init__(self) -> None:
        self.made_penalties()
        self.made_interventions()
        self.optimizer([nn.Parameter(torch.zeros(2, 2))], 1e-3)
        if self.replay < 0 or self.ewc < 0:
            raise ValueError(f"replay is {self.replay} and ewc {self.ewc}; both are at least 0")
        if self.penalties and not self.trains.startswith("adapter"):
            raise ValueError(f"penalties are on adapters' updates, and trains is {self.trains!r}")

    def made_penalties(self) -> list[Penalty]:
        """The penalties themselves."""
        return [_made(PENALTIES, "penalty", name, settings) for name, settings in self.penalties.items()]

    def made_interventions(self) -> list[Intervention]:
        """The interventions themselves."""
        known = {m.name: m for m in REGISTRY if issubclass(m, Intervention)}
        return [_made(known, "intervention", name, settings or {}) for name, settings in self.interventions.items()]

    def optimizer(self, params: Sequence[Any], lr: float) -> torch.optim.Optimizer:
        """What trains the parameters, or (name, parameter)."""
        lr = self.lr if self.lr is not None else lr
        if not self.rule:
            return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        known = {cls.rule.name: cls for cls in OPTIMIZERS.values()}
        settings = {"lr": lr} | {k: v for k, v in self.rule.items() if k != "name"}
        found: torch.optim.Optimizer = _made(known, "optimizer rule", self.rule.get("name", ""), settings, params)
        return found


def _made(known: Mapping[str, Any], kind: str, name: str, settings: Mapping[str, Any], *first: Any) -> Any:
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    try:
        return known[name](*first, **{k: float(v) if _is_number(v) else v for k, v in settings.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name}: {error}") from error


def _is_number(value: Any) -> bool:
    """YAML reads 1e-4 as text."""
    if isinstance(value, (bool, int)) or not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class TextStream:
    """A model, text tasks in an order, methods and seeds."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    tasks: str | tuple[str, ...]
    """``order1`` to ``order6``, or names of tasks (:func:`~perennial.lm.read_task`) in their order."""
    methods: Mapping[str, Recipe]
    """What is compared, by key."""
    model: str = "minilm"
    """A folder, a name on the hub, or the bundled ``minilm``."""
    family: Family | None = None
    """``encoder``, ``seq2seq`` or ``causal``; the model's own if left out."""
    head: Literal["task", "union"] = "task"
    """Whether an encoder has answers for each task or for all labels, see :func:`~perennial.lm.load_model`."""
    train: int | None = None
    """Training examples of each task, drawn by the seed; all if left out."""
    test: int | None = None
    """Test examples of each task, the same for all seeds; all if left out."""
    training: TextTraining = field(default_factory=TextTraining)
    """How each task is trained."""
    adapters: Adapters = field(default_factory=Adapters)
    """Where there are adapters."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the classifier, the adapters, the choice and the order of examples."""
    part: Literal["test", "validation"] = "test"
    """On which scores are taken: ``validation`` to choose settings by."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty; a study compares at least one")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; they are different whole numbers from 0, at least one")
        if isinstance(self.tasks, str) and self.tasks not in ORDERS:
            raise ValueError(f"there is no order {self.tasks!r}; there are {', '.join(ORDERS)}, or name the tasks")
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(f"tasks is {list(self.names)}; each stands there once, and there is at least one")

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in their order."""
        return ORDERS[self.tasks] if isinstance(self.tasks, str) else self.tasks

    def texts(self, seed: int) -> list[TextTask]:
        """The tasks of a seed."""
        found = []
        for name in self.names:
            task = read_task(name)
            found.append(task.smaller(self.train, None, 1 + seed).smaller(None, self.test))
        return found

    def jobs(self) -> list[Job]:
        """All sequences, seed by seed."""
        return [Job(method, seed) for seed in self.seeds for method in self.methods]

    def steps(self, job: Job) -> int:
        """Optimizer steps that a sequence takes."""
        return self.training.steps * len(self.names)


class Job(NamedTuple):
    """One sequence of tasks by one method with one seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    def folder(self, directory: Path) -> Path:
        """Where its results lie."""
        return directory / f"{self.method}-{self.seed}"

    def results(self, directory: Path) -> dict[str, Any] | None:
        """What came of it, as far as it has come: ``scores`` [times][tasks], ``losses`` (of training, by task),
        ``seconds``; when ``finished``, also ``adapters`` and ``pairs``."""
        found: dict[str, Any] | None = read_json(self.folder(directory) / "results.json")
        return found


def run_stream(
    stream: TextStream,
    directory: Path,
    *,
    workers: int,
    device: str = "cpu",
    progress: Callable[[Job, int], None] = lambda job, step: None,
) -> None:
    """Train every sequence that is not finished, several at a time; stopped or killed, it goes on after the last task.

    Args:
        stream: what.
        directory: where; made if absent.
        workers: processes.
        device: where models are trained.
        progress: called with the optimizer steps that a sequence has made.

    Raises:
        RunError: a sequence failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C.
    """
    left = []
    for job in stream.jobs():
        if (job.results(directory) or {}).get("finished"):
            progress(job, stream.steps(job))
        else:
            left.append(job)
    stream.texts(stream.seeds[0])  # what is missing is said before anything is begun
    run_jobs(
        left,
        functools.partial(run_sequence, stream, directory, device=device),
        workers=workers,
        progress=progress,
        finished=lambda job: progress(job, stream.steps(job)),
    )


def run_sequence(
    stream: TextStream, directory: Path, job: Job, *, pulse: Callable[[int], None], device: str = "cpu"
) -> None:
    """One sequence, from where it stands; leaves its results in the directory."""
    recipe, texts, folder = stream.methods[job.method], stream.texts(job.seed), job.folder(directory)
    found = job.results(directory) or {"scores": [], "losses": [], "seconds": []}
    learner = _Learner(stream, recipe, texts, job.seed, device)
    done = len(found["losses"])
    if recipe.tasks == "in_turn" and done:
        learner.load(folder / f"after-{done}")
    whole = recipe.tasks == "together"
    for k in range(done, 1 if whole else len(texts)):
        if recipe.tasks == "alone" and k > done:
            learner = _Learner(stream, recipe, texts, job.seed, device)
        before = k * stream.training.steps
        losses, seconds = learner.learn(k, lambda step, before=before: pulse(before + step))  # type: ignore[misc]
        seen = range(len(texts)) if whole else [k] if recipe.tasks == "alone" else range(k + 1)
        row: list[float | None] = [None] * len(texts)
        for i in seen:
            row[i] = learner.reader.grade(learner.model, texts[i], getattr(texts[i], stream.part))
            pulse(before + stream.training.steps)
        found["scores"].append(row)
        found["losses"].append(losses)
        found["seconds"].append(seconds)
        if recipe.tasks == "in_turn":
            learner.save(folder / f"after-{k + 1}")
        write_json(folder / "results.json", found)
        if k:
            shutil.rmtree(folder / f"after-{k}", ignore_errors=True)
    if learner.stack is not None and len(learner.stack.names) > 1:
        found |= stack_measures(learner.stack)
    write_json(folder / "results.json", found | {"finished": True})


class _Learner:
    """A model on its way through the tasks."""

    def __init__(self, stream: TextStream, recipe: Recipe, texts: Sequence[TextTask], seed: int, device: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.stream, self.recipe, self.texts, self.seed, self.device = stream, recipe, texts, seed, device
        base, self.reader = load_model(
            stream.model,
            texts,
            family=stream.family,
            head=stream.head,
            max_length=stream.training.max_length,
            seed=torch_seed(seed, "head") >> 1,
        )
        self.model: nn.Module = base.to(device)
        self.stack: AdapterStack | None = None
        self.elastic = ElasticWeights(recipe.ewc) if recipe.ewc else None
        self.memory: list[Asked] = []

    def _config(self) -> Any:
        from peft import LoraConfig

        given = self.stream.adapters
        return LoraConfig(
            r=given.rank,
            lora_alpha=given.alpha,  # type: ignore[arg-type]
            lora_dropout=given.dropout,
            target_modules=list(given.target_modules),
        )

    def _prepare(self, k: int) -> None:
        """Give the model what it trains on task k."""
        trains = self.recipe.trains
        if trains == "osf":
            self._renew_subspaces(k)
        elif trains != "all":
            if self.stack is None:
                self.stack = AdapterStack(self.model, self._config(), merge=True, heads=self.reader.heads)
            if trains == "adapter_each" or not self.stack.names:
                self.model = self.stack.begin(self._adapter_name(k))

    def _adapter_name(self, k: int) -> str:
        return f"task{k + 1}"

    def _renew_subspaces(self, k: int) -> None:
        """OSF: what earlier tasks may have used is frozen, a larger share of the singular directions each time."""
        from peft import OSFConfig, PeftModel, get_peft_model

        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()  # type: ignore[operator]
        share = (k + 1) / (len(self.texts) + 1)
        targets = list(self.stream.adapters.target_modules)
        heads = [p for _, p in trained_modules(self.model, self.reader.heads)]
        self.model = get_peft_model(self.model, OSFConfig(effective_rank=share, target_modules=targets))  # type: ignore[arg-type]
        for parameter in heads:
            parameter.requires_grad_(True)

    def learn(self, k: int, pulse: Callable[[int], None]) -> tuple[list[float], float]:
        """Train on task k; the loss of every step without penalties, and the seconds it took."""
        torch.manual_seed(torch_seed(self.seed, f"adapter {k}") >> 1)
        self._prepare(k)
        together = self.recipe.tasks == "together"
        mine = self.texts if together else [self.texts[k]]
        new = [Asked(task, example) for task in mine for example in task.train]
        pulls: list[Callable[[nn.Module], Tensor]] = []
        steps: list[Callable[[torch.optim.Optimizer], Any]] = []
        for penalty in self.recipe.made_penalties():
            if getattr(penalty, "form", "") == "factors":
                steps.append(functools.partial(penalty.proximal, model=self.model))  # type: ignore[attr-defined]
            else:
                pulls.append(penalty)
        if self.elastic is not None:
            pulls.append(self.elastic)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        optimizer = self.recipe.optimizer(named, self.stream.training.lr)
        handles = [begin(optimizer) for begin in steps]
        handles += [self._attached(one, optimizer, new, k) for one in self.recipe.made_interventions()]
        seed = torch_seed(self.seed, f"task {k}") & 0x7FFFFFFF
        count = self.stream.training.steps * (len(self.texts) if together else 1)
        try:
            found = train(
                self.model,
                self.reader,
                [*new, *self.memory],
                optimizer,
                self.stream.training,
                steps=count,
                penalties=pulls,
                callbacks=[self.stack.callback()] if self.stack is not None else [],
                seed=seed,
                pulse=pulse,
                device=self.device,
            )
        finally:
            for handle in handles:
                handle.remove()
        if self.elastic is not None:
            self._consolidate(new)
        self.memory += new[: self.recipe.replay]
        return found

    def _attached(self, one: Intervention, optimizer: torch.optim.Optimizer, new: Sequence[Asked], k: int) -> Any:
        from perennial.attach import attach

        example = {n: t.to(self.device) for n, t in self.reader.batch(new[:2]).items() if n != "labels"}
        return attach(one, self.model, optimizer, example=example, seed=torch_seed(self.seed, f"method {k}") >> 1)

    def _consolidate(self, new: Sequence[Asked]) -> None:
        assert self.elastic is not None

        def loss_of(one: Asked) -> Tensor:
            batch = {n: t.to(self.device) for n, t in self.reader.batch([one]).items()}
            if self.reader.loss is None:
                own: Tensor = self.model(**batch).loss
                return own
            labels = batch.pop("labels")
            return self.reader.loss(self.model(**batch), labels)

        self.elastic.consolidate(self.model, [functools.partial(loss_of, one) for one in new[:_FISHER_EXAMPLES]])

    def save(self, folder: Path) -> None:
        """What the next task begins with."""
        if self.stack is not None:
            self.stack.save(folder)
        else:
            write_tensors(folder / "weights.pt", {n: t.detach().cpu() for n, t in self._plain_state().items()})
        if self.elastic is not None:
            write_tensors(folder / "ewc.pt", {"fisher": self.elastic.fisher, "anchor": self.elastic.anchor})

    def load(self, folder: Path) -> None:
        """Go on from there."""
        done = int(folder.name.partition("-")[2])
        if self.recipe.trains.startswith("adapter"):
            self.stack = AdapterStack.load(folder, self.model, heads=self.reader.heads)
            self.model = self.stack.model
        else:
            self.model.load_state_dict(read_tensors(folder / "weights.pt"))
        if self.elastic is not None:
            saved = read_tensors(folder / "ewc.pt")
            for name in ("fisher", "anchor"):
                setattr(self.elastic, name, {n: t.to(self.device) for n, t in saved[name].items()})
        for task in self.texts[:done]:
            self.memory += [Asked(task, example) for example in task.train][: self.recipe.replay]

    def _plain_state(self) -> Mapping[str, Tensor]:
        """The weights of the model without its wrapping."""
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()  # type: ignore[operator]
        return self.model.state_dict()


def train(
    model: nn.Module,
    reader: Reader,
    asked: Sequence[Asked],
    optimizer: torch.optim.Optimizer,
    training: TextTraining,
    *,
    steps: int,
    penalties: Sequence[Callable[[nn.Module], Tensor]] = (),
    callbacks: Sequence[Any] = (),
    seed: int = 0,
    pulse: Callable[[int], None] = lambda step: None,
    device: str = "cpu",
) -> tuple[list[float], float]:
    """Train a model on examples with transformers' Trainer.

    Returns:
        The loss of every step, without penalties, and the seconds it took.
    """
    import time

    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Pulse(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pulse(state.global_step)

    losses: list[Tensor] = []

    class PenaltyTrainer(PenaltyMixin, Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses.append(self.task_loss)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.accumulate,
            lr_scheduler_type="constant",
            max_grad_norm=training.clip,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=device == "cpu",
            seed=seed,
        )
        trainer = PenaltyTrainer(
            model=model,
            args=arguments,
            train_dataset=list(asked),  # type: ignore[arg-type]
            data_collator=reader.batch,  # type: ignore[arg-type]
            compute_loss_func=reader.loss,
            optimizers=(optimizer, None),
            callbacks=[Pulse(), *callbacks],
        )
        if reader.loss is not None:
            trainer.loss_is_scaled_for_ga = False  # the reader's loss is a mean over the batch
        if penalties:
            trainer.penalty = lambda of: torch.stack([one(of) for one in penalties]).sum()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    by_step = torch.stack(losses).float().unflatten(0, (steps, training.accumulate))
    # a model that counts the items of a whole step gives each batch its part of the step's loss
    whole = by_step.sum(1) if reader.loss is None and training.accumulate > 1 else by_step.mean(1)
    return whole.tolist(), seconds


def stack_measures(stack: AdapterStack) -> dict[str, Any]:
    """Of all adapters and of every two: ``adapters`` (a row each), ``pairs`` (a row for every two), ``threshold``."""
    factors = [stack.factors(name) for name in stack.names]
    updates = [{module: f.update for module, f in one.items()} for one in factors]
    threshold = relative_threshold(updates)
    pairs = []
    for j in range(len(updates)):
        for i in range(j):
            hit, exact = collision(updates[i], updates[j], threshold), collision(updates[i], updates[j])
            rows = [(factors[i][m], factors[j][m]) for m in factors[i]]
            pairs.append(
                {
                    "first": i,
                    "second": j,
                    "collision_rate": hit.rate,
                    "collision_floor": hit.floor,
                    "exact_rate": exact.rate,
                    "exact_floor": exact.floor,
                    "row_overlap": sum(row_overlap(*two) for two in rows) / len(rows),
                    "row_cosine": sum(row_overlap(*two, normalize=True) for two in rows) / len(rows),
                    "update_cosine": update_cosine(factors[i], factors[j]),
                }
            )
    return {"threshold": threshold, "adapters": [adapter_measures(one, threshold) for one in factors], "pairs": pairs}
