"""FlashAttention 3 and 4, where the user has built or installed them. We could not run 3."""

from __future__ import annotations

import torch

from .kernel import HALF, AttentionKernel, needs


def _attend(module: str):
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        import importlib

        function = importlib.import_module(module).flash_attn_func
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=False)
        out = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp, too
        return out.transpose(1, 2)  # [B, S, H, D] to [B, H, S, D]

    return attend


KERNELS = (
    AttentionKernel(
        "flash3", HALF, _attend("flash_attn_interface"), needs((9, 0), (10, 0), "flash_attn_interface"),
        package="flash_attn_interface",
    ),
    AttentionKernel(
        "flash4", HALF, _attend("flash_attn.cute"), needs((9, 0), None, "flash_attn.cute"), package="flash_attn.cute",
        any_length=True, slow_start=True,  # its compiler takes 7 s to be imported, and 2 s for the first call
    ),
)  # fmt: skip
