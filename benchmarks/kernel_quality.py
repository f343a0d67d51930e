"""What each kernel and engine does to pictures: `python benchmarks/kernel_quality.py --comfyui DIR [--captions 200]`.

The embedded model renders the same held-out captions from the same noise with every attention kernel that runs here, with
compiled blocks, and with the fused engine, in one process with ComfyUI's real model objects. The classifier of
`tiny_quality.py` judges the pictures, and the latents are compared with those of the host's own forward in fp32. On a CPU
only torch's math kernel and the fused engine can run, which tests the benchmark itself (then nothing is recorded).
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from ark.assets import scenes
from ark.benchmarks.klein import STEPS, import_host
from ark.benchmarks.record import row, write_record

BATCH, SIDE = 20, 16  # pictures at once; latent positions across
REFERENCE = "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=200)
    args = parser.parse_args()
    known = import_host(args.comfyui)
    import torch

    with torch.inference_mode():
        found = draw(scenes.sample_scenes(args.captions, 1, held_out=True))
    exact, reference = found.pop(REFERENCE)
    rows = []
    for mode, (latents, share) in found.items():
        error = float((latents - exact).norm() / exact.norm())
        note = f"latents: {error:.4f} from those in fp32"
        rows.append(row(mode, share, "share of captions right", args.captions, {REFERENCE: reference}, note=note))  # fmt: skip
        print(f"{mode:16} {share:7.1%}  {note}", flush=True)
    if torch.cuda.is_available():
        versions = {"python": platform.python_version(), "torch": torch.__version__, "comfyui": known}  # fmt: skip
        print(write_record("kernel_quality", torch.cuda.get_device_name(), versions, rows))


def draw(asked: list[tuple[Any, str]]) -> dict[str, tuple[Any, float]]:
    """Latents [len(asked), 128, SIDE, SIDE] and the share of captions drawn right, by mode."""
    import torch

    from ark.benchmarks.classifier import judge
    from ark.benchmarks.klein import in_fp32
    from ark.patches.attention import set_attention
    from ark.patches.compile import set_compile
    from ark.patches.fused import set_fused
    from ark.patches.text_encoder import load_text_encoder
    from ark.patches.transformer import load_transformer
    from ark.patches.vae import load_vae
    from ark.toolkit.combustion import unavailable_kernels
    from ark.toolkit.embedded import embedded_folders
    from ark.toolkit.hardware import probe_hardware
    from ark.toolkit.kernels import KERNELS

    folders = embedded_folders()
    clip, _ = load_text_encoder(folders["text_encoders"] / "ark_tiny_qwen3.safetensors")
    model, _ = load_transformer(folders["diffusion_models"] / "ark_tiny_klein.safetensors")
    vae, _ = load_vae(folders["vae"] / "ark_tiny_flux2_vae.safetensors")
    prompts = torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for _, text in asked])
    missing = unavailable_kernels(probe_hardware(model.load_device))
    models = {"comfyui": model}
    models |= {name: set_attention(model, name)[0] for name in KERNELS if name not in missing}
    best, _ = set_attention(model, "auto")
    if torch.cuda.is_available():  # takes minutes on a CPU
        models["compiled"], *_ = set_compile(best, "default")
    models |= {f"fused_{precision}": set_fused(best, precision)[0] for precision in ("bf16", "fp8")}
    if "cudnn_fp8" in models:
        models["fused_fp8_cudnn_fp8"], _ = set_fused(models["cudnn_fp8"], "fp8")
    found = {}
    for mode in [*models, REFERENCE]:
        mine = models[mode] if mode in models else in_fp32(model)
        latents = torch.cat([sample(mine, part, number) for number, part in enumerate(prompts.split(BATCH))])  # fmt: skip
        pictures = torch.cat([vae.decode(part).cpu() for part in latents.split(BATCH)])
        pixels = (pictures * 255 + 0.5).to(torch.uint8).numpy()
        right = [all(judge(picture, scene).values()) for picture, (scene, _) in zip(pixels, asked, strict=True)]  # fmt: skip
        found[mode] = latents, sum(right) / len(right)
        print(mode, found[mode][1], flush=True)
    return found


def sample(model, prompts, seed: int):  # noqa: ANN001, ANN201
    """Latents [len(prompts), 128, SIDE, SIDE] of four steps."""
    import torch

    from ark.patches.sampling import sample_klein

    latent = {"samples": torch.zeros(len(prompts), 128, SIDE, SIDE)}
    positive = [[prompts, {"pooled_output": None}]]
    return sample_klein(model, positive, latent, seed, STEPS, 1.0)["samples"].cpu()


if __name__ == "__main__":
    main()
