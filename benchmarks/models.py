"""Files of Klein's true names and shapes with random weights, for benchmarks: no real weights can be had here."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ark.toolkit.hardware import probe_hardware
from ark.toolkit.kernels import KERNELS

# precision and attention kernel of cases whose kernel is taken by name only
BY_NAME = {"bf16_flash4": ("bf16", "flash4"), "fp8_attention": ("fp8", "cudnn_fp8")}
Shapes = dict[str, tuple[int, ...]]


def by_name(device: torch.device | str) -> dict[str, tuple[str, str]]:
    """Those of BY_NAME that run on a device."""
    hardware = probe_hardware(torch.device(device))
    return {case: how for case, how in BY_NAME.items() if KERNELS[how[1]].unavailable(hardware) is None}  # fmt: skip


def transformer_shapes(hidden: int = 3072, double: int = 5, single: int = 20, context: int = 7680) -> Shapes:  # fmt: skip
    """The transformer's tensors, by default Klein 4B's."""
    h, linear = hidden, {"img_in": (hidden, 128), "txt_in": (hidden, context)}
    linear |= {"time_in.in_layer": (h, 256), "time_in.out_layer": (h, h)}
    norms = []
    for block, stream in itertools.product(range(double), ("img", "txt")):
        at = f"double_blocks.{block}.{stream}_"
        linear |= {f"{at}attn.qkv": (3 * h, h), f"{at}attn.proj": (h, h), f"{at}mlp.0": (6 * h, h), f"{at}mlp.2": (h, 3 * h)}  # fmt: skip
        norms.append(f"{at}attn.norm")
    for block in range(single):
        linear |= {f"single_blocks.{block}.linear1": (9 * h, h), f"single_blocks.{block}.linear2": (h, 4 * h)}  # fmt: skip
        norms.append(f"single_blocks.{block}.norm")
    linear |= {f"double_stream_modulation_{stream}.lin": (6 * h, h) for stream in ("img", "txt")}
    linear |= {"single_stream_modulation.lin": (3 * h, h), "final_layer.linear": (128, h), "final_layer.adaLN_modulation.1": (2 * h, h)}  # fmt: skip
    scales = {f"{at}.{which}_norm.scale": (128,) for at in norms for which in ("query", "key")}
    return {f"{name}.weight": shape for name, shape in linear.items()} | scales


def text_encoder_shapes(hidden: int = 2560, mlp: int = 9728, layers: int = 36, heads: int = 32, kv: int = 8, vocab: int = 151936) -> Shapes:  # fmt: skip
    """The text encoder's tensors, by default Qwen3-4B's."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        parts = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        parts |= {"self_attn.q_norm": (128,), "self_attn.k_norm": (128,)}
        parts |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}  # fmt: skip
        parts |= {"self_attn.q_proj": (128 * heads, hidden), "self_attn.k_proj": (128 * kv, hidden)}
        parts |= {"self_attn.v_proj": (128 * kv, hidden), "self_attn.o_proj": (hidden, 128 * heads)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def vae_shapes(width: int = 128, multipliers: tuple[int, ...] = (1, 2, 4, 4), z: int = 32) -> Shapes:  # fmt: skip
    """The autoencoder's tensors, by default FLUX.2's."""
    shapes: Shapes = {"bn.running_mean": (4 * z,), "bn.running_var": (4 * z,)}

    def layer(name: str, out: int, *rest: int) -> None:
        shapes.update({f"{name}.weight": (out, *rest), f"{name}.bias": (out,)})

    def res(name: str, into: int, out: int) -> None:
        layer(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3, 3)
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1, 1)

    def middle(name: str, at: int) -> None:
        res(f"{name}.mid.block_1", at, at)
        layer(f"{name}.mid.attn_1.norm", at)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.mid.attn_1.{part}", at, at, 1, 1)
        res(f"{name}.mid.block_2", at, at)

    widths = [width * m for m in multipliers]
    top, levels = widths[-1], len(widths)
    layer("encoder.conv_in", width, 3, 3, 3)
    layer("decoder.conv_in", top, z, 3, 3)
    for level, (into, out) in enumerate(zip([width, *widths], widths, strict=False)):
        for block in range(2):
            res(f"encoder.down.{level}.block.{block}", into if block == 0 else out, out)
        if level < levels - 1:
            layer(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    for level, (out, into) in enumerate(zip(widths, [*widths[1:], top], strict=True)):
        for block in range(3):
            res(f"decoder.up.{level}.block.{block}", into if block == 0 else out, out)
        if level:
            layer(f"decoder.up.{level}.upsample.conv", out, out, 3, 3)
    for side in ("encoder", "decoder"):
        middle(side, top)
    layer("encoder.norm_out", top)
    layer("decoder.norm_out", width)
    layer("encoder.conv_out", 2 * z, top, 3, 3)
    layer("decoder.conv_out", 3, width, 3, 3)
    layer("encoder.quant_conv", 2 * z, 2 * z, 1, 1)
    layer("decoder.post_quant_conv", z, z, 1, 1)
    return shapes


@contextlib.contextmanager
def model_folder(kept: Path | None) -> Iterator[Path]:
    """The folder for the files: one that is kept, with what is in it already, or else a temporary one."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def write_random(path: Path, shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write random weights of a spread that keeps activations finite, unless there is such a file.

    The file is on the disk and no longer dirty on return.
    """
    if path.exists():
        with safe_open(path, "pt") as file:
            if {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes:  # noqa: SIM118
                return path
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:  # norms, biases, variances
            return torch.full(shape, 0.0 if name.endswith((".bias", "mean")) else 1.0, dtype=dtype)
        spread = torch.tensor(shape[1:]).prod().item() ** -0.5
        return (torch.randn(shape, device=device) * spread).to(dtype).cpu()

    save_file({name: make(name, shape) for name, shape in shapes.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path
