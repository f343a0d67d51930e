"""The doctor is right about machines that are broken: real processes, with broken packages and programs put before others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ark.bootstrap import ROOT
from ark.toolkit.checks import check_gpus
from ark.toolkit.combinations import _combinations
from ark.toolkit.disk import find_model, read_speed
from ark.toolkit.doctor import Report
from ark.toolkit.driver import Driver
from ark.toolkit.finding import Finding
from ark.toolkit.hardware import Hardware
from ark.toolkit.kernels import KERNELS
from ark.toolkit.plan import Choice, plan
from ark.toolkit.probe import Probed, probe

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
posix = pytest.mark.skipif(os.name == "nt", reason="puts shell scripts on the PATH")


class Examined:
    """What `python bootstrap.py doctor --json` said."""

    def __init__(self, code: int, output: str):
        self.code, report = code, json.loads(output)
        self.healthy, self.lines = report["healthy"], report["findings"]
        self.plan = {choice["what"]: choice for choice in report["plan"]}

    def __getitem__(self, name: str) -> dict[str, str]:
        (line,) = (line for line in self.lines if line["name"] == name)
        return line


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """Examine with packages `name="source"` and programs (`programs`) before those of the machine."""

    def run(
        *arguments: str, python: str = sys.executable, programs: dict | None = None, **packages: str
    ):
        for name, source in packages.items():
            (tmp_path / "packages" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "packages" / name / "__init__.py").write_text(textwrap.dedent(source))
        (tmp_path / "programs").mkdir(exist_ok=True)
        for name, source in (programs or {}).items():
            (tmp_path / "programs" / name).write_text(f"#!/bin/sh\n{source}\n")
            (tmp_path / "programs" / name).chmod(0o755)
        path = os.pathsep.join((str(tmp_path / "programs"), os.environ["PATH"]))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages"), "PATH": path}
        command = [sys.executable, ROOT / "bootstrap.py", "doctor", "--json", "--python", python, "--models", ROOT / "assets"]  # fmt: skip
        done = subprocess.run([*map(str, command), *arguments], capture_output=True, text=True, env=environment, timeout=300)  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        return Examined(done.returncode, done.stdout)

    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return run


@no_gpu
def test_a_machine_without_a_gpu(examine):
    found = examine()
    assert found.healthy and found.code == 0, found.lines
    assert found["torch"]["state"] == "ok" and torch.__version__ in found["torch"]["text"]
    assert found["gpu"]["state"] == "note" and "on the CPU" in found["gpu"]["text"]
    assert "ark_tiny_klein" in found["disk"]["text"] and "GB/s" in found["disk"]["text"]
    chosen = {what: choice["choice"] for what, choice in found.plan.items()}
    assert chosen == {"loader": "mapped", "attention": "host", "engine": "host", "precision": "bf16", "compile": "off"}  # fmt: skip
    assert all(choice["why"] for choice in found.plan.values())


@pytest.mark.gpu
def test_a_machine_with_a_gpu(examine):
    found = examine()
    name = torch.cuda.get_device_name()
    assert name in found["gpu"]["text"] and found["gpu"]["state"] == "ok"
    assert name in found["driver"]["text"] and found["driver"]["state"] == "ok"
    assert "a kernel was compiled and run" in found["triton"]["text"]
    assert found.plan["engine"]["choice"] == "fused"
    assert found.plan["attention"]["choice"] in (*KERNELS, "host")
    assert "TFLOP/s" in found.plan["attention"]["why"]


def test_a_triton_that_cannot_be_imported(examine):
    found = examine("--quick", triton="raise RuntimeError('libtriton.so: undefined symbol')")
    assert not found.healthy and found.code == 1
    assert found["triton"]["state"] == "bad"
    assert "libtriton.so: undefined symbol" in found["triton"]["text"]
    assert found["torch"]["state"] == "ok"
    assert found.plan["engine"]["choice"] == "host"
    assert found.plan["compile"]["choice"] == "off"


@pytest.mark.gpu
@posix
def test_a_triton_that_cannot_compile(examine, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv(
        "TRITON_CACHE_DIR", str(tmp_path / "cache")
    )  # an earlier kernel must not serve
    monkeypatch.setenv("CC", "/bin/false")
    found = examine("--quick")
    assert found["triton"]["state"] == "bad" and "/bin/false" in found["triton"]["text"]
    assert found.plan["engine"]["choice"] == "host" and "/bin/false" in found.plan["engine"]["why"]


@posix
def test_a_package_that_kills_its_process_is_named_and_the_others_are_tried(examine):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    found = examine("--quick", triton=crash, sageattention="__version__ = '1.0.6'")
    assert found["triton"]["state"] == "bad" and "signal 11" in found["triton"]["text"]
    assert found["sageattention"]["text"].startswith("1.0.6")
    assert found.plan


def test_a_package_that_hangs_is_named(tmp_path, monkeypatch):
    for name, source in (("hangs", "import time; time.sleep(60)"), ("works", "__version__ = '3'")):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = probe(("hangs", "works"), seconds=3)
    assert "did not end within 3 seconds" in found["hangs"].problem
    assert found["works"].problem is None and found["works"].facts["version"] == "3"


OLD_TORCH = """
import sys, types
__version__ = "{version}"
version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
cuda = types.SimpleNamespace(is_available=lambda: False)
"""


def test_an_old_torch(examine):
    found = examine(torch=OLD_TORCH.format(version="1.13.1", cuda=None))
    assert not found.healthy
    assert found["torch"]["state"] == "bad"
    assert "1.13.1 (for CPU) is older than 2.4" in found["torch"]["text"]
    assert "Update torch" in found["torch"]["remedy"]
    assert found.plan == {}
    assert found["disk"]["state"] == "ok"


def test_a_torch_that_cannot_be_imported(examine):
    found = examine(torch="raise ImportError('libc10.so: cannot open shared object file')")
    assert found["torch"]["state"] == "bad" and "libc10.so" in found["torch"]["text"]
    assert found.plan == {} and found["disk"]["state"] == found["cache"]["state"] == "ok"


def test_no_torch_at_all(examine, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    found = examine(python=str(bare / ("Scripts/python.exe" if os.name == "nt" else "bin/python")))
    assert found["torch"]["state"] == "bad" and "No module named 'torch'" in found["torch"]["text"]
    assert found.plan == {} and str(bare) in found["python"]["text"]


SMI = 'case "$1" in --query*) echo "550.54, NVIDIA RTX 4090";; *) echo "| CUDA Version: 12.4 |";; esac'


@posix
@no_gpu
def test_a_torch_for_cpus_beside_a_gpu(examine):
    found = examine("--quick", programs={"nvidia-smi": SMI})
    assert found["driver"]["text"] == "550.54, up to CUDA 12.4, NVIDIA RTX 4090"
    assert found["torch"]["state"] == "bad"
    assert "cannot use the NVIDIA RTX 4090" in found["torch"]["text"]


@posix
def test_a_driver_too_old_for_torch(examine):
    torch_13 = OLD_TORCH.format(version="2.11.0", cuda="13.0")
    found = examine("--quick", programs={"nvidia-smi": SMI}, torch=torch_13)
    assert found["gpu"]["state"] == "bad"
    assert "the driver runs CUDA up to 12, torch needs 13" in found["gpu"]["text"]


@posix
def test_a_driver_that_does_not_answer(examine):
    failing = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    found = examine("--quick", programs={"nvidia-smi": failing})
    assert found["driver"]["state"] == "bad" and "version mismatch" in found["driver"]["text"]


def test_the_text_is_for_people(examine):
    command = [sys.executable, ROOT / "bootstrap.py", "doctor", "--quick", "--python", sys.executable]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("Ark doctor: date ")
    assert "What Ark would do here" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 160


# --- the parts -----------------------------------------------------------------------------------------------------


def test_the_file_to_look_at_is_kleins(tmp_path):
    sizes = {"a/other.safetensors": 3 << 30, "a/tiny_klein.safetensors": 9, "b/Klein.safetensors": 2 << 30, "klein.txt": 4 << 30}  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)  # takes no room
    assert find_model([tmp_path]).name == "Klein.safetensors"
    assert find_model([tmp_path / "a", tmp_path / "missing"]).name == "other.safetensors"
    assert find_model([tmp_path / "missing"]) is None


def test_a_card_on_which_nothing_runs():
    card = {"name": "RTX 5090", "capability": [12, 0], "free": 1e9, "total": 32e9}
    facts = {"cuda": "12.4", "gpus": [card, {**card, "problem": "no kernel image is available"}]}
    good, bad = check_gpus(Probed(None, facts), Driver())
    assert (good.state, bad.state) == ("ok", "bad")
    assert "RTX 5090, compute capability 12.0" in good.text and "no kernel image" in bad.text


def test_in_short_the_bad_comes_first():
    findings = tuple(Finding(state, state, f"{state}\nmore") for state in ("ok", "note", "bad"))
    report = Report({}, findings, (Choice("engine", "fused", "why"),))
    assert report.lines == ["BAD bad: bad", "engine: fused", "NOTE note: note", "OK ok: ok"]
    assert not report.healthy and report.json()["plan"][0]["choice"] == "fused"


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 << 20))
    assert read_speed(path).nbytes == 20 << 20
    assert read_speed(path, nbytes=8 << 20).nbytes == 8 << 20
    assert read_speed(path, seconds=-1).nbytes == 0


AMPERE = (("sageattention", "1.0.6"), ("triton", "3.6.0"))


def bad_here(hardware: Hardware) -> str:
    """What is said of packages that are installed on some hardware."""
    probed = {name: None for name, _ in hardware.packages}
    return "\n".join(finding.text for finding in _combinations(probed, hardware))


@no_gpu
def test_bad_combinations_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert "gives NaN" in bad_here(Hardware("cuda", "RTX 3090", (8, 6), AMPERE))
    assert "cannot compile fp8" in bad_here(Hardware("cuda", "RTX 3090", (8, 6), AMPERE))
    assert "gives NaN" not in bad_here(Hardware("cuda", "RTX 3090", (8, 6), ()))
    assert "without Triton" in bad_here(Hardware("cuda", "H200", (9, 0), AMPERE[:1]))
    two = (("sageattention", "2.2.0"), ("triton", "3.6.0"))
    assert "ignores masks" in bad_here(Hardware("cuda", "H200", (9, 0), two))
    assert bad_here(Hardware("cpu", "CPU", (0, 0), ())) == ""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert "cudaMallocAsync" in bad_here(Hardware("cuda", "H200", (9, 0), ()))


def test_one_decision_that_fails_does_not_hide_the_others(tmp_path):
    broken = tmp_path / "klein.safetensors"
    broken.write_bytes(b"no model")
    chosen = plan(torch.device("meta"), broken)
    assert [choice.what for choice in chosen] == ["loader", "attention", "engine", "precision", "compile"]  # fmt: skip


@pytest.mark.gpu
def test_the_planned_path_is_the_one_that_is_taken(tmp_path):
    from safetensors.torch import save_file

    from ark.toolkit.header import read_header
    from ark.toolkit.layout import plan_layout
    from ark.toolkit.transfer import transfer

    path, device = Path(tmp_path / "klein.safetensors"), torch.device("cuda:0")
    save_file({"x": torch.randn(100 << 18)}, path)  # 100 MB
    planned = plan(device, path)[0].choice
    file = read_header(path)
    _, report = transfer(file, plan_layout(file.entries), device)
    assert report.path == planned
