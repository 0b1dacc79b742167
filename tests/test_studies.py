"""Studies: what ships, what a file says, and every mistake named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from perennial.studies import (
    StudyError,
    as_yaml,
    load,
    parse_setting,
    same_settings,
    seeds_of,
    shipped,
    stream_of,
    variants_of,
)

GOOD = """\
stream: {name: permuted_digits}
network: {name: mlp, hidden: [8]}
steps: 400
bin: 100
seeds: 2
methods:
  backprop:
    rule: {name: sgd, lr: 1e-2}
  keeper:
    rule: {name: sgd, lr: [0.1, 0.01]}
    interventions:
      continual_backprop: {replacement_rate: [1e-3, 1e-4], bias_correction: true}
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_study_is_sound_and_survives_its_own_yaml(name: str, tmp_path: Path) -> None:
    study = load(name)
    assert study.title
    assert study.description
    assert study.source
    again = load(written(tmp_path, as_yaml(study)))
    assert again.model_dump(exclude={"name"}) == study.model_dump(exclude={"name"})


def test_the_regression_study_is_the_papers() -> None:
    part = load("nature/slowly-changing-regression").parts["main"]
    stream = stream_of(part, "main")
    assert (stream.inputs, stream.task_length(), stream.outputs) == (20, 10_000, 1)
    assert stream.slow_bits == 15  # type: ignore[attr-defined]
    assert stream.flip == "one"  # type: ignore[attr-defined]
    assert stream.target_units == 100  # type: ignore[attr-defined]
    assert (part.steps, seeds_of(part, "")) == (1_000_000, list(range(30)))
    networks = {v.method: v.network for v in variants_of(part, "main", "")}
    assert networks["backprop"].hidden == (5,)  # type: ignore[union-attr]
    assert networks["linear"].name == "linear"


def test_a_list_is_a_grid(tmp_path: Path) -> None:
    part = load(written(tmp_path, GOOD)).parts["main"]
    variants = variants_of(part, "main", "parts.main")
    assert [v.method for v in variants] == ["backprop"] + ["keeper"] * 4
    assert variants[0].rule.lr == 0.01  # type: ignore[attr-defined]  # YAML reads 1e-2 as text
    assert {(v.rule.lr, v.interventions[0].replacement_rate) for v in variants[1:]} == {  # type: ignore[attr-defined]
        (lr, rate) for lr in (0.1, 0.01) for rate in (1e-3, 1e-4)
    }
    assert variants[1].settings == "rule.lr=0.1, interventions.continual_backprop.replacement_rate=0.001"


def test_a_grid_of_networks(tmp_path: Path) -> None:
    part = load(written(tmp_path, GOOD), {"network.hidden": [[4], [8, 8]]}).parts["main"]
    hidden = [v.network.hidden for v in variants_of(part, "main", "") if v.method == "backprop"]  # type: ignore[union-attr]
    assert hidden == [(4,), (8, 8)]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=1000", "steps", 1000),
        ("a.b=1,2", "a.b", [1, 2]),
        ("a.b=[1, 2]", "a.b", [1, 2]),
        ("a=tanh,relu", "a", ["tanh", "relu"]),
        ("a=true", "a", True),
    ],
)
def test_settings_from_the_command_line(text: str, key: str, value: object) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["steps", "=1", "steps=", "a=[1"])
def test_unreadable_settings(text: str) -> None:
    with pytest.raises(StudyError, match="--set"):
        parse_setting(text)


def test_changes_reach_every_part_or_one() -> None:
    study = load("demo", {"seeds": 3, "digits.seeds": 2})
    assert {k: p.seeds for k, p in study.parts.items()} == {"regression": 3, "digits": 2}


