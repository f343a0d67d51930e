"""Attention as one opaque operation, so that torch.compile neither looks into a kernel nor breaks its graph there."""

from __future__ import annotations

import torch

from . import KERNELS


def attend_flat(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Run a kernel.

    Args:
        kernel: its name.
        q: [B, num_heads, seq_len, head_dim].
        k: of the same shape, or of more tokens, see `AttentionKernel.any_length`.
        v: as `k`.

    Returns:
        [B, seq_len, num_heads * head_dim].
    """
    if torch.compiler.is_compiling():
        # kernels lay their result out as q is: [B, seq_len, num_heads, head_dim] needs no copy to become flat
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.ops.ark.attention(q, k, v, kernel)
    return _run(q, k, v, kernel)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> torch.Tensor:
    return KERNELS[kernel].attend(q, k, v).transpose(1, 2).flatten(2)


# the oldest torch that has this reads no annotations that are text
@torch.library.custom_op(
    "ark::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, str kernel) -> Tensor"
)
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> torch.Tensor:
    out = _run(q, k, v, kernel).contiguous()
    return out.clone() if out.data_ptr() in (q.data_ptr(), k.data_ptr(), v.data_ptr()) else out


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
