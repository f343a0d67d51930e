"""A VAE that decodes and encodes with Ark's engine where that fits, and with the host's code elsewhere.

A picture leaves the device scaled and clamped, at the speed of the link. A picture that does not fit into memory at
one go is computed in bands of lines, with the statistics of all of it, so that no seam can be seen; only one that does not
fit in bands either is cut into the host's tiles.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..toolkit.architecture import LATENT_CHANNELS, SPATIAL_FACTOR
from ..toolkit.foresight import Foresight
from ..toolkit.pixel_layers import COLOURS
from .deliver import Delivery, current, deliver, upload
from .vae_engine import VaeEngine

CHANNELS = {"decode": LATENT_CHANNELS, "encode": COLOURS}  # of what each way reads
decoded: list[Callable[[], Any]] = []  # called after each decode, in the prompt's thread
latents = Foresight()  # of samplers: a picture is decoded while the host goes from node to node
log = logging.getLogger("ark")


class FastVAE(comfy.sd.VAE):
    """The host's VAE with an engine.

    Attributes:
        engine: None to leave everything to the host.
    """

    engine: VaeEngine | None = None

    @classmethod
    def of(cls, vae: comfy.sd.VAE, engine: VaeEngine) -> FastVAE:
        """Make one in place of a VAE that the host built; its tiles run in the engine, too."""
        made: Any = cls.__new__(cls)
        vars(made).update(vars(vae))
        made.engine = engine
        model = vae.first_stage_model
        for way in CHANNELS:  # on the object, which must not keep the VAE alive
            setattr(model, way, functools.partial(_by_module, weakref.ref(made), weakref.ref(model), way))  # fmt: skip
        return made

    def detach(self) -> None:
        """Leave everything to the host from now on."""
        if self.engine is not None:
            self.engine.weights_changed()
        self.engine = None
        module: Any = self.first_stage_model
        for way in CHANNELS:
            vars(module).pop(way, None)

    def decode(self, samples_in: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """As the host's: latents to IMAGEs [B, H, W, 3]."""
        images = self._decode(samples_in, *args, **named)
        for tell in decoded:
            tell()
        return images

    def _decode(self, samples_in: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        plain = samples_in.ndim == 4 and samples_in.shape[1] == LATENT_CHANNELS
        if plain and not any(args) and not any(named.values()):
            picture = latents.take(self, samples_in)
            if picture is not None and self._fits("decode"):
                return picture.arrived()
            size = [SPATIAL_FACTOR * side for side in samples_in.shape[2:]]
            found = self._run("decode", samples_in, size, lambda x: x, self.process_output)
            if found is not None:
                return found
        return super().decode(samples_in, *args, **named)

    def encode(self, pixel_samples: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """As the host's: IMAGEs [B, H, W, 3] to latents."""
        if pixel_samples.ndim == 4 and pixel_samples.shape[3] >= COLOURS and not (args or named):
            pixels = self.vae_encode_crop_pixels(pixel_samples)[..., :COLOURS]
            found = self._run("encode", pixels, pixels.shape[1:3], self.process_input, lambda x: x)
            if found is not None:
                return found
        return super().encode(pixel_samples, *args, **named)

    def begin(self, result: torch.Tensor) -> Delivery | None:
        """Let the device decode latents that lie there; None where that would take more than to replay a recording.

        Args:
            result: [B, 128, H/16, W/16].

        Returns:
            IMAGEs, which the device is still at.
        """
        engine: Any = self.engine
        if result.device != self.device or not self._fits("decode"):
            return None
        there = engine.is_recorded("decode", result.shape, self.device) and self.patcher.is_loaded()
        if not there or (record := engine.record("decode")) is None:
            return None
        try:
            with current(self.device):
                images = self._made(result, lambda x: self.process_output(engine.decode(record, x)))
                return Delivery(images, self.output_device).bring()
        except RuntimeError as error:  # out of memory, too; it is decoded when it is asked for
            log.info("Ark VAE: a picture could not be begun ahead (%s).", str(error).partition("\n")[0])  # fmt: skip
            return None

    def _fits(self, way: str) -> bool:
        """Whether the engine may run; the log says why not, once."""
        engine = self.engine
        if engine is None or not engine.hopeful(way, self.device, self.vae_dtype):
            return False
        if getattr(vars(self.first_stage_model).get(way), "func", None) is not _by_module:
            engine.refuse("another node has changed the VAE")
            return False
        return True

    def _run(
        self,
        way: str,
        given: torch.Tensor,
        size: Any,
        before: Callable[[torch.Tensor], torch.Tensor],
        after: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """One way for a batch; None if the host has to run it."""
        engine: Any = self.engine
        if min(size) < 1 or not self._fits(way):
            return None
        plans = self._plans(way, len(given), *size)
        if engine.is_recorded(way, given.shape, self.device) and self.patcher.is_loaded():
            plans = itertools.chain([(len(given), False)], plans)
        else:
            needed = engine.needed(way, *size) + engine.copies(way)
            comfy.model_management.load_models_gpu(
                [self.patcher], memory_required=needed, force_full_load=self.disable_offload
            )
        for count, band in plans:
            with current(self.device):
                try:
                    if (record := engine.record(way)) is None:
                        return None
                    work = functools.partial(getattr(engine, way), record, band=band)
                    encoded = way == "encode"  # a latent is read by a model next, a picture is not
                    return self._pieces(
                        given, count, lambda x, work=work: after(work(before(x))), encoded
                    )
                except torch.cuda.OutOfMemoryError as error:
                    reason = str(error).splitlines()[0]
            # what the exception held is free here
            log.warning("Ark VAE: out of memory (%s). It runs again with less.", reason)
            engine.graphs.clear()
            comfy.model_management.soft_empty_cache()
        engine.weights_changed()
        return None

    def _plans(self, way: str, batch: int, height: int, width: int) -> Iterator[tuple[int, bool]]:
        """How many pictures at a time, and whether in bands: what should fit, then what takes less."""
        engine: Any = self.engine
        free = comfy.model_management.get_free_memory(self.device) - engine.copies(way)
        count = engine.at_once(way, batch, height, width, free)
        if count:
            yield count, False
            if count > 1:
                yield 1, False
        yield 1, True

    def _pieces(
        self, given: torch.Tensor, count: int, work: Callable, wanted_there: bool
    ) -> torch.Tensor:
        """Some pictures at a time, each result copied once; see `deliver`."""
        found = []
        for part in given.split(count) if count < len(given) else (given,):
            result = self._made(upload(part, self.device), work)
            found.append(deliver(result, self.output_device, wanted_there))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _made(self, given: torch.Tensor, work: Callable) -> torch.Tensor:
        with torch.inference_mode():
            return work(given.float()).to(self._output_dtype())

    def _output_dtype(self) -> torch.dtype:
        """Of IMAGEs and latents; older hosts know only one."""
        wanted = getattr(self, "vae_output_dtype", None)
        return wanted() if wanted else torch.float32


def _by_module(vae: weakref.ref, model: weakref.ref, way: str, x: torch.Tensor, **named: Any) -> torch.Tensor:  # fmt: skip
    """As the method of the host's module: a tile, with its channels before its pixels."""
    engine: Any = getattr(vae(), "engine", None)
    fits = engine is not None and not named and x.ndim == 4 and x.shape[1] == CHANNELS[way]
    fits = fits and engine.hopeful(way, x.device, x.dtype)
    record = engine.record(way) if fits else None
    if record is None:
        return getattr(type(model()), way)(model(), x, **named)
    with current(x.device):
        if way == "decode":
            return engine.decode(record, x, lasting=False).movedim(-1, 1).to(x.dtype)
        return engine.encode(record, x.movedim(1, -1).contiguous(), lasting=False).to(x.dtype)
