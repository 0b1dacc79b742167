"""Many runs as one compiled program."""

from perennial.population.lanes import Lane, LaneState
from perennial.population.population import MEASURABLE, MEASURED, Population

__all__ = ["MEASURABLE", "MEASURED", "Lane", "LaneState", "Population"]
