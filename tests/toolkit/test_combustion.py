"""The kernel registry: a decision and its reason, never a silent one."""

import pytest
import torch

from ark.toolkit.combustion import KERNELS, select_attention_kernel, unavailable_kernels
from ark.toolkit.errors import KernelUnavailable
from ark.toolkit.hardware import Hardware, probe_hardware

CPU = Hardware("cpu", "CPU", (0, 0), ())
HOPPER = Hardware("cuda", "H200", (9, 0), (("triton", "3.6.0"),))
ADA = Hardware("cuda", "RTX 4090", (8, 9), (("triton", "3.6.0"), ("sageattention", "2.2.0")))
AMPERE = Hardware("cuda", "RTX 3090", (8, 6), (("triton", "3.6.0"), ("sageattention", "1.0.6")))


@pytest.mark.parametrize(
    "hardware, chosen", [(CPU, None), (HOPPER, "cudnn"), (ADA, "sage"), (AMPERE, "flash")]
)
def test_auto(hardware, chosen):
    kernel, report = select_attention_kernel("auto", hardware)
    assert (kernel.name if kernel else None) == chosen
    assert report
    assert ("lossy" in report) == (chosen == "sage")


def test_auto_on_cpu_gives_every_reason():
    _, report = select_attention_kernel("auto", CPU)
    for name, reason in unavailable_kernels(CPU).items():
        assert f"{name}: {reason}" in report


def test_a_named_kernel_is_taken_or_refused_with_its_reason():
    assert select_attention_kernel("math", CPU)[0].name == "math"
    with pytest.raises(KernelUnavailable, match="8.6"):
        select_attention_kernel("sage", AMPERE)
    with pytest.raises(KernelUnavailable, match="not installed"):
        select_attention_kernel("sage", HOPPER)
    with pytest.raises(KernelUnavailable, match="no kernel of this name"):
        select_attention_kernel("warp", HOPPER)


def test_math_kernel_equals_plain_attention():
    q, k, v = (torch.randn(2, 3, 40, 128, dtype=torch.float64) for _ in range(3))
    expected = torch.softmax(q @ k.mT / 128**0.5, -1) @ v
    out = KERNELS["math"].attend(q.float(), k.float(), v.float())
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_the_gpu(name):
    hardware = probe_hardware("cuda")
    if reason := KERNELS[name].unavailable(hardware):
        pytest.skip(f"{name}: {reason}")
    q, k, v = (torch.randn(1, 24, 1000, 128, device="cuda") for _ in range(3))
    expected = torch.softmax(q @ k.mT / 128**0.5, -1) @ v
    out = KERNELS[name].attend(*(x.bfloat16() for x in (q, k, v))).float()
    assert (out - expected).norm() / expected.norm() < (0.05 if KERNELS[name].lossy else 0.01)
