"""What the benchmarks of sampling share: a host's modules, its MODEL of Klein, and one timed run of four steps."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

STEPS = 4


def import_host(comfyui: Path) -> str:
    """Make the host's modules importable, as its main does; Ark's own come after them. Returns the host's version."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(comfyui))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return (comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]


def load_klein(folder: Path, tiny: bool) -> tuple[object, int]:
    """The MODEL, with Klein 4B's true shapes and random weights or the embedded one; and the conditioning's width."""
    from ark.benchmarks.models import transformer_shapes, write_random
    from ark.patches.transformer import load_transformer
    from ark.toolkit.embedded import ASSETS

    path = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
    if not tiny:
        path = folder / "flux-2-klein-4b.safetensors"
        write_random(path, transformer_shapes())
    model, dims = load_transformer(path)
    return model, dims.context_dim


def four_steps(model, width: int, size: int, seed: int = 0, batch: int = 1, references: int = 0):  # noqa: ANN001
    """Seconds of four steps, to the last kernel's end, and the latents [B, 128, size / 16, size / 16].

    Prompt and references come from a GPU, as in a graph: for each side what lies there need not be brought again.
    """
    import comfy.model_management
    import torch

    from ark.patches.deliver import deliver
    from ark.patches.sampling import sample_klein

    device, cpu = comfy.model_management.get_torch_device(), torch.device("cpu")

    def drawn(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator).to(device)
        return deliver(made, cpu, wanted_there=True)

    side = size // 16
    generator = torch.Generator().manual_seed(seed)
    options: dict = {"pooled_output": None}
    if references:
        options["reference_latents"] = [drawn(1, 128, side, side) for _ in range(references)]
    positive = [[drawn(1, 512, width), options]]
    latent = {"samples": torch.zeros(batch, 128, side, side)}
    start = time.perf_counter()
    samples = sample_klein(model, positive, latent, seed, STEPS, 1.0)["samples"].cpu()  # waits
    return time.perf_counter() - start, samples


def floor(engine, model, size: int, batch: int = 1, references: int = 0) -> float:  # noqa: ANN001
    """Milliseconds of four steps' matrices and attention alone, each at its exact shape."""
    import torch
    import torch.nn.functional as F

    from ark.benchmarks.models import BY_NAME
    from ark.toolkit.kernels import KERNELS

    flux = model.model.diffusion_model
    dtype, device = flux.img_in.weight.dtype, flux.img_in.weight.device
    weights = engine.record(flux, torch.empty(0, dtype=dtype, device=device))
    lengths = (batch * 512, batch * (1 + references) * (size // 16) ** 2)
    heads = flux.num_heads
    qkv = torch.randn(3, batch, sum(lengths) // batch, heads, 128, device=device, dtype=dtype)
    override = model.model_options["transformer_options"].get("optimized_attention_override")
    kernel = override and override.kernel
    if kernel in {attention for _, attention in BY_NAME.values()}:
        kernel = "cudnn"
    attend = KERNELS[kernel].attend if kernel else F.scaled_dot_product_attention
    inputs: dict = {}

    def call(matrix, length: int) -> None:  # noqa: ANN001
        width = matrix.weight.shape[1]
        if (length, width, matrix.quantises) not in inputs:
            x = torch.randn(length, width, device=device, dtype=dtype)
            inputs[length, width, matrix.quantises] = engine.runner.operations.quantise(x) if matrix.quantises else x  # fmt: skip
        matrix(inputs[length, width, matrix.quantises])

    def step() -> None:
        for streams in weights.double:
            for stream, length in zip(streams, lengths, strict=True):
                for matrix in (stream.qkv, stream.proj, stream.mlp_in, stream.mlp_out):
                    call(matrix, length)
            attend(*qkv.transpose(2, 3))
        for block in weights.single:
            call(block.linear_in, sum(lengths))
            attend(*qkv.transpose(2, 3))
            call(block.linear_out, sum(lengths))

    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def in_fp32(model):  # noqa: ANN001, ANN201
    """The host's own model with all its weights in fp32; the last thing that is done with it."""
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()  # whatever it has on the device
    flux = model.model.diffusion_model.float()
    flux.dtype, model.model.manual_cast_dtype = torch.float32, torch.float32
    return model