MISTAKES = [
    ("steps: 400", "stepz: 400", "mine.yaml, line 3", "did you mean 'steps'?"),
    ("steps: 400", "steps: 0", "line 3", "greater than 0"),
    ("steps: 400", "steps: many", "line 3", "integer"),
    ("bin: 100", "bin: 500", "line 4", "longer than the run of 400 steps"),
    ("bin: 100", "bin: 100\nmeasure_every: 150", "line 5", "multiple of bin"),
    ("bin: 100", "bin: 100\nmeasures: [rank_98]", "line 5", "did you mean 'rank_99'"),
    ("bin: 100", "bin: 100\nmeasures: [stable_rank]", "line 5", "call stable rank is rank_99"),
    ("bin: 100", "bin: 100\njudged_by: dead_unit", "line 5", "did you mean 'dead_units'?"),
    ("bin: 100", "bin: 100\ndtype: float16", "line 5", "float64"),
    ("seeds: 2", "seeds: 0", "line 5", "at least one seed"),
    ("seeds: 2", "seeds: []", "line 5", "at least one seed"),
    ("seeds: 2", "seeds: [1, 1]", "line 5", "different"),
    ("permuted_digits", "permutted_digits", "line 1", "did you mean 'permuted_digits'?"),
    ("name: mlp", "name: mpl", "line 2", "did you mean 'mlp'?"),
    ("hidden: [8]", "hidden: 8", "line 2", "it is a list"),
    ("hidden: [8]", "hidden: [0]", "line 2", "at least 1"),
    ("hidden: [8]", "activation: rellu", "line 2", "relu"),
    ("{name: sgd, lr: 1e-2}", "{name: sgdd}", "line 8", "did you mean 'sgd'?"),
    ("{name: sgd, lr: 1e-2}", "{lr: 1e-2}", "line 8", "does not say which optimizer rule"),
    ("lr: 1e-2", "lrr: 1e-2", "line 8", "did you mean 'lr'?"),
    ("lr: 1e-2", "lr: -1", "line 8", "at least 0"),
    ("lr: 1e-2", "lr: fast", "line 8", "not a number"),
    ("lr: 1e-2", "lr: .nan", "line 8", "sgd.lr is nan"),
    ("lr: [0.1, 0.01]", "lr: []", "line 10", "at least one value"),
    ("continual_backprop:", "continual_backprob:", "line 11", "did you mean 'continual_backprop'?"),
    ("bias_correction: true", "bias_correction: 3", "line 12", "it is bool"),
    ("bias_correction: true", "utility: best", "line 12", "contribution"),
    ("steps: 400", "steps: 400\nsteps: 500", "line 4", "a second time"),
    ("methods:", "methods: {}\nother:", "line 6", "at least 1"),
    ("stream: {name: permuted_digits}", "title: x", "stream", "missing"),
    ("steps: 400", "steps: [", "mine.yaml", "not YAML"),
    ("steps: 400", "steps: 400\nfigure: {title: x}", "line 4", "'panels' is missing"),
    ("steps: 400", "steps: 400\nfigure: {title: x, axes: tasks, panels: [{}]}", "line 4", "did you mean 'axis'?"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{metrik: dead_units}]}", "line 4", "'metric'?"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{metric: dead_unit}]}", "line 4", "'dead_units'?"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{part: man}]}", "line 4", "did you mean 'main'?"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{methods: [keper]}]}", "line 4", "'keeper'?"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{part: main, lines: parts}]}", "line 4", "leave it out"),
    ("steps: 400", "steps: 400\nfigure: {title: x, panels: [{methods: []}]}", "line 4", "at least 1"),
]


