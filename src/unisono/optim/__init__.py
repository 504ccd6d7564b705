"""Optimizers for large batches, and what any optimizer needs to be exact over blocks: class, state, rates, clipping."""

from unisono.optim.kfac import KFAC
from unisono.optim.lamb import LAMB
from unisono.optim.lars import LARS
from unisono.optim.newton import GIANT, NewtonCG

__all__ = ["GIANT", "KFAC", "LAMB", "LARS", "NewtonCG"]
