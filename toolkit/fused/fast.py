"""The Triton kernels under the names of `reference.py`; importing this needs Triton."""

from .modulate import modulate
from .norm_rotate import norm_rotate
from .quantise import quantise
from .swiglu import swiglu

__all__ = ["modulate", "norm_rotate", "quantise", "swiglu"]
