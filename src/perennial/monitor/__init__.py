"""Is this network losing plasticity? Readings while it is trained, and what they say in words."""

from perennial.monitor.findings import THRESHOLDS, Finding, Threshold
from perennial.monitor.monitor import DEFAULT, Monitor
from perennial.monitor.reading import Reading

__all__ = ["DEFAULT", "THRESHOLDS", "Finding", "Monitor", "Reading", "Threshold"]
