"""Text tasks: what is read, what is asked, what counts as right."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from perennial.noise import torch_seed
from perennial.streams.files import data_folder

Score = Literal["accuracy", "matthews", "pearson"]


class Example(NamedTuple):
    """One text and what it should be answered with."""

    sentence: str
    """What is read."""
    label: str
    """One of the task's labels; of a regression the number as text."""
    second: str | None = None
    """The other sentence of a pair."""


@dataclass(frozen=True)
class TextTask:
    """Texts with labels, in three parts. Settings are chosen on the validation part, never on the test part."""

    name: str
    """Its name, unique in a stream."""
    group: str
    """The kind of task, as the published prompt names it; empty if it has none."""
    labels: tuple[str, ...]
    """What may be answered; empty for a regression."""
    train: tuple[Example, ...]
    """To learn from."""
    validation: tuple[Example, ...]
    """To choose settings by: taken from the training set, which the published development sets are not."""
    test: tuple[Example, ...]
    """To report."""
    score: Score = "accuracy"
    """What is measured: exact match, Matthews' correlation or Pearson's."""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not getattr(self, part):
                raise ValueError(f"task {self.name} has no {part} examples")
        if len({normalised(label) for label in self.labels}) < len(self.labels):
            raise ValueError(
                f"labels of task {self.name} are {', '.join(map(repr, self.labels))}, of which some are the same "
                "without case and punctuation, as answers are compared; spell them apart"
            )
        if self.score not in get_args(Score):
            raise ValueError(f"score of task {self.name} is {self.score!r}; it is one of {', '.join(get_args(Score))}")
        if (self.score == "pearson") == bool(self.labels):
            raise ValueError(
                f"task {self.name} has {len(self.labels)} labels and the score {self.score}: a regression, which has "
                "none, is scored by pearson, and nothing else is"
            )
        for part in ("train", "validation", "test"):
            for at, example in enumerate(getattr(self, part)):
                if not self.labels and not _is_number(example.label):
                    raise ValueError(f"task {self.name}, {part} example {at}: {example.label!r} is no number")
                if self.labels and example.label not in self.labels:
                    raise ValueError(
                        f"task {self.name}, {part} example {at}: the label is {example.label!r}, which is none of "
                        f"{', '.join(map(repr, self.labels))}; mend the example, or add the label to labels.json"
                    )

    def prompt(self, sentence: str) -> str:
        """The text as the published code asks it of a model that answers in words (O-LoRA, configs and data loader):
        task, data set, instruction, options, text. COPA's texts ask for themselves."""
        head = f"Task:{self.group}\nDataset:{self.name}\n" if self.group else ""
        ask = INSTRUCTIONS.get(self.group)
        options = "" if ask is None else f"{ask}\nOption: {', '.join(self.labels)} \n"
        return f"{head}{options}{sentence}\nAnswer:"

    def smaller(self, train: int | None = None, test: int | None = None, seed: int = 0) -> TextTask:
        """At most so many training (and validation) and test examples, drawn by a seed without replacement."""

        def some(part: Sequence[Example], count: int | None, which: str) -> tuple[Example, ...]:
            if count is None or count >= len(part):
                return tuple(part)
            drawn = torch.randperm(len(part), generator=_generator(seed, f"{self.name}/{which}"))[:count]
            return tuple(part[i] for i in drawn.tolist())

        return replace(
            self,
            train=some(self.train, train, "train"),
            validation=some(self.validation, test, "validation"),
            test=some(self.test, test, "test"),
        )

    def grade(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """How good answers are: the share of exact matches after :func:`normalised`, or a correlation, which is 0
        where one side does not vary. An answer that is no number is read as 0 in a regression, one that is no label is
        wrong. Matthews' correlation is that of Gorodkin (2004), which of two labels is the usual one.

        Raises:
            ValueError: no examples.
        """
        if not examples:
            raise ValueError(f"there are no examples of {self.name} to grade answers by")
        if self.score == "accuracy":
            right = [normalised(a) == normalised(e.label) for a, e in zip(answers, examples, strict=True)]
            return sum(right) / len(right)
        if self.score == "pearson":
            given, true = [_number(a) for a in answers], [float(e.label) for e in examples]
        else:
            places = {normalised(label): at for at, label in enumerate(self.labels)}
            kinds = np.eye(len(places) + 1)  # the last: what is no label
            one = kinds[[places.get(normalised(a), -1) for a in answers]]
            other = kinds[[places[normalised(e.label)] for e in examples]]
            first, second = one - one.mean(0), other - other.mean(0)
            size = float(np.sqrt((first**2).sum() * (second**2).sum()))
            return float((first * second).sum()) / size if size else 0.0
        if np.ptp(given) == 0 or np.ptp(true) == 0:
            return 0.0
        return float(np.corrcoef(given, true)[0, 1])


INSTRUCTIONS: Mapping[str, str] = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? Choose one "
    "from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one "
    "from the option.",
}
"""The published questions by kind of task (O-LoRA's instruction_config.json), which results depend on to the letter."""

