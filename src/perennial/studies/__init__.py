"""The papers' experiments, as data."""

from perennial.studies.load import OtherStudy, as_yaml, load, parse_setting, shipped
from perennial.studies.schema import (
    ControlStudy,
    DominantStudy,
    MethodEntry,
    Part,
    Study,
    StudyError,
    SupplyStudy,
    TextStudy,
    TicketStudy,
    Variant,
    factory_of,
    nearest,
    seeds_of,
    stream_of,
    variants_of,
)

__all__ = [
    "ControlStudy",
    "DominantStudy",
    "MethodEntry",
    "OtherStudy",
    "Part",
    "Study",
    "StudyError",
    "SupplyStudy",
    "TextStudy",
    "TicketStudy",
    "Variant",
    "as_yaml",
    "factory_of",
    "load",
    "nearest",
    "parse_setting",
    "seeds_of",
    "shipped",
    "stream_of",
    "variants_of",
]
