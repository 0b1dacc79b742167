"""Classes that arrive: ordinary training in PyTorch on more and more of them, with :func:`perennial.attach`."""

from typing import TYPE_CHECKING, Any

from perennial.incremental.classes import Parts, class_order, divided
from perennial.incremental.setting import ArrivingClasses, ImageRecipe, ImageTraining

if TYPE_CHECKING:
    from perennial.incremental.learn import run_arriving

__all__ = ["ArrivingClasses", "ImageRecipe", "ImageTraining", "Parts", "class_order", "divided", "run_arriving"]


def __getattr__(name: str) -> Any:
    """What trains is imported when it is first asked for: studies are read without it."""
    if name == "run_arriving":
        from perennial.incremental.learn import run_arriving

        return run_arriving
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
