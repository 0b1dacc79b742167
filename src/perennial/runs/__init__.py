"""Run directories, results, resume, workers."""

from perennial.runs.execute import Interrupted, execute
from perennial.runs.plan import Job, make_plan
from perennial.storage import RunError

__all__ = ["Interrupted", "Job", "RunError", "execute", "make_plan"]
