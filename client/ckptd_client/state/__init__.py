"""The state walk and its inverse: from modules, optimizers, Stateful objects and plain values to leaves and a tree."""

from ckptd_client.state.foreign import TORCH_DECODERS, encode_torch
from ckptd_client.state.leaves import DTYPE_NAMES, TORCH_DTYPES, FenceClass, Leaf, Walk
from ckptd_client.state.naming import optimizers_in
from ckptd_client.state.plan import RestorePlan, apply_state, check_state, plan_restore
from ckptd_client.state.rng import capture_rng, restore_rng
from ckptd_client.state.walk import StateWalker, walk_state

__all__ = [
    "DTYPE_NAMES",
    "TORCH_DECODERS",
    "TORCH_DTYPES",
    "FenceClass",
    "Leaf",
    "RestorePlan",
    "StateWalker",
    "Walk",
    "apply_state",
    "capture_rng",
    "check_state",
    "encode_torch",
    "optimizers_in",
    "plan_restore",
    "restore_rng",
    "walk_state",
]
