"""Many runs as one compiled program."""

from perennial.population.lanes import Lane, LaneState
from perennial.population.population import MEASURED, Population

__all__ = ["MEASURED", "Lane", "LaneState", "Population"]
