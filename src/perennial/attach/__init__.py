"""A method on a user's own model and optimizer: hooks, never a wrapper."""

from perennial.attach.keeper import Keeper, attach

__all__ = ["Keeper", "attach"]
