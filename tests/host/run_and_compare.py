"""Runs Ark's nodes inside a ComfyUI without its server and compares the process's globals before and after.

Started by test_globals.py: `python run_and_compare.py COMFYUI PACK_PARENT`. Prints what changed and exits 1, or "unchanged".
"""

import asyncio
import hashlib
import importlib.util
import logging
import os
import sys
import types
from pathlib import Path

HOST, PACK = Path(sys.argv[1]), Path(sys.argv[2], "ark").resolve()
sys.path[0] = str(HOST)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy_extras.nodes_flux  # noqa: E402
import folder_paths  # noqa: E402
import latent_preview  # noqa: E402, F401
import torch  # noqa: E402

import nodes  # noqa: E402

WATCHED = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "diffusers",
)
TORCH = (
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.attention",
    "torch.cuda",
    "torch.nn.init",
)
CLASSES = (torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm)
SETTINGS = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "grad": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "threads": torch.get_num_threads,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "matmul precision": torch.get_float32_matmul_precision,
    "cudnn benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn tf32": lambda: torch.backends.cudnn.allow_tf32,
    "matmul tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "fp16 accumulation": lambda: getattr(
        torch.backends.cuda.matmul, "allow_fp16_accumulation", None
    ),
    "sdp flash": torch.backends.cuda.flash_sdp_enabled,
    "sdp efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "sdp math": torch.backends.cuda.math_sdp_enabled,
    "sdp cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "sdp priority": lambda: getattr(torch._C, "_get_sdp_priority_order", lambda: None)(),
    "log filters": lambda: [list(map(id, logging.getLogger().filters)), logging.getLogger().level],
    "log handlers": lambda: list(map(id, logging.getLogger().handlers)),
    "sys.path": lambda: list(sys.path),
    "folder": os.getcwd,
}
PLAIN = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device)


def value_of(value: object, depth: int = 0) -> object:
    """What can be compared later: plain values as they are, containers by content, the rest by identity."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, (tuple, list, set, frozenset)) and depth < 3 and len(value) < 500:
        return (type(value), sorted(repr(value_of(item, depth + 1)) for item in value))
    if isinstance(value, dict) and depth < 3 and len(value) < 2000:
        return {repr(key): value_of(item, depth + 1) for key, item in value.items()}
    return id(value)


def snapshot() -> tuple[dict, list]:
    """Every attribute of the watched modules and of their classes, and the objects themselves, so that no id is reused."""
    seen, kept = {}, []
    for name, module in list(sys.modules.items()):
        if not isinstance(module, types.ModuleType) or not (
            name.split(".")[0] in WATCHED or name in TORCH
        ):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType) or attribute.startswith("__"):
                continue
            kept.append(value)
            seen[f"{name}.{attribute}"] = value_of(value)
            if isinstance(value, type) and value.__module__ == name:
                for member, held in list(vars(value).items()):
                    if not member.startswith(("__", "_abc")) or member in (
                        "__init__",
                        "__call__",
                        "__new__",
                    ):
                        kept.append(held)
                        seen[f"{name}.{attribute}.{member}"] = value_of(held)
    for watched in CLASSES:
        for member, held in list(vars(watched).items()):
            kept.append(held)
            seen[f"{watched.__module__}.{watched.__name__}.{member}"] = value_of(held)
    for key, value in os.environ.items():
        seen[f"os.environ[{key}]"] = value
    for key, read in SETTINGS.items():
        seen[f"torch: {key}"] = value_of(read())
    if "torch._dynamo.config" in sys.modules:
        for key, value in sys.modules["torch._dynamo.config"].get_config_copy().items():
            seen[f"torch._dynamo.config.{key}"] = value_of(value)
    return seen, kept


def changes(before: dict, after: dict) -> list[str]:
    """Names that differ. A module imported meanwhile brings new names, which change nothing that was there."""
    modules = {name.rpartition(".")[0] for name in before}
    added = [name for name in after if name not in before and name.rpartition(".")[0] in modules]
    return sorted(
        [name for name in before if name not in after or after[name] != before[name]] + added
    )


def digests(files: list[str]) -> list[str]:
    """SHA-256 of each file."""
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


def load_pack() -> types.ModuleType:
    """Import the pack as the host does: as a package, from its folder."""
    spec = importlib.util.spec_from_file_location(
        "ark", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["ark"] = module
    spec.loader.exec_module(module)
    return module


def run(
    loader: type, combustion: type, sampler: type, files: list[str], attention: str
) -> torch.Tensor:
    """Load, set attention, encode, sample, decode."""
    with torch.inference_mode():
        model, clip, vae = loader.execute(*files).args
        model = combustion.execute(model, attention).args[0]
        (conditioning,) = nodes.CLIPTextEncode().encode(
            clip, "a small red circle on a white background"
        )
        (latent,) = comfy_extras.nodes_flux.EmptyFlux2LatentImage.execute(64, 64, 1).args
        (latent,) = sampler.execute(model, conditioning, latent, 42, 4, 1.0).args
        return nodes.VAEDecode().decode(vae, latent)[0]


def main() -> int:
    """Run and compare."""
    pack = load_pack()
    found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    by_id = {node.define_schema().node_id: node for node in found}
    parts = [by_id[name] for name in ("ArkFastLoader", "ArkSageCombustion", "ArkSampler4Step")]
    files = [
        "ark_tiny_klein.safetensors",
        "ark_tiny_qwen3.safetensors",
        "ark_tiny_flux2_vae.safetensors",
    ]
    paths = [
        folder_paths.get_full_path(kind, name)
        for kind, name in zip(("diffusion_models", "text_encoders", "vae"), files, strict=True)
    ]
    digests_before = digests(paths)
    before, kept = snapshot()
    for attention in ("auto", "math", "none"):
        image = run(*parts, files, attention)
        assert image.shape == (1, 64, 64, 3) and bool(torch.isfinite(image).all())
    comfy.model_management.unload_all_models()
    after, kept_after = snapshot()
    found_changes = changes(before, after)
    if digests(paths) != digests_before:
        found_changes.append("a model file")
    comfy.model_management.get_torch_device, original = (
        None,
        comfy.model_management.get_torch_device,
    )
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    caught = set(changes(after, snapshot()[0]))
    comfy.model_management.get_torch_device = original
    assert {"comfy.model_management.get_torch_device", "torch: cudnn benchmark"} <= caught, (
        "this comparison is blind"
    )
    print(
        f"{len(before)} globals:",
        "\n".join(["changed", *found_changes]) if found_changes else "unchanged",
    )
    return bool(found_changes)


if __name__ == "__main__":
    sys.exit(main())
