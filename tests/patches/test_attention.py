"""The override function: what fits goes to the kernel, all else to the host's function, nothing is lost."""

import pytest
import torch

from ark.patches.attention import attention_override
from ark.toolkit.kernels import KERNELS, AttentionKernel


def host_function(q, k, v, heads, mask=None, *args, **kwargs):
    return "host", mask, kwargs


@pytest.fixture
def qkv():
    return tuple(torch.randn(2, 3, 10, 128) for _ in range(3))


def test_shape_and_values(qkv):
    override = attention_override("math")
    out = override(host_function, *qkv, 3, skip_reshape=True)
    assert out.shape == (2, 10, 3 * 128)
    q, k, v = (x.double() for x in qkv)
    expected = (torch.softmax(q @ k.mT / 128**0.5, -1) @ v).transpose(1, 2).reshape(2, 10, -1)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    kept = override(host_function, *qkv, 3, skip_reshape=True, skip_output_reshape=True)
    assert torch.equal(kept.transpose(1, 2).reshape(2, 10, -1), out)


@pytest.mark.parametrize(
    "change",
    ["mask", "flat layout", "head_dim", "dtype"],
)
def test_what_the_kernel_was_not_built_for_goes_to_the_host_with_its_arguments(
    qkv, change, monkeypatch
):
    def fail(*_):
        raise AssertionError("the kernel must not run")

    kernel = AttentionKernel(
        "strict", (torch.float32,), fail, lambda hardware: None, head_dims=(128,)
    )
    monkeypatch.setitem(KERNELS, "strict", kernel)
    mask, options = None, {"skip_reshape": True}
    if change == "mask":
        mask = torch.ones(10, 10)
    elif change == "flat layout":
        options = {"skip_reshape": False}
    elif change == "head_dim":
        qkv = tuple(x[..., :64] for x in qkv)
    else:
        qkv = tuple(x.half() for x in qkv)
    where, got_mask, got = attention_override("strict")(
        host_function, *qkv, 3, mask=mask, **options
    )
    assert where == "host"
    assert got_mask is mask
    assert got == options


def test_the_override_of_a_kernel_is_always_the_same_object():
    assert attention_override("math") is attention_override(
        "math"
    )  # compiled code would start anew


def test_compiled_code_sees_one_operation_and_computes_the_same(qkv):
    override, seen = attention_override("math"), []

    def block(q, k, v):
        return override(host_function, q * 2, k, v, 3, skip_reshape=True) + 1

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(*qkv), block(*qkv), atol=1e-6)
    assert torch.ops.ark.attention in seen or torch.ops.ark.attention.default in seen
    assert torch.library.opcheck(torch.ops.ark.attention, (*qkv, "math")) is not None
