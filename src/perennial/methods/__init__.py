"""What keeps a network plastic: optimizer rules and interventions, one file a method.

To add one, write its file and add its class to :data:`REGISTRY`.
"""

from perennial.methods.ada_upgd import AdaUPGD
from perennial.methods.adam import Adam
from perennial.methods.base import Context, Intervention, Method, Outcome, Regulariser, Rule, Scalar
from perennial.methods.continual_backprop import ContinualBackprop
from perennial.methods.dash import DASH
from perennial.methods.ewc import EWC
from perennial.methods.fire import FIRE
from perennial.methods.hare_and_tortoise import HareAndTortoise
from perennial.methods.l1_init import L1Init
from perennial.methods.l2_init import L2Init
from perennial.methods.mas import MAS
from perennial.methods.normalize_and_project import NormalizeAndProject
from perennial.methods.parseval import Parseval
from perennial.methods.pgd import PGD
from perennial.methods.redo import ReDo
from perennial.methods.regrama import ReGraMa
from perennial.methods.reset_layers import ResetLayers
from perennial.methods.rigl import RigL
from perennial.methods.rwalk import RWalk
from perennial.methods.self_normalized_resets import SelfNormalizedResets
from perennial.methods.set import SET
from perennial.methods.sgd import SGD
from perennial.methods.shrink_and_perturb import ShrinkAndPerturb
from perennial.methods.spectral_regularisation import SpectralRegularisation
from perennial.methods.synaptic_intelligence import SynapticIntelligence
from perennial.methods.upgd import UPGD
from perennial.methods.utility_quality import UtilityQuality
from perennial.methods.wasserstein_init import WassersteinInit
from perennial.methods.weight_clipping import WeightClipping

REGISTRY: tuple[type[Method], ...] = (
    SGD,
    Adam,
    UPGD,
    AdaUPGD,
    PGD,
    EWC,
    MAS,
    SynapticIntelligence,
    RWalk,
    L2Init,
    L1Init,
    WassersteinInit,
    Parseval,
    SpectralRegularisation,
    WeightClipping,
    ShrinkAndPerturb,
    NormalizeAndProject,
    ResetLayers,
    HareAndTortoise,
    DASH,
    FIRE,
    ContinualBackprop,
    ReDo,
    ReGraMa,
    SelfNormalizedResets,
    SET,
    RigL,
)

PROBES: tuple[type[Intervention], ...] = (UtilityQuality,)
"""Interventions that change nothing and measure something."""

__all__ = [
    "DASH",
    "EWC",
    "FIRE",
    "MAS",
    "PGD",
    "PROBES",
    "REGISTRY",
    "SET",
    "SGD",
    "UPGD",
    "AdaUPGD",
    "Adam",
    "Context",
    "ContinualBackprop",
    "HareAndTortoise",
    "Intervention",
    "L1Init",
    "L2Init",
    "Method",
    "NormalizeAndProject",
    "Outcome",
    "Parseval",
    "RWalk",
    "ReDo",
    "ReGraMa",
    "Regulariser",
    "ResetLayers",
    "RigL",
    "Rule",
    "Scalar",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
    "SpectralRegularisation",
    "SynapticIntelligence",
    "UtilityQuality",
    "WassersteinInit",
    "WeightClipping",
]
