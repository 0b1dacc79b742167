"""Continual fine-tuning of language models, on stock transformers and peft (the extra ``lm``)."""

from typing import TYPE_CHECKING, Any

from perennial.lm.data import (
    ORDERS,
    Example,
    TextTask,
    from_dataset,
    normalised,
    read_cl_benchmark,
    read_glue,
    read_task,
)
from perennial.lm.dominant import CONTROLS, DominantTickets, Selection, overlaps, run_dominant
from perennial.lm.factors import Factors, Pair, pairs_of
from perennial.lm.measures import (
    Collision,
    Continual,
    adapter_measures,
    collision,
    continual,
    relative_threshold,
    row_overlap,
    update_cosine,
)
from perennial.lm.models import Asked, Causal, Encoder, ModelError, Reader, Seq2Seq, bundled_model, load_model
from perennial.lm.penalties import (
    PENALTIES,
    ElasticWeights,
    L2Update,
    NLoRA,
    NuclearNorm,
    OLoRA,
    Penalty,
    PenaltyMixin,
)
from perennial.lm.stream import Adapters, Recipe, TextStream, TextTraining

if TYPE_CHECKING:
    from perennial.lm.learn import run_stream, stack_measures, train
    from perennial.lm.stack import AdapterStack

__all__ = [
    "CONTROLS",
    "ORDERS",
    "PENALTIES",
    "AdapterStack",
    "Adapters",
    "Asked",
    "Causal",
    "Collision",
    "Continual",
    "DominantTickets",
    "ElasticWeights",
    "Encoder",
    "Example",
    "Factors",
    "L2Update",
    "ModelError",
    "NLoRA",
    "NuclearNorm",
    "OLoRA",
    "Pair",
    "Penalty",
    "PenaltyMixin",
    "Reader",
    "Recipe",
    "Selection",
    "Seq2Seq",
    "TextStream",
    "TextTask",
    "TextTraining",
    "adapter_measures",
    "bundled_model",
    "collision",
    "continual",
    "from_dataset",
    "load_model",
    "normalised",
    "overlaps",
    "pairs_of",
    "read_cl_benchmark",
    "read_glue",
    "read_task",
    "relative_threshold",
    "row_overlap",
    "run_dominant",
    "run_stream",
    "stack_measures",
    "train",
    "update_cosine",
]


def __getattr__(name: str) -> Any:
    """What stands on peft and transformers is imported when it is first asked for: studies are read without them."""
    if name == "AdapterStack":
        from perennial.lm.stack import AdapterStack

        return AdapterStack
    if name in ("run_stream", "stack_measures", "train"):
        from perennial.lm import learn

        return getattr(learn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
