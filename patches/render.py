"""One picture from a diffusers pipeline, in the stages that ComfyUI has as nodes, each timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..toolkit.errors import InputError
from ..toolkit.jobs import Job, check_images
from ..toolkit.noise import klein_noise
from .encode import PromptEncoder


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
        pipeline: a `Flux2KleinPipeline`, as `load_pipeline` makes it.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.encode = pipeline, PromptEncoder(pipeline)

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
        pipeline, seconds = self.pipeline, {}
        device = pipeline._execution_device

        def clock() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        with torch.no_grad():
            start = clock()
            embeds = self.encode(job.prompt)
            seconds["encode"] = clock() - start
            at_step()
            start = clock()
            with _full_precision_between_steps(pipeline.transformer):
                latents = run(lambda: _sample(pipeline, job, embeds, at_step))
            seconds["steps"] = clock() - start
            at_step()
            start = clock()
            picture = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
            image = _to_image(picture)
            seconds["decode"] = clock() - start
        return Rendered(image, latents, seconds)


def _sample(pipeline: Any, job: Job, embeds: torch.Tensor, at_step: Callable[[], None]) -> torch.Tensor:  # fmt: skip
    def step_ended(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        at_step()
        return tensors

    check_images(job.images)
    return pipeline(
        image=_read_images(job.images) or None,
        prompt_embeds=embeds.float(),
        latents=klein_noise(job.seed, job.width, job.height),
        width=job.width,
        height=job.height,
        num_inference_steps=job.steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=step_ended,
    ).images


def _to_image(picture: torch.Tensor) -> Any:
    """As the pipeline's own postprocessing, but on the device: [1, 3, H, W], -1 to 1, to PIL's."""
    from PIL import Image

    pixels = (picture[0].float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


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
def _full_precision_between_steps(transformer: torch.nn.Module) -> Iterator[None]:
    """Keep the latents in fp32 while the transformer computes in its own dtype, as ComfyUI does."""
    dtype = transformer.dtype

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
