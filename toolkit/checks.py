"""What the doctor looks at. Each check is guarded: one that fails is a line with its reason.

Importing this needs nothing but Python; what needs torch imports it where it is used.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .cache import cache_folder
from .disk import find_model, read_speed
from .driver import Driver, ask_driver
from .finding import BAD, NOTE, OK, Finding, Subject, numbers
from .packages import PACKAGES, package_version
from .probe import Probed, probe

PYTHONS = (3, 10), (3, 13)  # the first and the last that Ark was tested with
HOST_SINCE = (0, 3, 75)  # has V3 nodes
TORCH_SINCE = (2, 4)  # has torch.library.custom_op
TORCH_KEEPS = (2, 9)  # writes to disk what it compiled and traced
CACHE = 2 << 30  # bytes that Ark's caches may come to: embeddings and compiled code
INSTALL = {
    "triton": "pip install triton (Windows: pip install triton-windows)",
    "sageattention": "pip install sageattention==1.0.6",
    "comfy_kitchen": "pip install comfy-kitchen",
}  # of the optional packages, those that a registry has


Findings = Iterable[Finding]


def run_checks(subject: Subject) -> tuple[list[Finding], list[Any]]:
    """Look at everything.

    Returns:
        The findings and the plan, the plan empty where torch cannot be used.
    """
    found: list[Finding] = []

    def check(name: str, work: Callable[[], Findings]) -> None:
        try:
            found.extend(work())
        except Exception as error:  # whatever a broken machine raises
            found.append(
                Finding(name, BAD, f"could not be asked ({type(error).__name__}: {error})")
            )

    check("python", check_python)
    check("ComfyUI", lambda: check_host(subject.host))
    driver = ask_driver()
    check("driver", lambda: check_driver(driver))
    installed = tuple(name for name in PACKAGES if _installed(name))
    probed = probe(("torch", *installed))
    torch = probed["torch"]
    check("torch", lambda: check_torch(torch, driver))
    usable = torch.problem is None and numbers(torch.facts["version"]) >= TORCH_SINCE
    if usable:
        check("gpu", lambda: check_gpus(torch, driver))
    gpu = usable and bool(torch.facts["gpus"])
    for name in installed:
        check(name, functools.partial(check_package, name, probed[name], usable))
    absent = [name for name in PACKAGES if name not in installed]
    check("packages", lambda: check_absent(absent, gpu))
    check("disk", lambda: check_disk(subject))
    check("cache", check_cache)
    if not usable:
        return found, []
    plan: list[Any] = []

    def with_torch() -> Findings:  # in one check, as the import may fail
        from .combinations import check_combinations, check_pinning, make_plan, usual_device

        device = subject.device or usual_device()
        check("pinning", check_pinning)
        check("combinations", lambda: check_combinations(probed, device))
        plan.extend(make_plan(subject, probed, device))
        return []

    check("plan", with_torch)
    return found, plan


def _installed(package: str) -> bool:
    try:
        return package_version(package) is not None
    except Exception:  # so broken that even its place cannot be asked: trying it will say why
        return True


def check_python() -> Findings:
    """Whether Ark was tested with it."""
    text = f"{sys.version.split()[0]}\n{sys.executable}"
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        yield Finding("python", OK, text)
    else:
        yield Finding("python", NOTE, text, f"Ark was tested with Python {first} to {last}.")


def check_host(version: str | None) -> Findings:
    """Whether it has V3 nodes."""
    if version is None:
        yield Finding("ComfyUI", NOTE, "none was named", "Name its folder with --comfyui, to have its models looked at.")  # fmt: skip
    elif numbers(version) < HOST_SINCE:
        yield Finding("ComfyUI", BAD, f"{version} has no V3 nodes", "Update ComfyUI to 0.3.75 or later.")  # fmt: skip
    else:
        yield Finding("ComfyUI", OK, version)


def check_driver(driver: Driver) -> Findings:
    """Whether it answers."""
    if driver.problem:
        remedy = "Restart the machine after an update of the driver, or install it anew."
        yield Finding("driver", BAD if driver.broken else NOTE, driver.problem, remedy * driver.broken)  # fmt: skip
        return
    cuda = f"up to CUDA {'.'.join(map(str, driver.cuda))}, " if driver.cuda > (0,) else ""
    yield Finding("driver", OK, f"{driver.version}, {cuda}{', '.join(driver.cards)}")


def check_torch(torch: Probed, driver: Driver) -> Findings:
    """Whether it can be imported, is new enough, and of the right kind for the card."""
    if torch.problem:
        yield Finding("torch", BAD, f"cannot be used: {torch.problem}", "Install torch anew, see pytorch.org; ComfyUI itself does not start without it.")  # fmt: skip
        return
    facts, since = torch.facts, ".".join(map(str, TORCH_SINCE))
    kind = f"CUDA {facts['cuda']}" if facts.get("cuda") else f"ROCm {facts['hip']}" if facts.get("hip") else "for CPU"  # fmt: skip
    text = f"{facts['version']} ({kind})"
    if numbers(facts["version"]) < TORCH_SINCE:
        yield Finding("torch", BAD, f"{text} is older than {since}, which Ark needs", "Update torch, see pytorch.org.")  # fmt: skip
    elif driver.cards and kind == "for CPU":
        yield Finding("torch", BAD, f"{text} cannot use the {driver.cards[0]}", "Install torch for CUDA, see pytorch.org.")  # fmt: skip
    elif numbers(facts["version"]) < TORCH_KEEPS:
        yield Finding("torch", NOTE, f"{text}: what compiled blocks traced is not kept for the next start", "torch 2.9 or later keeps it.")  # fmt: skip
    else:
        yield Finding("torch", OK, text)


def check_gpus(torch: Probed, driver: Driver) -> Findings:
    """What torch can use."""
    for gpu in torch.facts["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        memory = f"{gpu['free'] / 1e9:.1f} of {gpu['total'] / 1e9:.1f} GB free"
        text = f"{gpu['name']}, compute capability {capability}, {memory}"
        if problem := gpu.get("problem"):
            yield Finding("gpu", BAD, f"{text}; nothing runs on it: {problem}", "Close what uses it; if its architecture is meant, install a torch that was built for it.")  # fmt: skip
        else:
            yield Finding("gpu", OK, text)
    if torch.facts["gpus"]:
        return
    if not driver.cards:
        yield Finding("gpu", NOTE, "none that torch can use: all runs on the CPU, which suits the embedded model only")  # fmt: skip
        return
    needed = numbers(torch.facts["cuda"] or "")
    if needed[:1] > driver.cuda[:1] > (0,):
        yield Finding("gpu", BAD, f"the driver runs CUDA up to {driver.cuda[0]}, torch needs {needed[0]}", "Update NVIDIA's driver, or install torch for an older CUDA.")  # fmt: skip
    elif needed:
        yield Finding("gpu", BAD, f"torch cannot use the {driver.cards[0]}", "Look at CUDA_VISIBLE_DEVICES, and restart the machine after an update of the driver.")  # fmt: skip


def check_package(name: str, probed: Probed, usable: bool) -> Findings:
    """Whether an optional package works.

    Args:
        name: the package's.
        probed: what became of it.
        usable: whether torch is.
    """
    if probed.problem:
        yield Finding(name, BAD, f"installed, but does not work: {probed.problem}", f"Install it anew, or remove it: pip uninstall {name.partition('.')[0]}")  # fmt: skip
        return
    version, ran = probed.facts["version"], probed.facts.get("ran")
    if isinstance(ran, dict) and ran:  # its attention kernels
        good = any(what == "runs" for what in ran.values())
        lines = [version, *(f"{kernel}: {what}" for kernel, what in ran.items())]
        yield Finding(name, OK if good else NOTE, "\n".join(lines))
    elif ran:
        yield Finding(name, OK, f"{version}, {ran}")
    elif ran is not None:  # no kernel of its own
        yield Finding(name, OK, f"{version}, can be imported")
    else:
        why = "there is no GPU to run it on" if usable else "torch, which it needs, cannot be used"
        yield Finding(name, OK, f"{version}, can be imported; {why}")


def check_absent(names: list[str], gpu: bool) -> Findings:
    """The optional packages that are not installed; without a GPU none of them would be of use.

    Args:
        names: the packages'.
        gpu: whether there is one that torch can use.
    """
    if "triton" in names and gpu:
        yield Finding("triton", NOTE, "not installed: the fused engine and compiling need it", INSTALL["triton"])  # fmt: skip
    if names:
        how = "; ".join(INSTALL[name] for name in names if name in INSTALL and gpu)
        yield Finding("packages", OK, f"not installed, and optional: {', '.join(names)}", how)


def check_disk(subject: Subject) -> Findings:
    """How fast a model's file is read."""
    if not subject.models:
        yield Finding("disk", NOTE, "no folder of models was named", "Name one with --models.")
        return
    where = ", ".join(map(str, subject.models))
    if (path := find_model(subject.models)) is None:
        yield Finding("disk", NOTE, f"there is no .safetensors file in {where}")
        return
    free = shutil.disk_usage(path).free
    text = f"{path.name} ({path.stat().st_size / 1e9:.2f} GB, {free / 1e9:.0f} GB free beside it)"
    if not subject.measure:
        yield Finding("disk", OK, f"{text}, not read")
        return
    speed = read_speed(path)
    how = "past the page cache" if speed.direct else "through the page cache, so that some of it may have been in memory"  # fmt: skip
    yield Finding("disk", OK, f"{text}: {speed.rate / 1e9:.2f} GB/s, {speed.nbytes / 1e6:.0f} MB read {how}")  # fmt: skip


def check_cache() -> Findings:
    """Whether there is room for what Ark keeps."""
    folder = cache_folder()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        yield Finding("cache", BAD, f"{there} cannot be written", "Set ARK_CACHE_DIR to a folder that can.")  # fmt: skip
        return
    used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(there).free
    text = f"{folder}, {used / 1e6:.0f} MB used, {free / 1e9:.1f} GB free"
    if free < CACHE:
        yield Finding("cache", NOTE, text, "Free 2 GB there, or set ARK_CACHE_DIR to a folder on another disk.")  # fmt: skip
    else:
        yield Finding("cache", OK, text)
