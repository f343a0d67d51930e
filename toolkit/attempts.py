"""What a package, or the GPU, does when it is used: for a process that may die of it, see `probe.py`.

`python toolkit/launch.py ark.toolkit.attempts names...` prints one JSON value for each name as soon as it is known, so that
the parent knows who it was when the process dies.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from .packages import package_version


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
