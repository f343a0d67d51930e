"""The Triton kernels under the names of `reference.py`; importing this needs Triton."""

from .attend_causal import attend_causal
from .colours import from_colours, to_colours
from .gated import gated, within
from .group_norm import add, factors, interleave, moments, normed
from .modulate import modulate
from .norm_rotate import norm_rotate
from .quantise import quantise
from .randn import compile_randn, jump, normal
from .softmax import softmax
from .swiglu import swiglu
from .text import add_norm, norm_turn
from .to_fp8 import to_fp8, widen

__all__ = ["add", "add_norm", "attend_causal", "compile_randn", "factors", "from_colours", "gated", "interleave", "jump", "modulate", "moments", "norm_rotate", "norm_turn", "normal", "normed", "quantise", "softmax", "swiglu", "to_colours", "to_fp8", "widen", "within"]  # fmt: skip