_SHORT = ("dbpedia", "amazon", "yahoo", "agnews")
ORDERS: Mapping[str, tuple[str, ...]] = {
    "order1": _SHORT,
    "order2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "order3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "order4": tuple("MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo".split()),
    "order5": tuple("MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo".split()),
    "order6": tuple("yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC".split()),
}
"""The orders in which the papers give the tasks of CL_Benchmark (O-LoRA, Wang et al., 2023; N-LoRA, 2025)."""

_GROUPS = {
    **dict.fromkeys(("amazon", "yelp", "IMDB", "SST-2"), "SC"),
    **dict.fromkeys(("dbpedia", "yahoo", "agnews"), "TC"),
    **dict.fromkeys(("MNLI", "CB", "RTE"), "NLI"),
    **{name: name for name in ("QQP", "WiC", "BoolQA", "COPA", "MultiRC")},
}

_GLUE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], Score]] = {
    "sst2": (("sentence",), ("negative", "positive"), "accuracy"),
    "cola": (("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
    "stsb": (("sentence1", "sentence2"), (), "pearson"),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), "accuracy"),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
}
"""Columns, labels in the order of the hub's numbers, and the measure that GLUE reports (for those with two, one)."""

HELD_OUT = 0.1
"""Share of the training set that becomes the validation part."""


def read_task(name: str, folder: Path | None = None) -> TextTask:
    """A task by name: ``dbpedia``, ``amazon``, ... of CL_Benchmark, or ``glue/sst2``, ``glue/cola``, ...

    Args:
        name: which.
        folder: holds ``CL_Benchmark`` and ``glue``; ``PERENNIAL_DATA`` if left out.

    Raises:
        FileNotFoundError: a file is not there; says what to put where.
        ValueError: an unknown name, or a damaged file; says which and where.
    """
    base = folder or data_folder()
    if base is None:
        raise FileNotFoundError(
            f"the texts of {name} are needed: set the environment variable PERENNIAL_DATA to a folder that holds "
            "CL_Benchmark/GROUP/TASK/train.json or glue/TASK/train.parquet"
        )
    if name.startswith("glue/"):
        return read_glue(base / "glue" / name.removeprefix("glue/"))
    if name not in _GROUPS:
        raise ValueError(
            f"there is no task {name!r}; there are {', '.join(_GROUPS)} and {', '.join(f'glue/{g}' for g in _GLUE)}"
        )
    return read_cl_benchmark(base / "CL_Benchmark" / _GROUPS[name] / name)


def read_cl_benchmark(folder: Path) -> TextTask:
    """A task of CL_Benchmark (Wang et al., 2023): ``GROUP/TASK/{train,test,labels}.json``, rows of sentence and label.

    The validation part is a tenth of ``train.json``, the same in every run: in the published data ``dev.json`` equals
    ``test.json``.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is cut short or is not what it should be; says which, where and why.
    """
    name, group = folder.name, folder.parent.name
    labels = _json(folder / "labels.json")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{folder / 'labels.json'} holds no list of labels")
    parts = {}
    for part in ("train", "test"):
        rows = _json(folder / f"{part}.json")
        for at, row in enumerate(rows):
            if not isinstance(row, dict) or not {"sentence", "label"} <= row.keys():
                raise ValueError(f"{folder / f'{part}.json'}, row {at}: a row has a sentence and a label, not {row}")
        parts[part] = [Example(str(row["sentence"]), str(row["label"])) for row in rows]
    return _task(name, group, tuple(labels), parts["train"], parts["test"])


