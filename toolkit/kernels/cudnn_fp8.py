"""cuDNN's attention in fp8, through the package nvidia-cudnn-frontend. Lossy: q, k, v, the probabilities and the result are.

The result is a mean of v's rows, so what v is scaled by is enough room for it, too.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any

import torch

from ..fused.matrix import Scaled
from .kernel import HALF, AttentionKernel, needs

PROBABILITIES = (
    256.0  # what they are multiplied with, so that small ones are normal numbers in fp8, too
)
SCALES = "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"
_plans: dict[
    tuple, _Plan
] = {}  # none is given up: recordings go on using its kernel and its numbers
_handles: dict[torch.device, Any] = {}
_lock = threading.RLock()
atexit.register(_plans.clear)  # before the package's own end, which complains of what is left


class _Plan:
    """What cuDNN prepared for tensors of one shape.

    Args:
        q: [B, num_heads, seq_len, head_dim] float8_e4m3fn.
        k: as q, perhaps of another length.
        v: as k.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        import cudnn

        self.cudnn = cudnn
        if q.device not in _handles:
            _handles[q.device] = cudnn.create_handle()
        fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self.graph = graph = cudnn.pygraph(
            io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handles[q.device]
        )  # fmt: skip

        def tensor(name: str, like: torch.Tensor | None = None) -> Any:
            shape, stride = (like.shape, like.stride()) if like is not None else ([1] * 4, [1] * 4)
            kind = fp32 if like is None else fp8
            return graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=kind)

        self.data = {name: tensor(name, like) for name, like in zip("qkv", (q, k, v), strict=True)}
        self.scales = {name: tensor(name) for name in SCALES}
        self.out, _, *self.largest = graph.sdpa_fp8(
            **self.data, **self.scales, attn_scale=q.shape[-1] ** -0.5, generate_stats=False
        )
        self.out.set_output(True).set_dim(list(q.shape)).set_stride(list(torch.empty_like(q).stride())).set_data_type(fp8)  # fmt: skip
        for item in self.largest:  # which it insists on telling
            item.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self.probabilities = torch.tensor([1 / PROBABILITIES, PROBABILITIES], device=q.device)

    def __call__(self, *qkv: Scaled) -> Scaled:
        device, out = qkv[0].data.device, torch.empty_like(qkv[0].data)
        scale = qkv[2].scale  # of v and of the result
        numbers = [*(x.scale[:1] for x in qkv), *self.probabilities.split(1), scale[1:]]
        given = dict(zip(self.data.values(), (x.data for x in qkv), strict=True))
        given |= dict(zip(self.scales.values(), numbers, strict=True))
        given |= {item: torch.empty(1, device=device) for item in self.largest}
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=device)  # fmt: skip
        stream, handle = torch.cuda.current_stream(device).cuda_stream, _handles[device]
        self.cudnn.set_stream(handle=handle, stream=stream)
        self.graph.execute({**given, self.out: out}, workspace, handle=handle)
        return Scaled(out, scale)


def _attend_fp8(q: Scaled, k: Scaled, v: Scaled) -> Scaled:
    key = tuple((x.data.shape, x.data.stride(), x.data.device) for x in (q, k, v))
    with _lock, torch.cuda.device(q.data.device):  # a handle's stream is set anew for each call
        if key not in _plans:
            _plans[key] = _Plan(q.data, k.data, v.data)
        return _plans[key](q, k, v)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from ..fused.to_fp8 import to_fp8, widen

    return widen(_attend_fp8(*map(to_fp8, (q, k, v))), q.dtype)


KERNELS = (
    AttentionKernel(
        "cudnn_fp8", HALF, _attend, needs((9, 0), None, "cudnn", "triton"), lossy=True, head_dims=(64, 128), package="cudnn",
        attend_fp8=_attend_fp8,
    ),
)  # fmt: skip
