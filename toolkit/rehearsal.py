"""Each part of Klein runs once, a few layers of it, with weights that nobody has set: before its own weights are there.

CUDA loads a kernel when it is first called, and cuDNN plans an attention or a convolution when it first sees its size:
over half a second in a first picture otherwise. What is computed is thrown away.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import autoencoder, qwen3
from .architecture import (
    HEAD_DIM,
    LATENT_CHANNELS,
    MLP,
    TXT_LEN,
    USUAL_TOKENS,
    TextEncoderDims,
    TransformerDims,
    VaeDims,
)
from .combustion import known_kernels, select_attention_kernel
from .fused.matrix import Plain
from .fused.runner import Runner, operations_for
from .hardware import probe_hardware
from .pixel_layers import COLOURS, Attention, Block, Conv, Matrix, Norm, fold
from .step import AXES, TIME_WIDTH
from .step_weights import SingleBlock, Stream, Weights

SIDE = 64  # latent positions along each side of the usual picture
LAYERS = 2  # of the text encoder
ROOM = 8 << 30  # bytes that must be free on the device
log = logging.getLogger("ark")


@dataclass(frozen=True)
class Rehearsal:
    """What is going to run.

    Attributes:
        precision: of the fused engine, see `Runner`.
        attention: a kernel's name, "auto" for what is fastest on the device, or "none" for torch's choice.
    """

    precision: str = "bf16"
    attention: str = "auto"

    def run(
        self,
        transformer: TransformerDims,
        text_encoder: TextEncoderDims,
        vae: VaeDims,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """All parts, in the order in which they are needed; what fails is only logged."""
        if torch.cuda.mem_get_info(device)[0] < ROOM:
            return
        parts: dict[str, Callable[[], object]] = {
            "text encoder": lambda: rehearse_text(text_encoder, device, dtype),
            "transformer": lambda: self._step(transformer, device, dtype),
            "VAE": lambda: rehearse_decode(vae, device, dtype),
        }
        for name, part in parts.items():
            try:
                with torch.inference_mode():
                    part()
            except Exception as error:  # the first picture will show whether it matters
                log.warning("Ark: the %s could not be rehearsed (%s).", name, error)

    def _step(self, dims: TransformerDims, device: torch.device, dtype: torch.dtype) -> None:
        hardware, shape = probe_hardware(device), (1, dims.num_heads, USUAL_TOKENS, HEAD_DIM)
        kernel = None
        # to measure now would disturb, and be disturbed
        if self.attention != "none" and (self.attention != "auto" or known_kernels(hardware, shape, dtype)):  # fmt: skip
            kernel, _ = select_attention_kernel(self.attention, hardware, device, shape, dtype)
        name = kernel.name if kernel else None
        rehearse_step(dims.hidden_size, dims.context_dim, device, dtype, self.precision, name)


def rehearse_step(
    hidden: int, context: int, device: torch.device, dtype: torch.dtype, precision: str, kernel: str | None
) -> torch.Tensor:  # fmt: skip
    """A few blocks of each kind, at the usual size.

    Args:
        hidden: the model's width.
        context: of the conditioning that it reads.
        device: to run on.
        dtype: to compute in.
        precision: see `Runner`.
        kernel: of attention, None for torch's choice.

    Returns:
        Latents of no meaning, [1, 4096, 128].
    """
    runner = Runner(device, precision)
    runner.graphs.why_not = "it runs once"
    like = torch.empty(0, dtype=dtype, device=device)

    def plain(*shape: int) -> Plain:
        return Plain(like.new_empty(shape))

    def matrix(*shape: int):  # noqa: ANN202
        return runner.matrix(like, like.new_empty(shape))

    def stream() -> Stream:
        matrices = matrix(3 * hidden, hidden), matrix(hidden, hidden), matrix(2 * MLP * hidden, hidden), matrix(hidden, MLP * hidden)  # fmt: skip
        return Stream(*matrices, like.new_empty(HEAD_DIM), like.new_empty(HEAD_DIM))

    linear_in, linear_out = matrix((3 + 2 * MLP) * hidden, hidden), matrix(hidden, (1 + MLP) * hidden)  # fmt: skip
    single = SingleBlock(linear_in, linear_out, like.new_empty(HEAD_DIM), like.new_empty(HEAD_DIM))  # fmt: skip
    weights = Weights(
        plain(hidden, LATENT_CHANNELS),
        plain(hidden, context),
        (plain(hidden, TIME_WIDTH), plain(hidden, hidden)),
        plain(6 * hidden, hidden),
        plain(6 * hidden, hidden),
        plain(3 * hidden, hidden),
        [(stream(), stream())],
        [single] * 2,  # the last one is run in another way
        plain(2 * hidden, hidden),
        plain(LATENT_CHANNELS, hidden),
        1e-6,
    )  # fmt: skip
    latents, embeds = like.new_zeros(1, SIDE**2, LATENT_CHANNELS), like.new_zeros(1, TXT_LEN, context)  # fmt: skip
    ids = torch.zeros(TXT_LEN + SIDE**2, len(AXES), device=device)
    return runner.run(weights, latents, embeds, ids, like.new_ones(1), kernel)


def rehearse_text(dims: TextEncoderDims, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A full prompt through a few layers; the states, [1, 512, 1, C] fp32."""
    width, mlp = dims.hidden_size, dims.intermediate_size
    heads, kv_heads = dims.num_heads * HEAD_DIM, dims.num_key_value_heads * HEAD_DIM
    ones = functools.partial(torch.ones, device=device)
    unset = functools.partial(torch.empty, dtype=dtype, device=device)
    layer = qwen3.Layer(
        ones(width), Plain(unset(heads + kv_heads, width)), unset(kv_heads, width), unset(width, heads),
        ones(HEAD_DIM), ones(HEAD_DIM), ones(width), Plain(unset(2 * mlp, width)), unset(width, mlp),
    )  # fmt: skip
    embeds = torch.zeros(1, TXT_LEN, width, device=device)
    present = torch.ones(1, TXT_LEN, dtype=torch.bool, device=device)
    return qwen3.hidden_states([layer] * LAYERS, embeds, present, (LAYERS,), operations_for(device)[0])  # fmt: skip


