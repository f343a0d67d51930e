"""diffusers' autoencoder in Ark's engine: on the object, removable, the library untouched.

diffusers runs its own modules wherever the engine does not fit: on a CPU, from weights in anything but bf16, in tiles, with
gradients, and with modules that somebody has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..toolkit.architecture import SPATIAL_FACTOR
from ..toolkit.autoencoder import from_pixels, to_pixels
from ..toolkit.fused.graph import Graphs
from ..toolkit.fused.runner import Unknown, operations_for
from ..toolkit.pixel_layers import COLOURS, USUAL
from ..toolkit.pixel_memory import BAND, MOST, RECORDED, SHARE, needed, numbers
from ..toolkit.pixel_records import check_weights
from ..toolkit.sources import Sources
from ..toolkit.text_engine import hooked
from .vae_diffusers_record import read_decoder, read_encoder

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16,)
PIXELS_OF_LATENTS = SPATIAL_FACTOR // 2  # px along each side of what the encoder makes
READ = {"decode": read_decoder, "encode": read_encoder}
RUN: dict[str, Any] = {"decode": to_pixels, "encode": from_pixels}
log = logging.getLogger("ark")


class PipelineVaeEngine:
    """Runs one `AutoencoderKLFlux2`.

    Attributes:
        graphs: recordings, one for each shape.
        reasons: why diffusers ran it instead.
        choices: how it is computed.
    """

    def __init__(self) -> None:
        self.graphs, self.choices = Graphs(), USUAL
        self.reasons: set[str] = set()
        self._records: dict[str, tuple[Sources, Any]] = {}

    def refuse(self, reason: str) -> None:
        """The library has to run it; the log says why, once."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            log.info("Ark VAE: diffusers' own code runs (%s).", reason)

    def release(self) -> None:
        """Give up everything that lies on the device."""
        self.graphs.clear()
        self._records.clear()

    def record(self, vae: Any, way: str) -> Any:
        """The weights of one way, "decode" or "encode"; None if the library has to run it."""
        part = vae.decoder if way == "decode" else vae.encoder
        if hooked(vae) or any(map(hooked, part.modules())):
            self.refuse("somebody has changed the VAE")
            return None
        sources, made = self._records.get(way, (None, None))
        if sources is None or not sources.same():
            if sources is not None:
                self.release()  # recordings read what is replaced
            try:
                check_weights([*vae.parameters()], DEVICES, DTYPES)
                made = READ[way](vae)
            except Unknown as unknown:
                self.refuse(str(unknown))
                return None
            narrow = vae.post_quant_conv if way == "decode" else vae.quant_conv
            self._records[way] = Sources((part, narrow)), made
        return made

    def run(self, vae: Any, way: str, x: torch.Tensor) -> torch.Tensor | None:
        """Compute one way.

        Args:
            vae: diffusers' module.
            way: "decode" or "encode".
            x: what the module's method takes: [B, 32, H / 8, W / 8] or [B, 3, H, W].

        Returns:
            What it gives, [B, 3, H, W] or [B, 64, H / 8, W / 8]; None if the library has to run.
        """
        if vae.use_tiling or torch.is_grad_enabled() and x.requires_grad:
            self.refuse("in tiles, or with gradients")
            return None
        channels = vae.config.latent_channels if way == "decode" else COLOURS
        sides = 1 if way == "decode" else PIXELS_OF_LATENTS
        if x.ndim != 4 or x.shape[1] != channels or any(side % sides for side in x.shape[2:]):
            self.refuse("pictures of another kind")
            return None
        if (record := self.record(vae, way)) is None:
            return None
        current = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()  # fmt: skip
        with torch.no_grad(), current:  # Triton launches on the current device
            found = [self._one(record, vae, way, one.movedim(1, -1).contiguous()) for one in x.split(1)]  # fmt: skip
        return (found[0] if len(found) == 1 else torch.cat(found)).movedim(-1, 1).to(x.dtype)

    def _one(self, record: Any, vae: Any, way: str, x: torch.Tensor) -> torch.Tensor:
        """[1, H, W, C] to the same; in bands if memory is short, recorded if that is small."""
        operations, _ = operations_for(x.device)

        def work(x: torch.Tensor, choices: Any = self.choices) -> torch.Tensor:
            return RUN[way](record, x, operations, choices)

        banded = functools.partial(work, choices=dataclasses.replace(self.choices, band=BAND))
        if x.device.type != "cuda":
            return work(x)
        pixels = x.shape[1] * x.shape[2] * (PIXELS_OF_LATENTS**2 if way == "decode" else 1)
        width = (vae.decoder.conv_out if way == "decode" else vae.encoder.conv_in).weight
        size = way, pixels, width.shape[1 if way == "decode" else 0]
        free, total = torch.cuda.mem_get_info(x.device)
        free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        bytes_needed = needed(*size, width.itemsize)
        if numbers(*size) >= MOST or bytes_needed > free:
            return banded(x)
        try:
            if bytes_needed > min(RECORDED, total // SHARE):
                return work(x)
            return self.graphs.run((way, self.choices), work, x)
        except torch.cuda.OutOfMemoryError as error:
            log.warning("Ark VAE: out of memory (%s). It runs again in bands.", str(error).splitlines()[0])  # fmt: skip
        self.graphs.clear()
        torch.cuda.empty_cache()
        return banded(x)


def attach_vae(vae: Any) -> tuple[PipelineVaeEngine, Callable[[], None]]:
    """Let diffusers' autoencoder decode and encode in Ark's engine, if it fits; the engine's reasons say why not.

    Args:
        vae: an `AutoencoderKLFlux2`, on the device that it will run on.

    Returns:
        The engine, and a function that undoes it.
    """
    engine, methods = PipelineVaeEngine(), {way: f"_{way}" for way in RUN}
    if type(vae).__name__ != "AutoencoderKLFlux2":
        engine.refuse("it is not FLUX.2's")
    elif any(method in vars(vae) for method in methods.values()):
        engine.refuse("somebody has changed the VAE")
    if engine.reasons or engine.record(vae, "decode") is None:
        return engine, lambda: None

    def decode(
        z: torch.Tensor, return_dict: bool = True
    ) -> Any:  # z in fp32, too: so is the picture then
        own = type(vae)._decode
        if (picture := engine.run(vae, "decode", z)) is None:
            return own(vae, z.to(vae.dtype), return_dict=return_dict)
        return own.__globals__["DecoderOutput"](sample=picture) if return_dict else (picture,)

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = engine.run(vae, "encode", x)
        return type(vae)._encode(vae, x) if found is None else found

    def remove() -> None:
        for name, method in (("_decode", decode), ("_encode", encode)):
            if vars(vae).get(name) is method:
                delattr(vae, name)
        engine.release()

    vae._decode, vae._encode = decode, encode
    return engine, remove
