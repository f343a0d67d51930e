"""The Triton kernels under the names of `reference.py`; importing this needs Triton."""

from .modulate import modulate
from .norm_rotate import norm_rotate
from .quantise import quantise
from .swiglu import swiglu
from .text import add_norm, norm_turn

__all__ = ["add_norm", "modulate", "norm_rotate", "norm_turn", "quantise", "swiglu"]
