"""Which parameters belong to a hidden unit: the map, how it is traced, how its parameters were drawn."""

from perennial.units.draw import Distribution, build_and_record
from perennial.units.map import Slice, UnitLayer, UnitMap, along
from perennial.units.trace import trace

__all__ = ["Distribution", "Slice", "UnitLayer", "UnitMap", "along", "build_and_record", "trace"]
