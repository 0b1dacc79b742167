"""Many runs as one compiled program."""

from perennial.population.lanes import Lane, LaneState
from perennial.population.population import METRICS, Population

__all__ = ["METRICS", "Lane", "LaneState", "Population"]
