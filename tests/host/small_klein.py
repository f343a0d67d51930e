"""A random FLUX.2-Klein of one head and two blocks: as fast as a test needs it, under the names that ComfyUI reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, LATENT = 128, 128
# what the embedded text encoder makes: three layers of 64
CONTEXT = 192


def write_small_klein(path: Path) -> Path:
    """Write the file.

    Returns:
        Its path.
    """
    size = HIDDEN
    shapes = {
        "img_in.weight": (size, LATENT),
        "txt_in.weight": (size, CONTEXT),
        "time_in.in_layer.weight": (size, 256),
        "time_in.out_layer.weight": (size, size),
        "double_stream_modulation_img.lin.weight": (6 * size, size),
        "double_stream_modulation_txt.lin.weight": (6 * size, size),
        "single_stream_modulation.lin.weight": (3 * size, size),
        "final_layer.linear.weight": (LATENT, size),
        "final_layer.adaLN_modulation.1.weight": (2 * size, size),
        "single_blocks.0.linear1.weight": (9 * size, size),
        "single_blocks.0.linear2.weight": (size, 4 * size),
        "single_blocks.0.norm.query_norm.scale": (size,),
        "single_blocks.0.norm.key_norm.scale": (size,),
    }
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= {
            f"{block}_attn.qkv.weight": (3 * size, size),
            f"{block}_attn.proj.weight": (size, size),
            f"{block}_attn.norm.query_norm.scale": (size,),
            f"{block}_attn.norm.key_norm.scale": (size,),
            f"{block}_mlp.0.weight": (6 * size, size),
            f"{block}_mlp.2.weight": (size, 3 * size),
        }
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return path


def lora_of(strength: float = 0.3) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on the first qkv, under the names that ComfyUI reads."""
    generator = torch.Generator().manual_seed(6)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    return {
        f"{name}.lora_A.weight": torch.randn(4, HIDDEN, generator=generator),
        f"{name}.lora_B.weight": torch.randn(3 * HIDDEN, 4, generator=generator) * strength,
    }
