"""The kernels that torch brings along, each called by its own name.

Choosing one by `sdpa_kernel` would be the same for one thread, but its setting is the whole process's: attention of other
threads would find no kernel meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..hardware import Hardware
from .kernel import ALL_FLOATS, HALF, Attend, AttentionKernel, needs

ANY_HEAD_DIM = tuple(range(8, 257, 8))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]


def attend_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in plain torch operations; see `AttentionKernel.attend`."""
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0]


def _of_torch(
    name: str, dtypes: tuple[torch.dtype, ...], attend: Attend, unavailable: Callable[[Hardware], str | None],
    head_dims: tuple[int, ...] = ANY_HEAD_DIM,
) -> AttentionKernel:  # fmt: skip
    return AttentionKernel(name, dtypes, attend, unavailable, head_dims=head_dims, any_length=True)


KERNELS = (
    _of_torch("cudnn", HALF, _cudnn, needs((8, 0)), (64, 128)),
    _of_torch("flash", HALF, _flash, needs((8, 0))),
    _of_torch("efficient", ALL_FLOATS, _efficient, needs((5, 0))),
    _of_torch("math", ALL_FLOATS, attend_math, lambda hardware: None),
)
