"""The kernel registry: a decision and its reason, never a silent one."""

import dataclasses
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from ark.toolkit import combustion
from ark.toolkit.combustion import (
    Measurement,
    measure_kernels,
    measured_kernels,
    select_attention_kernel,
    unavailable_kernels,
)
from ark.toolkit.errors import KernelUnavailable
from ark.toolkit.hardware import PACKAGES, Hardware, probe_hardware
from ark.toolkit.kernels import KERNELS, AttentionKernel

CPU = Hardware("cpu", "CPU", (0, 0), ())
HOPPER = Hardware("cuda", "H200", (9, 0), (("triton", "3.6.0"),))
ADA = Hardware("cuda", "RTX 4090", (8, 9), (("triton", "3.6.0"), ("sageattention", "2.2.0")))
AMPERE = Hardware("cuda", "RTX 3090", (8, 6), (("triton", "3.6.0"), ("sageattention", "1.0.6")))


def test_auto_on_cpu_gives_every_reason():
    kernel, report = select_attention_kernel("auto", CPU)
    assert kernel is None
    for name, reason in unavailable_kernels(CPU).items():
        assert re.search(rf"\b{name}\b[^;]*: {re.escape(reason)}", report)


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


def test_measuring_leaves_attention_of_other_threads_alone():
    cuda, seen, stop = torch.backends.cuda, set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))  # fmt: skip

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        measure_kernels(
            CPU, torch.device("cpu"), (1, 2, 256, 64), torch.float32, {"math": KERNELS["math"]}
        )
    stop.set()
    watcher.join()
    assert seen == {(True, True, True)}


BLACKWELL = Hardware("cuda", "RTX 5090", (12, 0), (("triton", "3.6.0"), ("sageattention", "2.2.0"), ("sageattn3", "1.0")))  # fmt: skip


@pytest.mark.parametrize(
    ("hardware", "runs", "refused"),
    [
        (AMPERE, {"flash", "efficient"}, {"sage": "gives NaN", "sage_fp16": "needs SageAttention 2", "cudnn": None}),
        (ADA, {"sage", "sage_triton", "sage_fp16", "sage_fp8"}, {"sage_fp8_hopper": "9.0 up to below 10.0", "flash3": "9.0"}),
        (HOPPER, {"cudnn", "flash"}, {"sage": "sageattention is not installed", "kitchen_int8": "comfy_kitchen is not", "flash3": "flash_attn_interface is not"}),
        (BLACKWELL, {"sage_fp4", "sage"}, {"sage_fp8_hopper": "below 10.0", "flash3": "below 10.0"}),
    ],
)  # fmt: skip
def test_each_kernel_runs_where_it_can_and_says_why_not_elsewhere(hardware, runs, refused):
    reasons = unavailable_kernels(hardware)
    assert not runs & reasons.keys()
    for name, text in refused.items():
        assert text is None or text in reasons[name], reasons.get(name)
    for name, reason in reasons.items():
        with pytest.raises(KernelUnavailable) as refusal:
            select_attention_kernel(name, hardware)
        assert reason in str(refusal.value)


def test_sage_triton_is_refused_on_cards_where_it_gives_nan_in_every_version():
    second = Hardware("cuda", "RTX 3090", (8, 6), (("triton", "3.6.0"), ("sageattention", "2.2.0")))
    assert "NaN" in KERNELS["sage_triton"].unavailable(second)
    assert KERNELS["sage"].unavailable(second) is None  # dispatches to its CUDA kernel there
    assert KERNELS["sage_fp16"].unavailable(second) is None


def test_comfy_kitchen_needs_a_version_that_has_the_kernel():
    def on(version):
        return Hardware("cuda", "H200", (9, 0), (("comfy_kitchen", version),))

    assert KERNELS["kitchen_int8"].unavailable(on("0.2.31")) is None
    assert "0.1.9 has no" in KERNELS["kitchen_int8"].unavailable(on("0.1.9"))


