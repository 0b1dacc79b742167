"""Trainability: the direct test of plasticity. Given something new to learn, how do weights do against fresh ones?

Dead units, ranks and norms are signs of it; this is the thing itself. Every seed has a pair of networks, one with the
weights in question and one with fresh ones, that learn the same targets from the same batches. All pairs run side by
side in one vectorised step, on a copy: the user's model is left as it was.
"""

from perennial.trainability.compare import trainability, warm_start_gap
from perennial.trainability.results import Learning, Paired, Trainability, WarmStartGap

__all__ = ["Learning", "Paired", "Trainability", "WarmStartGap", "trainability", "warm_start_gap"]
