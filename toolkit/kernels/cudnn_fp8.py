"""cuDNN's attention in fp8, through the package nvidia-cudnn-frontend. Lossy: q, k, v and the probabilities are fp8."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

from .kernel import HALF, AttentionKernel, needs

PLANS = 16  # shapes that are kept
PROBABILITIES = 256.0  # what they are multiplied with: 1 becomes a number near the largest in fp8, small ones stay normal
_plans: OrderedDict[tuple, _Plan] = OrderedDict()
_handles: dict[torch.device, Any] = {}
_lock = threading.RLock()


class _Plan:
    """What cuDNN prepared for tensors of one shape.

    Args:
        q: [B, num_heads, seq_len, head_dim] float8_e4m3fn.
        k: as q, perhaps of another length.
        v: as k.
        dtype: of the result.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype):
        import cudnn

        self.cudnn, self.dtype = cudnn, dtype
        self.handle = _handles.get(q.device) or _handles.setdefault(q.device, cudnn.create_handle())
        fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self.graph = graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=self.handle)  # fmt: skip

        def number(name: str) -> Any:
            return graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=fp32)

        self.qkv = [
            graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=fp8)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        names = "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"
        self.scales = {name: number(name) for name in names}
        self.out, _, *largest = graph.sdpa_fp8(
            q=self.qkv[0], k=self.qkv[1], v=self.qkv[2], **self.scales, attn_scale=q.shape[-1] ** -0.5,
            generate_stats=False,
        )  # fmt: skip
        like = self._empty(q)
        kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.out.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride())).set_data_type(kind[dtype])  # fmt: skip
        for item in largest:  # which it insists on telling
            item.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
        self.largest = largest
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        one = torch.ones(1, device=q.device)
        self.fixed = {"descale_s": one / PROBABILITIES, "scale_s": one * PROBABILITIES, "scale_o": one}  # fmt: skip

    def _empty(self, q: torch.Tensor) -> torch.Tensor:
        batch, heads, length, width = q.shape
        return torch.empty(batch, length, heads, width, dtype=self.dtype, device=q.device).transpose(1, 2)  # fmt: skip

    def __call__(self, *quantised: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q = quantised[0][0]
        out = self._empty(q)
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=q.device)  # fmt: skip
        given = {tensor: data for tensor, (data, _) in zip(self.qkv, quantised, strict=True)}
        given |= {self.scales[f"descale_{name}"]: scale for name, (_, scale) in zip("qkv", quantised, strict=True)}  # fmt: skip
        given |= {self.scales[name]: value for name, value in self.fixed.items()}
        given |= {item: torch.empty(1, device=q.device) for item in self.largest}
        given[self.out] = out
        stream = torch.cuda.current_stream(q.device).cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        self.graph.execute(given, workspace, handle=self.handle)
        return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from ..fused.to_fp8 import to_fp8

    quantised = [to_fp8(x if x.stride(-1) == 1 else x.contiguous()) for x in (q, k, v)]
    key = (q.shape, k.shape, q.dtype, q.device)
    with _lock, torch.cuda.device(q.device):  # the handle's stream is set anew for each call
        if key not in _plans:
            _plans[key] = _Plan(*(data for data, _ in quantised), q.dtype)
            while len(_plans) > PLANS:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        return _plans[key](*quantised)


KERNELS = (
    AttentionKernel(
        "cudnn_fp8", HALF, _attend, needs((9, 0), None, "cudnn", "triton"), lossy=True, head_dims=(64, 128), package="cudnn",
    ),
)  # fmt: skip