def test_probing_imports_no_optional_package():
    import subprocess
    import sys

    code = f"import sys; from ark.toolkit.hardware import probe_hardware; probe_hardware('cpu'); print([p for p in {PACKAGES!r} if p in sys.modules and p != 'triton'])"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"  # fmt: skip


def everywhere(hardware):
    return None


def exact(q, k, v):
    return KERNELS["math"].attend(q, k, v)


def fail(q, k, v):
    raise RuntimeError("no such instruction\nand a long trace")


FAKES = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel("nan", (torch.float32,), lambda q, k, v: exact(q, k, v) * float("nan"), everywhere),
        AttentionKernel("wrong", (torch.float32,), lambda q, k, v: v, everywhere),
        AttentionKernel("coarse", (torch.float32,), lambda q, k, v: exact(q, k, v) * 1.025, everywhere, lossy=True),
        AttentionKernel("careless", (torch.float32,), lambda q, k, v: exact(q, k, v) * 1.025, everywhere),
        AttentionKernel("broken", (torch.float32,), fail, everywhere),
        AttentionKernel("exact", (torch.float32,), exact, everywhere),
        AttentionKernel("elsewhere", (torch.float32,), fail, lambda hardware: "not here"),
        AttentionKernel("half", (torch.float16,), fail, everywhere),
        AttentionKernel("narrow", (torch.float32,), fail, everywhere, head_dims=(64,)),
        AttentionKernel("slow", (torch.float32,), exact, everywhere, slow_start=True),
    )
}  # fmt: skip


def test_a_kernel_that_computes_something_else_is_never_chosen():
    found = {m.name: m for m in measure_kernels(CPU, torch.device("cpu"), (1, 3, 60, 128), torch.float32, FAKES)}  # fmt: skip
    assert found.keys() == {"nan", "wrong", "coarse", "careless", "broken", "exact"}
    good = [name for name, m in found.items() if m.problem is None]
    assert sorted(good) == ["coarse", "exact"] and list(found)[:2] == good  # those come first
    assert found["exact"].relative_error < 1e-6 and found["exact"].cosine > 0.9999
    assert 0.02 < found["coarse"].relative_error < 0.03
    assert "of at most 0.02" in found["careless"].problem
    assert found["broken"].problem == "failed: no such instruction"
    assert "nan" in found["nan"].problem
    for measurement in found.values():
        assert measurement.name in str(measurement)


def test_auto_takes_the_fastest_that_passed_and_shows_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(combustion, "KERNELS", FAKES)
    monkeypatch.setattr(combustion, "measure_kernels", lambda *a: measure_kernels(*a, FAKES))
    arguments = (HOPPER, torch.device("cpu"), (1, 3, 60, 128), torch.float32)
    kernel, report = select_attention_kernel("auto", *arguments)
    assert kernel.name in ("exact", "coarse")
    assert report.splitlines()[0].startswith(f"{kernel.name}: the fastest of 6")
    assert ("lossy" in report.splitlines()[0]) == (kernel.name == "coarse")
    assert len(report.splitlines()) == 7 and "failed: no such instruction" in report


def test_a_measurement_is_remembered_for_this_card_shape_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(combustion, "STEADY", 1e9)
    monkeypatch.setattr(combustion, "KERNELS", FAKES)
    count = []
    monkeypatch.setattr(
        combustion, "measure_kernels", lambda *a: count.append(a) or measure_kernels(*a, FAKES)
    )
    place, shape = torch.device("cpu"), (1, 2, 30, 128)
    first = measured_kernels(HOPPER, place, shape, torch.float32)
    again = measured_kernels(HOPPER, place, shape, torch.float32)
    assert list(map(str, again)) == list(map(str, first)) and len(count) == 1
    measured_kernels(HOPPER, place, (1, 2, 40, 128), torch.float32)
    measured_kernels(ADA, place, shape, torch.float32)  # another card with other packages
    assert len(count) == 3
    (tmp_path / "attention.json").write_text('{"x"')
    assert len(measured_kernels(HOPPER, place, shape, torch.float32)) == len(first)
    assert len(count) == 4


