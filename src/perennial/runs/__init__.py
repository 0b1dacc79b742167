"""Run directories, results, resume, workers."""

from perennial.runs.directory import RunError
from perennial.runs.execute import Interrupted, execute
from perennial.runs.plan import Job, make_plan

__all__ = ["Interrupted", "Job", "RunError", "execute", "make_plan"]