def rehearse_decode(dims: VaeDims, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Latents to a picture of the usual size, [1, 1024, 1024, 3] fp32."""
    widths = [dims.decoder_width * m for m in reversed(dims.multipliers)]
    top = widths[0]
    zeros = functools.partial(torch.zeros, device=device)

    def norm(width: int) -> Norm:
        return Norm(zeros(width), zeros(width))

    def matrix(out: int, into: int) -> Matrix:
        return Matrix(torch.empty(out, into, dtype=dtype, device=device), zeros(out))

    def conv(out: int, into: int, double: bool = False) -> Conv:
        weight = torch.empty(out, into, 3, 3, dtype=dtype, device=device)
        kept = [w.contiguous(memory_format=torch.channels_last) for w in (weight, *([fold(weight)] if double else []))]  # fmt: skip
        return Conv(kept[0], zeros(out), *kept[1:])

    def block(out: int, into: int) -> Block:
        return Block(norm(into), conv(out, into), norm(out), conv(out, out), matrix(out, into) if out != into else None)  # fmt: skip

    levels = []
    for number, (into, out) in enumerate(zip([top, *widths], widths, strict=False)):
        blocks = [block(out, into), *(block(out, out) for _ in range(dims.res_blocks))]
        levels.append((blocks, conv(out, out, True) if number < len(widths) - 1 else None))
    middle = block(top, top), Attention(norm(top), matrix(3 * top, top), matrix(top, top)), block(top, top)  # fmt: skip
    latent = dims.latent_channels
    decoder = autoencoder.Decoder(
        zeros(LATENT_CHANNELS), zeros(LATENT_CHANNELS), matrix(latent, latent), conv(top, latent), middle, levels,
        norm(widths[-1]), conv(COLOURS, widths[-1]),
    )  # fmt: skip
    latents = zeros(1, LATENT_CHANNELS, SIDE, SIDE)
    return autoencoder.decode(decoder, latents, operations_for(device)[0])