def read_glue(folder: Path) -> TextTask:
    """A task of GLUE (Wang et al., 2019) as the hub lays it out: ``train.parquet``, ``validation.parquet``.

    GLUE's test labels are hidden, so its validation set is the test part here, and the validation part comes from the
    training set.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an unknown task, other columns, a damaged file.
    """
    import polars

    name = folder.name
    if name not in _GLUE:
        raise ValueError(f"there is no GLUE task {name!r}; there are {', '.join(_GLUE)}")
    columns, labels, score = _GLUE[name]
    parts = []
    for part in ("train", "validation_matched" if name == "mnli" else "validation"):
        path = folder / f"{part}.parquet"
        if not path.exists():
            raise FileNotFoundError(f"GLUE's {name} is needed, but there is no {path}; put the hub's file there")
        try:
            frame = polars.read_parquet(path)
        except polars.exceptions.PolarsError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if missing := [c for c in (*columns, "label") if c not in frame.columns]:
            raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; {', '.join(missing)} is missing")
        parts.append(from_rows(frame.iter_rows(named=True), columns, labels, str(path)))
    return _task(f"glue/{name}", "", labels, parts[0], parts[1], score)


def from_dataset(
    name: str,
    train: Iterable[Mapping[str, Any]],
    test: Iterable[Mapping[str, Any]],
    *,
    columns: Sequence[str],
    labels: Sequence[str],
    score: Score = "accuracy",
) -> TextTask:
    """A task of any data set whose rows are mappings, such as a Hugging Face ``Dataset``.

    Args:
        name: of the task.
        train: rows to learn from, of which a tenth is held out for validation.
        test: rows to report on.
        columns: of the text, or of both texts of a pair.
        labels: in words; a row's ``label`` is one of them, or its number. Empty for a regression.
        score: what is measured.

    Raises:
        ValueError: a row without a column, a label outside of the set.
    """
    found = [from_rows(rows, columns, labels, f"{name}, {part}") for rows, part in ((train, "train"), (test, "test"))]
    return _task(name, "", tuple(labels), found[0], found[1], score)


def from_rows(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str], labels: Sequence[str], where: str
) -> list[Example]:
    """Examples of rows; ``where`` is how errors call their source."""
    found = []
    for at, row in enumerate(rows):
        try:
            texts, label = [str(row[c]) for c in columns], row["label"]
        except KeyError as error:
            raise ValueError(f"{where}, row {at} has no {error}; it has {', '.join(row)}") from None
        if labels and isinstance(label, Integral):
            number = int(label)
            if not 0 <= number < len(labels):
                raise ValueError(f"{where}, row {at}: the label is {label}; labels are 0 to {len(labels) - 1}")
            label = labels[number]
        found.append(Example(texts[0], str(label), texts[1] if len(texts) > 1 else None))
    return found


def normalised(answer: str) -> str:
    """An answer in small letters, without punctuation and superfluous space, as the papers compare it."""
    return " ".join(answer.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _task(
    name: str,
    group: str,
    labels: tuple[str, ...],
    train: Sequence[Example],
    test: Sequence[Example],
    score: Score = "accuracy",
) -> TextTask:
    order = torch.randperm(len(train), generator=_generator(0, f"{name}/held out")).tolist()
    held = round(HELD_OUT * len(train))
    validation, rest = ([train[i] for i in part] for part in (order[:held], order[held:]))
    return TextTask(name, group, labels, tuple(rest), tuple(validation), tuple(test), score)


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(torch_seed(seed, purpose) >> 1)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the texts of {path.parent.name} are needed, but there is no {path}; put CL_Benchmark's there"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}; put a whole copy there") from error


def _number(text: str) -> float:
    return float(text) if _is_number(text) else 0.0


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
