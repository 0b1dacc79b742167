"""What keeps a network plastic: optimizer rules and interventions, one file a method.

To add one, write its file and add its class to :data:`REGISTRY`.
"""

from perennial.methods.adam import Adam
from perennial.methods.base import Context, Intervention, Method, Rule, Scalar
from perennial.methods.continual_backprop import ContinualBackprop
from perennial.methods.sgd import SGD
from perennial.methods.shrink_and_perturb import ShrinkAndPerturb
from perennial.methods.upgd import UPGD

REGISTRY: tuple[type[Method], ...] = (
    SGD,
    Adam,
    UPGD,
    ShrinkAndPerturb,
    ContinualBackprop,
)

__all__ = [
    "REGISTRY",
    "SGD",
    "UPGD",
    "Adam",
    "Context",
    "ContinualBackprop",
    "Intervention",
    "Method",
    "Rule",
    "Scalar",
    "ShrinkAndPerturb",
]
