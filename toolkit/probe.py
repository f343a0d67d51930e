"""Tries what may be broken in a process of its own: an import that crashes, or a compiler that hangs, harms nobody.

Importing this needs nothing but Python. `python toolkit/launch.py ark.toolkit.probe names...` prints one JSON value for each
name as soon as it is known, so that the parent knows who it was when the process dies.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .packages import package_version

SECONDS = 180.0  # for all of them: torch's import and a compilation may take long on a cold disk


@dataclass(frozen=True)
class Probed:
    """What became of one attempt.

    Attributes:
        problem: why it does not work, None if it does.
        facts: what was found.
    """

    problem: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def probe(names: tuple[str, ...], seconds: float = SECONDS) -> dict[str, Probed]:
    """Try packages in a process of its own, which is started again after one that kills it.

    Args:
        names: "torch", "cuda_graph" (recordings under the allocator that the environment asks for), or of `packages.PACKAGES`.
        seconds: until a process counts as hung.

    Returns:
        What became of each.
    """
    found: dict[str, Probed] = {}
    while left := [name for name in names if name not in found]:
        problem = _run(left, seconds, found)
        if left := [name for name in left if name not in found]:
            found[left[0]] = Probed(problem)
    return found


def _run(names: list[str], seconds: float, found: dict[str, Probed]) -> str:
    """Run the child and take down what it says; how it ended, for the one that it did not come to the end of."""
    launch = str(Path(__file__).with_name("launch.py"))
    command = [sys.executable, launch, "ark.toolkit.probe", *names]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)  # fmt: skip
        output, end = done.stdout, f"its process ended with code {done.returncode}"
        if done.returncode < 0:
            end = f"its process was killed by signal {-done.returncode}"
        elif lines := done.stderr.decode(errors="replace").strip().splitlines():
            end = f"{end} ({lines[-1]})"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"it did not end within {seconds:.0f} seconds"
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("ark-probe "):
            name, problem, facts = json.loads(line.removeprefix("ark-probe "))
            found[name] = Probed(problem, facts)
    return end


def _try(name: str) -> dict[str, Any]:
    """Import one package and run what Ark calls of it; raises whatever it raises."""
    if name == "cuda_graph":
        from .fused.graph_attempt import attempt

        return {"backend": attempt()}
    module = importlib.import_module(name)
    version = str(getattr(module, "__version__", None) or package_version(name))
    if name == "torch":
        return {"version": version, **_torch_facts(module)}
    facts: dict[str, Any] = {"version": version}
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        facts["ran"] = _triton_kernel() if name == "triton" else _attention_kernels(name)
    return facts


def _torch_facts(torch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    facts["gpus"] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            capability = torch.cuda.get_device_capability(number)
            gpu: dict[str, Any] = {"name": torch.cuda.get_device_name(number), "capability": capability, "free": free, "total": total}  # fmt: skip
            try:
                torch.zeros(1, device=f"cuda:{number}").add_(1).item()
            except RuntimeError as error:  # no kernels for this card, or no memory
                gpu["problem"] = str(error).strip().splitlines()[0]
            facts["gpus"].append(gpu)
    return facts


def _triton_kernel() -> str:
    """Compile and run one of Ark's kernels, and compare it with plain torch."""
    import torch

    from .fused import fast, reference

    x, weight = torch.randn(64, 256, device="cuda"), torch.rand(256, device="cuda")
    ours, plain = (
        ops.add_norm(x.clone(), None, weight, 1e-6, x.dtype) for ops in (fast, reference)
    )
    error = float((ours - plain).norm() / plain.norm())
    if not error < 1e-4:
        raise ArithmeticError(f"a kernel gives wrong numbers (relative error {error:.3g})")
    return "a kernel was compiled and run"


def _attention_kernels(package: str) -> dict[str, str]:
    """Run a package's kernels on something small: what each one says."""
    import torch

    from .combustion import measure_kernels
    from .hardware import probe_hardware
    from .kernels import KERNELS

    device = torch.device("cuda")
    hardware = probe_hardware(device)
    own = {name: kernel for name, kernel in KERNELS.items() if kernel.package == package}
    found = measure_kernels(hardware, device, (1, 2, 512, 128), torch.bfloat16, own)
    return {name: reason for name, kernel in own.items() if (reason := kernel.unavailable(hardware))} | {
        m.name: m.problem or "runs" for m in found
    }  # fmt: skip


def main(names: list[str]) -> None:
    """The child: try each and say at once what became of it."""
    for name in names:
        problem, facts = None, {}
        try:
            facts = _try(name)
        except Exception as error:  # a broken package raises whatever it likes
            lines = str(error).strip().splitlines() or [""]
            problem = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
        print("\nark-probe " + json.dumps([name, problem, facts]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