@pytest.mark.parametrize(("right", "wrong", "place", "words"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_mistakes_are_named_with_their_place(right: str, wrong: str, place: str, words: str, tmp_path: Path) -> None:
    assert right in GOOD
    with pytest.raises(StudyError) as caught:
        load(written(tmp_path, GOOD.replace(right, wrong, 1)))
    assert place in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ("demoo", {}, "did you mean 'demo'?"),
        ("no/such.yaml", {}, "cannot be read"),
        ("demo", {"stepps": 3}, "did you mean 'steps'?"),
        ("demo", {"methods.adm.rule.lr": 3}, "did you mean 'adam'?"),
        ("demo", {"digits.methods.adam.rule.lr": -3}, "at least 0"),
    ],
)
def test_mistakes_on_the_command_line(source: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(StudyError) as caught:
        load(source, changes)
    assert words in str(caught.value)


def test_a_study_that_builds_on_another(tmp_path: Path) -> None:
    base = written(tmp_path, GOOD)
    text = f"title: Mine\nstudy: {base}\nmethods: [keeper]\nset: {{steps: 800, network.hidden: [4]}}\n"
    first = written(tmp_path, text, "first.yaml")
    part = load(first).parts["main"]
    assert (part.steps, part.bin, part.network["hidden"], list(part.methods)) == (800, 100, [4], ["keeper"])
    assert load(first).title == "Mine"
    # on a study that itself builds on another
    second = written(tmp_path, f"study: {first}\nset: {{seeds: 5}}\n", "second.yaml")
    part = load(second, {"bin": 200}).parts["main"]
    assert (part.steps, part.bin, part.seeds, list(part.methods)) == (800, 200, 5, ["keeper"])
    third = written(tmp_path, f"parts:\n  one:\n    study: {second}\n    seeds: 1\n", "third.yaml")  # and as a part
    assert load(third).parts["one"].steps == 800
    assert load(base).parts["main"].steps == 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("study: BASE\nsteps: 800", ("line 2", "'steps' is not a key of a study that builds on another", "under set")),
        ("study: BASE\nset: {stepz: 800}", ("line 2: set.stepz", "did you mean 'steps'?")),
        ("study: BASE\nset: {steps: 0}", ("line 2: set.steps", "greater than 0")),
        ("study: BASE\nset: {methods.keeper.rule.lr: -1}", ("line 2: set.methods.keeper.rule.lr", "at least 0")),
        ("study: BASE\nset: [1]", ("line 2", "it holds settings of")),
        ("study: BASE\nmethods: [keper]", ("line 2: methods", "did you mean 'keeper'?")),
        ("study: BASE\nmethods: {keeper: {}}", ("line 2", "a list of names to keep")),
        ("study: BASE\nmethods: []", ("line 2", "known: backprop, keeper")),
        ("study: demoo", ("did you mean 'demo'?",)),
        ("study: SELF", ("a study builds on itself",)),
        ("parts:\n  one: {study: SELF}", ("a study builds on itself",)),
        ("parts:\n  one: {study: demo}", ("has parts itself",)),
        ("parts:\n  one: {study: lm/order1}", ("a study of another kind",)),
    ],
)
def test_mistakes_in_building_on_another(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    base = written(tmp_path, GOOD)
    text = text.replace("BASE", base).replace("SELF", str(tmp_path / "built.yaml"))
    with pytest.raises(StudyError) as caught:
        load(written(tmp_path, text, "built.yaml"))
    for word in words:
        assert word in str(caught.value)


def test_only_some_methods() -> None:
    digits = load("demo").parts["digits"]
    only = load("demo", methods=["adam"])
    assert list(only.parts["digits"].methods) == ["adam"]
    assert only.parts["digits"].methods["adam"] == digits.methods["adam"]
    both = load("nature/slippery-ant", methods=["l2", "standard"]).control.methods
    assert list(both) == ["standard", "l2"]  # in the study's order
    assert list(load("lm/order1", methods=["nlora"]).texts.methods) == ["nlora"]
    with pytest.raises(StudyError, match="--methods: the study has no method 'adm'; did you mean 'adam'"):
        load("demo", methods=["adm"])
    with pytest.raises(StudyError, match="does not compare methods by name"):
        load("tickets/lenet-mnist", methods=["sgd"])


def test_a_figure_keeps_what_is_left_to_show(tmp_path: Path) -> None:
    panels = "[{methods: [keeper], lines: settings}, {methods: [backprop]}, {}]"
    base = written(tmp_path, GOOD + f"figure:\n  title: x\n  panels: {panels}\n")
    whole = load(base).figure
    assert whole is not None
    with pytest.raises(StudyError, match="panels is 5"):
        load(written(tmp_path, GOOD + "figure: {title: x, panels: 5}\n", "wrong.yaml"), methods=["backprop"])
    assert [panel.methods for panel in whole.panels] == [["keeper"], ["backprop"], None]
    some = load(base, methods=["backprop"]).figure
    assert some is not None
    assert [panel.methods for panel in some.panels] == [["backprop"], None]
    built = load(written(tmp_path, f"study: {base}\nset: {{figure.title: y}}\n", "built.yaml")).figure
    assert built is not None
    assert (built.title, len(built.panels)) == ("y", 3)
    rates = load("nature/permuted-mnist-methods", methods=["adam"]).figure
    assert rates is not None
    assert [panel.title for panel in rates.panels] == ["Adam"]
    assert load("nature/continual-imagenet", methods=["l2"]).figure.panels[0].part == "methods"  # type: ignore[union-attr]


TWO = """\
figure:
  title: x
  panels: [{title: one, lines: settings}, {part: two}, {lines: parts}]
parts:
  one:
    stream: {name: permuted_digits}
    network: {name: mlp, hidden: [8]}
    steps: 400
    bin: 100
    seeds: 2
    methods: {backprop: {rule: {name: sgd}}}
  two:
    stream: {name: slowly_changing_regression}
    network: {name: mlp, hidden: [8]}
    steps: 400
    bin: 100
    seeds: 2
    methods: {adam: {rule: {name: adam}}}
"""


def test_a_panel_goes_with_its_part_and_has_one_metric(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"one by online_accuracy, two by online_loss\); add metric"):
        load(written(tmp_path, TWO))
    path = written(tmp_path, TWO.replace("{lines: parts}", "{metric: dead_units, lines: parts}"))
    assert len(load(path).figure.panels) == 3  # type: ignore[union-attr]
    left = load(path, methods=["adam"]).figure
    assert left is not None
    assert [(panel.title, panel.part, panel.lines) for panel in left.panels] == [
        ("", "two", "methods"),
        ("", None, "parts"),
    ]
    wrong = written(tmp_path, TWO.replace("{part: two}", "{part: [two]}"), "wrong.yaml")
    with pytest.raises(StudyError, match="part is "):
        load(wrong, methods=["adam"])


def test_only_words_and_pictures_may_differ_for_one_to_go_on() -> None:
    one = as_yaml(load("nature/permuted-mnist-small"))
    assert same_settings(one, one)
    assert same_settings(one, one.replace("title: As in the paper", "title: Not as in the paper"))
    assert same_settings(one, as_yaml(load("nature/permuted-mnist-small", {"description": "other", "figure": None})))
    assert not same_settings(one, one.replace("steps: 600000", "steps: 600001"))
    assert not same_settings(one, "")
    assert not same_settings("{", one)
    assert not same_settings("{", "[")
    turned = yaml.safe_load(one)
    turned["parts"]["main"]["methods"] = dict(reversed(turned["parts"]["main"]["methods"].items()))
    assert not same_settings(one, yaml.safe_dump(turned, sort_keys=False))  # lanes are kept by their place


def test_yaml_is_plain() -> None:
    assert yaml.safe_load(as_yaml(load("demo")))["parts"]["digits"]["stream"] == {"name": "permuted_digits"}
