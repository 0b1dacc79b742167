"""A language model that learns one text task after another, by many methods."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perennial.compared import Job
from perennial.lm.data import TextTask
from perennial.lm.factors import adapted
from perennial.lm.measures import adapter_measures, collision, relative_threshold, row_overlap, update_cosine
from perennial.lm.models import Asked, Reader, load_model, trained_modules
from perennial.lm.penalties import ElasticWeights, PenaltyMixin
from perennial.lm.stack import AdapterStack
from perennial.lm.stream import Recipe, TextStream, TextTraining
from perennial.methods import Intervention
from perennial.noise import torch_seed
from perennial.parallel import run_jobs
from perennial.storage import read_tensors, write_json, write_tensors

_FISHER_EXAMPLES = 64
"""Examples from which elastic weight consolidation takes the Fisher information of a task."""


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
        losses, seconds = learner.learn(k, functools.partial(_later, pulse, before))
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


def _later(pulse: Callable[[int], None], before: int, step: int) -> None:
    pulse(before + step)


class _Learner:
    """A model on its way through the tasks."""

    def __init__(self, stream: TextStream, recipe: Recipe, texts: Sequence[TextTask], seed: int, device: str) -> None:
        quiet()
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
        from peft import OSFConfig, PeftModel

        if isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
        share = (k + 1) / (len(self.texts) + 1)
        targets = list(self.stream.adapters.target_modules)
        heads = [p for _, p in trained_modules(self.model, self.reader.heads)]
        self.model = adapted(self.model, OSFConfig(effective_rank=share, target_modules=targets))
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
            self.stack = AdapterStack.load(folder, self.model)
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
            self.model = self.model.merge_and_unload()
        return self.model.state_dict()


def quiet() -> None:
    """Let transformers say nothing but errors, and its tokenizers not fork: for worker processes."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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
            train_dataset=list(asked),
            data_collator=reader.batch,
            compute_loss_func=reader.loss,
            optimizers=(optimizer, None),
            callbacks=[Pulse(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if not reader.adds_up:
            trainer.loss_is_scaled_for_ga = False
        if penalties:
            trainer.penalty = lambda of: torch.stack([one(of) for one in penalties]).sum()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    by_batch = torch.stack(losses).float().unflatten(0, (steps, training.accumulate))
    return (by_batch.sum(1) if reader.adds_up else by_batch.mean(1)).tolist(), seconds


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
