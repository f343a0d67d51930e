"""Recordings of all that engines do, compared with what they record: for a process of its own (`allocator.py`)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .graph import SHAPES, Function, Graphs
from .runner import operations_for

WIDTH, DEPTH = 512, 4
REASON = "it stops in the middle"


def attempt() -> str:
    """Record, replay, begin, replace and give up; and fail in the middle of one.

    Returns:
        The allocator's name.

    Raises:
        ArithmeticError: a recording gives other numbers than what it recorded.
        RuntimeError: there are none.
    """
    device = torch.device("cuda")
    work = _work(device)
    with torch.inference_mode():
        for _ in range(2):  # engines come and go
            both = [Graphs(trying=True), Graphs(trying=True)]
            for rows in [64 * (1 + n % (SHAPES + 2)) for n in range(2 * SHAPES + 4)]:
                x = torch.randn(rows, WIDTH, device=device, dtype=torch.bfloat16)
                expected = work(x)
                others = [torch.empty(rows << 12, device=device) for _ in range(4)]
                for graphs in both:
                    for _ in range(3):
                        found = graphs.run("work", work, x)
                        if not torch.equal(found, expected):
                            raise ArithmeticError("a recording gives other numbers than what it recorded")  # fmt: skip
                        others[:1] = []
                        torch.cuda.empty_cache()
                    _begin(graphs, work, x, expected)
            for graphs in both:
                if graphs.why_not or graphs.recorded != SHAPES:
                    raise RuntimeError(graphs.why_not or f"{graphs.recorded} recordings, not {SHAPES}")  # fmt: skip
                graphs.clear()
        graphs = Graphs(trying=True)
        if not all(torch.equal(graphs.run("stops", _stops, x), x + x) for _ in range(3)) or graphs.why_not != REASON:  # fmt: skip
            raise RuntimeError("after a failure it does not go on")
    torch.cuda.synchronize()
    return torch.cuda.get_allocator_backend()


def _begin(graphs: Graphs, work: Function, x: torch.Tensor, expected: torch.Tensor) -> None:
    """Begin two before they are asked for: one that is, and one that nobody has come for when all else is given up."""
    begun = graphs.begin("work", work, x.clone())
    found = graphs.run("work", work, x, begun=begun)
    if begun is None or not (begun.taken and begun.right() and torch.equal(found, expected)):
        raise ArithmeticError("what was begun is not what was asked for")
    wrong = graphs.begin("work", work, x + 1)
    graphs.run("work", work, x, begun=wrong)
    if wrong is None or wrong.right():
        raise ArithmeticError("what was begun of other numbers passes for what was asked for")
    graphs.begin("work", work, x + 2)


def _work(device: torch.device):  # noqa: ANN202
    """Matrices of both libraries, attention, a convolution, Triton, and memory of all sizes."""
    operations, _ = operations_for(device)
    numbers = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    matrices = [numbers(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(DEPTH)]
    kernel, weight = numbers(64, 64, 3, 3) / 24, torch.ones(WIDTH, device=device)

    def work(x: torch.Tensor) -> torch.Tensor:
        for matrix in matrices:
            heads = F.linear(x, matrix).view(1, len(x), -1, 64).transpose(1, 2)
            attention = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
            x = x + torch.mm(attention.reshape(x.shape), matrix)
            picture = x.view(1, 64, -1, 64).contiguous(memory_format=torch.channels_last)
            x = x + F.conv2d(picture, kernel, padding=1).contiguous().view(x.shape)
            normed = operations.add_norm(x.float(), None, weight, 1e-6, x.dtype)
            x = torch.cat([x, normed])[len(x) :] + x
        return x.float()

    return work


def _stops(x: torch.Tensor) -> torch.Tensor:
    """Fails in a recording while it has memory of that."""
    twice = x * 2
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(REASON)
    return twice
