"""Which parameters belong to a hidden unit: the map, how it is traced, how its parameters were drawn."""

from perennial.units.draw import Distribution, build_and_record
from perennial.units.map import Slice, UnitLayer, UnitMap, along, bias_beside, fan_in, weight_beside
from perennial.units.observe import Nonlinearity, Observation, observe
from perennial.units.prove import Proof, prove
from perennial.units.recover import recover
from perennial.units.trace import trace

__all__ = [
    "Distribution",
    "Nonlinearity",
    "Observation",
    "Proof",
    "Slice",
    "UnitLayer",
    "UnitMap",
    "along",
    "bias_beside",
    "build_and_record",
    "fan_in",
    "observe",
    "prove",
    "recover",
    "trace",
    "weight_beside",
]
