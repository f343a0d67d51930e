"""Recordings under one of torch's two allocators; `test_graph.py` runs this in a process of its own."""

import json
import sys

import torch
import torch.nn.functional as F

from ark.toolkit.fused.graph import SHAPES, Graphs
from ark.toolkit.fused.runner import operations_for

WIDTH = 512
torch.manual_seed(0)
torch.set_grad_enabled(False)
matrices = [torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5 for _ in range(8)]  # fmt: skip
kernel = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 24
operations, how = operations_for(torch.device("cuda"))


def work(x):
    """What engines do: matrices of both libraries, attention, a convolution, Triton, and memory of all sizes."""
    for matrix in matrices:
        heads = F.linear(x, matrix).view(1, x.shape[0], -1, 64).transpose(1, 2)
        x = x + torch.mm(F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape), matrix)  # fmt: skip
        picture = x.view(1, 64, -1, 64).contiguous(memory_format=torch.channels_last)
        x = x + F.conv2d(picture, kernel, padding=1).contiguous().view(x.shape)
        wide = operations.quantise(x).wide().to(x.dtype)
        x = torch.cat([x, wide])[: len(x)] * torch.rsqrt(x.float().square().mean() + 1).to(x.dtype)
    return x.float()


found = {"how": how, "backend": torch.cuda.get_allocator_backend(), "worst": 0.0, "why_not": []}
for _ in range(3):  # engines come and go
    graphs = [Graphs(), Graphs()]
    for rows in [64 * n for n in range(1, SHAPES + 3)] * 3:
        x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        expected = work(x)
        held = [torch.empty(rows << 12, device="cuda") for _ in range(4)]  # what comes between
        for each in graphs:
            result = each.run("work", work, x)
            again = each.run("work", work, x)
            del held[:1]
            if rows % 128:
                torch.cuda.empty_cache()
            third = each.run("work", work, x)
            for y in (result, again, third):
                found["worst"] = max(found["worst"], float((y - expected).norm() / expected.norm()))  # fmt: skip
    found["recorded"] = [each.recorded for each in graphs]
    found["why_not"] += [each.why_not for each in graphs if each.why_not]
    graphs[0].clear()
    torch.cuda.synchronize()
    graphs[1].clear()
    torch.cuda.empty_cache()


def fails(x):
    """Stops in the middle of a recording, with memory of its own."""
    y = x * 2
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("it stops")
    return y + x


failing, x = Graphs(), torch.randn(64, WIDTH, device="cuda")
found["after_failure"] = [bool(torch.equal(failing.run("fails", fails, x), 3 * x)) for _ in range(4)]  # fmt: skip
found["failure"] = failing.why_not
del failing
torch.cuda.synchronize()
print(json.dumps(found))
sys.stdout.flush()
