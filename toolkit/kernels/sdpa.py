"""The kernels that torch brings along."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernel import ALL_FLOATS, HALF, Attend, AttentionKernel, needs

ANY_HEAD_DIM = tuple(range(8, 257, 8))


def _attend(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


KERNELS = (
    AttentionKernel("cudnn", HALF, _attend(SDPBackend.CUDNN_ATTENTION), needs((8, 0)), head_dims=(64, 128)),
    AttentionKernel("flash", HALF, _attend(SDPBackend.FLASH_ATTENTION), needs((8, 0)), head_dims=ANY_HEAD_DIM),
    AttentionKernel("efficient", ALL_FLOATS, _attend(SDPBackend.EFFICIENT_ATTENTION), needs((5, 0)), head_dims=ANY_HEAD_DIM),
    AttentionKernel("math", ALL_FLOATS, _attend(SDPBackend.MATH), lambda hardware: None, head_dims=ANY_HEAD_DIM),
)  # fmt: skip
