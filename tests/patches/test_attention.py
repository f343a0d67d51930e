"""The override function: what fits goes to the kernel, all else to the host's function, nothing is lost."""

import pytest
import torch

from ark.patches.attention import attention_override
from ark.toolkit.combustion import KERNELS, AttentionKernel


def host_function(q, k, v, heads, mask=None, *args, **kwargs):
    return "host", mask, kwargs


@pytest.fixture
def qkv():
    return tuple(torch.randn(2, 3, 10, 128) for _ in range(3))


def test_shape_and_values(qkv):
    override = attention_override(KERNELS["math"])
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
def test_what_the_kernel_was_not_built_for_goes_to_the_host_with_its_arguments(qkv, change):
    def fail(*_):
        raise AssertionError("the kernel must not run")

    kernel = AttentionKernel("strict", (torch.float32,), fail, lambda hardware: None)
    mask, options = None, {"skip_reshape": True}
    if change == "mask":
        mask = torch.ones(10, 10)
    elif change == "flat layout":
        options = {"skip_reshape": False}
    elif change == "head_dim":
        qkv = tuple(x[..., :64] for x in qkv)
    else:
        qkv = tuple(x.half() for x in qkv)
    where, got_mask, got = attention_override(kernel)(host_function, *qkv, 3, mask=mask, **options)
    assert where == "host"
    assert got_mask is mask
    assert got == options
