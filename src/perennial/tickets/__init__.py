"""Lottery tickets: subnetworks that train as well as the whole, how they are found, and what they are compared with."""

from perennial.tickets.connectivity import ConnectivityResult, instability, linear_path
from perennial.tickets.control import CONTROLS, controls, random_like, run_control
from perennial.tickets.dominant import (
    ProximalL1,
    bias_names,
    l1_distance,
    lora_rank_for,
    magnitude_like,
    random_dimensions_like,
    select_ticket,
)
from perennial.tickets.find import Level, Pruning, Stage, Ticket, find_ticket
from perennial.tickets.masks import Enforced, Masks, check_masks, enforce, prunable, remaining, whole
from perennial.tickets.networks import NETWORKS
from perennial.tickets.overlap import Overlap, Shared, Sparsity, jaccard, sparsity
from perennial.tickets.prune import remaining_weights, select, shares
from perennial.tickets.scores import SCORES, Evidence, prune_at_start
from perennial.tickets.sparse_delta import Changed, SparseDelta
from perennial.tickets.sparse_mlp import Examples, SparseMLPs, mlp_layers
from perennial.tickets.supermask import Supermask
from perennial.tickets.training import Data, Split, Training, fit

__all__ = [
    "CONTROLS",
    "NETWORKS",
    "SCORES",
    "Changed",
    "ConnectivityResult",
    "Data",
    "Enforced",
    "Evidence",
    "Examples",
    "Level",
    "Masks",
    "Overlap",
    "ProximalL1",
    "Pruning",
    "Shared",
    "SparseDelta",
    "SparseMLPs",
    "Sparsity",
    "Split",
    "Stage",
    "Supermask",
    "Ticket",
    "Training",
    "bias_names",
    "check_masks",
    "controls",
    "enforce",
    "find_ticket",
    "fit",
    "instability",
    "jaccard",
    "l1_distance",
    "linear_path",
    "lora_rank_for",
    "magnitude_like",
    "mlp_layers",
    "prunable",
    "prune_at_start",
    "random_dimensions_like",
    "random_like",
    "remaining",
    "remaining_weights",
    "run_control",
    "select",
    "select_ticket",
    "shares",
    "sparsity",
    "whole",
]