def test_what_is_no_longer_taken_by_itself_is_not_remembered_either(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(combustion, "KERNELS", FAKES)
    what = HOPPER, (1, 2, 30, 128), torch.float32
    noted = [Measurement(name, 0.1 * ms, 1.0, 0.0, 1.0) for ms, name in enumerate(("slow", "gone", "exact"))]  # fmt: skip
    for kept, known in ((noted, noted[2:]), (noted[:2], None)):
        combustion.remember(combustion.BOOK, combustion._key(*what), [dataclasses.asdict(m) for m in kept])  # fmt: skip
        assert combustion.known_kernels(*what) == known


def test_what_was_measured_on_a_busy_device_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    calls, clock = [], SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def uneven(q, k, v):
        calls.append(1)
        clock.now += 0.02 if len(calls) % 3 else 0.001  # most calls have to wait
        return exact(q, k, v)

    monkeypatch.setattr(combustion, "time", clock)

    fake = {"uneven": AttentionKernel("uneven", (torch.float32,), uneven, everywhere)}
    monkeypatch.setattr(combustion, "measure_kernels", lambda *a: measure_kernels(*a, fake))
    asked = (HOPPER, torch.device("cpu"), (1, 2, 30, 128), torch.float32)
    (found,) = measured_kernels(*asked)
    assert found.problem is None and found.spread > combustion.STEADY
    first = len(calls)
    assert first == combustion.ATTEMPTS * (1 + combustion.WARM_UP + combustion.REPEAT)
    measured_kernels(*asked)
    assert len(calls) == 2 * first


def test_a_kernel_that_fails_while_it_is_timed_costs_only_itself():
    calls = []

    def tires(q, k, v):
        calls.append(1)
        return exact(q, k, v) if len(calls) < 4 else fail(q, k, v)

    fakes = {"tires": AttentionKernel("tires", (torch.float32,), tires, everywhere), "exact": FAKES["exact"]}  # fmt: skip
    found = measure_kernels(CPU, torch.device("cpu"), (1, 2, 30, 128), torch.float32, fakes)
    assert [m.name for m in found] == ["exact", "tires"] and found[0].problem is None
    assert found[1].ms is None and found[1].problem == "failed: no such instruction"


@pytest.mark.gpu
def test_auto_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    device, hardware = torch.device("cuda"), probe_hardware("cuda")
    kernel, report = select_attention_kernel("auto", hardware, device, (1, 24, 1536, 128), torch.bfloat16)  # fmt: skip
    assert kernel is not None and kernel.name in report and "TFLOP/s" in report


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_the_gpu(name):
    hardware = probe_hardware("cuda")
    if reason := KERNELS[name].unavailable(hardware):
        pytest.skip(f"{name}: {reason}")
    q, k, v = (torch.randn(1, 24, 1000, 128, device="cuda") for _ in range(3))
    expected = torch.softmax(q @ k.mT / 128**0.5, -1) @ v
    out = KERNELS[name].attend(*(x.bfloat16() for x in (q, k, v))).float()
    limit = 0.08 if name == "cudnn_fp8" else 0.05 if KERNELS[name].lossy else 0.01
    assert (out - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_says_that_q_may_be_shorter_takes_a_part_of_it(device):
    hardware = probe_hardware(torch.device(device))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, 300, 2, 128).to(device, dtype).transpose(1, 2) for _ in "qkv")
    asked = [one for one in KERNELS.values() if one.any_length and one.unavailable(hardware) is None and dtype in one.dtypes]  # fmt: skip
    assert {"math"} <= {one.name for one in asked}
    for kernel in asked:
        found, expected = kernel.attend(q[:, :, 44:], k, v), kernel.attend(q, k, v)[:, :, 44:]
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
