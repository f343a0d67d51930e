"""One picture from a diffusers pipeline, in the stages that ComfyUI has as nodes, each timed."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..toolkit.clock import Pace
from ..toolkit.errors import InputError
from ..toolkit.jobs import Job, check_images
from ..toolkit.noise import klein_noise
from .encode import PromptEncoder

_noise_maker = ThreadPoolExecutor(1, "ark-noise")  # noise is made while the prompt is read


@dataclass(frozen=True)
class Rendered:
    """A picture and what it took.

    Attributes:
        image: PIL's.
        latents: [1, 32, H/8, W/8] before decoding, as the pipeline gives them.
        seconds: of encode, steps and decode.
    """

    image: Any
    latents: torch.Tensor
    seconds: dict[str, float]


class Renderer:
    """Makes pictures with one pipeline: the same noise, and the same precision between the steps, as ComfyUI.

    Args:
        pipeline: a `Flux2KleinPipeline`, as `load_pipeline` makes it; it keeps its dtype, and its way of offloading.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.encode = pipeline, PromptEncoder(pipeline)
        self._settled, self._dtype = _settled(pipeline), pipeline.transformer.dtype

    def __call__(
        self,
        job: Job,
        run: Callable[[Callable], Any] = lambda call: call(),
        at_step: Callable[[], None] = lambda: None,
    ) -> Rendered:
        """Make one picture.

        Args:
            job: prompt and settings.
            run: calls the sampling, such as `Combustion.run`, which repeats what is not finite.
            at_step: called after each step and between the stages; what it raises ends the run.

        Raises:
            InputError: a reference cannot be used.
        """
        pipeline, device = self.pipeline, next(self.pipeline.transformer.parameters()).device
        with torch.no_grad():
            watch = Stopwatch(device)
            noise = _noise_maker.submit(klein_noise, job.seed, job.width, job.height)
            embeds = self.encode(job.prompt)
            watch.lap("encode")
            at_step()

            def sample_and_decode() -> tuple[torch.Tensor, torch.Tensor]:
                with _full_precision_between_steps(pipeline.transformer, self._dtype):
                    latents = _sample(self._settled, job, embeds, noise.result(), at_step)
                watch.lap("steps")
                at_step()
                return latents, _decode(pipeline.vae, latents)

            latents, pixels = run(sample_and_decode)
            image = _to_image(pixels)
            watch.lap("decode")
        return Rendered(image, latents, watch.seconds())


class Stopwatch:
    """Measures stages; those of a GPU there, so that nobody has to wait between them.

    Args:
        device: where the stages run.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._laps: list[tuple[str, Any]] = []
        self.lap("start")

    def lap(self, stage: str) -> None:
        """Note that a stage has ended."""
        if self._device.type != "cuda":
            self._laps.append((stage, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._laps.append((stage, event))

    def seconds(self) -> dict[str, float]:
        """Of each stage, all of its laps together; waits for the last one."""
        found: dict[str, float] = {}
        if self._device.type == "cuda":
            self._laps[-1][1].synchronize()
        for (_, before), (stage, after) in itertools.pairwise(self._laps):
            spent = after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3
            found[stage] = found.get(stage, 0.0) + spent
        return found


def _settled(pipeline: Any) -> Any:
    """The same pipeline, all that it has included, but one that takes it that it runs where its transformer lies.

    To find out, the library looks for hooks of offloading in all modules of all parts: 3.4 ms before each first step, in which
    a fast GPU may have nothing to do. Where it finds some, the pipeline itself is returned.
    """

    def lies(self: Any) -> torch.device:
        return next(self.transformer.parameters()).device

    if pipeline._execution_device != lies(pipeline):
        return pipeline
    known = {"_execution_device": property(lies)}
    seen: Any = object.__new__(type(type(pipeline).__name__, (type(pipeline),), known))
    seen.__dict__ = vars(pipeline)
    return seen


def _sample(
    pipeline: Any, job: Job, embeds: torch.Tensor, noise: torch.Tensor, at_step: Callable[[], None]
) -> torch.Tensor:
    pace = Pace(embeds.device)

    def step_ended(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pace.step()
        at_step()
        return tensors

    check_images(job.images)
    if embeds.device.type == "cuda":  # from other memory it would wait for the text encoder
        noise = noise.pin_memory().to(embeds.device, non_blocking=True)
    return pipeline(
        image=_read_images(job.images) or None,
        prompt_embeds=embeds.float(),
        latents=noise,
        width=job.width,
        height=job.height,
        num_inference_steps=job.steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=step_ended,
    ).images


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[H, W, 4] uint8, computed as the pipeline's own postprocessing does, but on the device.

    The fourth number of a pixel is nothing: so PIL keeps colours, and has only to copy them.
    """
    own = "_decode" not in vars(vae)  # Ark's engine reads and gives fp32
    picture = vae.decode(latents.to(vae.dtype) if own else latents, return_dict=False)[0]
    pixels = (picture[0].float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return F.pad(pixels, (0, 0, 0, 0, 0, 1)).permute(1, 2, 0).contiguous()


def _to_image(pixels: torch.Tensor) -> Any:
    from PIL import Image

    if pixels.is_cuda:
        pixels = torch.empty_like(pixels, device="cpu", pin_memory=True).copy_(pixels)
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.numpy(), "raw", "RGBX")


def _read_images(paths: Sequence[str]) -> list[Any]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{path} is no picture that can be read ({error}).", "Name a PNG or JPEG file.") from error  # fmt: skip
    return found


@contextlib.contextmanager
def _full_precision_between_steps(transformer: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:  # fmt: skip
    """Keep the latents in fp32 while the transformer computes in its own dtype, as ComfyUI does."""

    def cast(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = ("hidden_states", "encoder_hidden_states")
        return args, {**kwargs, **{name: kwargs[name].to(dtype) for name in names}}

    def widen(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return (output[0].float(), *output[1:])

    handles = [
        transformer.register_forward_pre_hook(cast, with_kwargs=True),
        transformer.register_forward_hook(widen),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
