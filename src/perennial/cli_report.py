"""The report of a run directory, whatever kind of study it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars
import yaml

from perennial import report
from perennial.storage import read_json
from perennial.studies import (
    ArrivingStudy,
    ControlStudy,
    DominantStudy,
    OtherStudy,
    Study,
    TextStudy,
    TicketStudy,
    load,
)


def write_report(directory: Path) -> Path:
    """Write ``report.html``, figures and tables into a run directory; the path of the page.

    Raises:
        NotARunDirectoryError: the directory holds no run.
        NoResultsError: the run has no results yet.
    """
    study = _other(directory)
    if study is None:
        return report.write_report(directory)
    command = str((read_json(directory / "environment.json") or {}).get("command", ""))
    text = (directory / "study.yaml").read_text()
    words = {name: getattr(study, name) for name in ("title", "description", "source")}
    words |= {"command": command, "study_text": text}
    if isinstance(study, TextStudy | DominantStudy):
        from perennial.report import lm_page

        if isinstance(study, TextStudy):
            return lm_page.write_text_report(study.texts, directory, **words)
        return lm_page.write_dominant_report(study.dominant, directory, **words)
    if isinstance(study, ArrivingStudy):
        from perennial.report.incremental_page import write_arriving_report

        return write_arriving_report(study.arriving, directory, **words)
    if isinstance(study, TicketStudy):
        from perennial.report.tickets_page import write_ticket_report

        return write_ticket_report(study.tickets, directory, **words)
    if isinstance(study, ControlStudy):
        from perennial.report.control_page import write_control_report

        return write_control_report(study.control, directory, **words)
    from perennial.report.supply_page import write_supply_report

    return write_supply_report(study, directory, command=command, study_text=text)


def write_film(directory: Path) -> list[Path]:
    """Draw what the agents of a study of control do, as strips of frames; their files.

    Raises:
        ValueError: the directory holds a run of another kind of study.
        RunError: there is no agent yet, or no off-screen rendering works here.
    """
    study = _other(directory)
    if not isinstance(study, ControlStudy):
        raise ValueError(f"--film is of studies of control, and {directory} holds none; leave it out")
    from perennial.runs.control import film

    return film(study.control, directory)


def summary_table(directory: Path) -> polars.DataFrame:
    """The report's table in short, as text to print."""
    study = _other(directory)
    if study is None:
        return report.summary_table(directory)
    if isinstance(study, TextStudy | DominantStudy):
        from perennial.report import lm_page

        if isinstance(study, TextStudy):
            return lm_page.text_summary(study.texts, directory)
        return lm_page.dominant_summary(study.dominant, directory)
    if isinstance(study, ArrivingStudy):
        from perennial.report.incremental_page import arriving_summary

        return arriving_summary(study.arriving, directory)
    if isinstance(study, TicketStudy):
        from perennial.report.tickets_page import ticket_summary

        return ticket_summary(study.tickets, directory)
    if isinstance(study, ControlStudy):
        from perennial.report.control_page import control_summary

        return control_summary(study.control, directory)
    from perennial.report.supply_page import supply_summary

    return supply_summary(study, directory)


def _other(directory: Path) -> OtherStudy | None:
    """The study in a run directory, if it is not made of parts."""
    try:
        tree: Any = yaml.safe_load((directory / "study.yaml").read_text())
    except (FileNotFoundError, yaml.YAMLError):
        return None  # whose report says what is wrong
    if not isinstance(tree, dict) or "parts" in tree:
        return None
    study = load(str(directory / "study.yaml"))
    return None if isinstance(study, Study) else study
