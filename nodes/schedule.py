"""ArkScheduler: Klein's noise levels for the host's custom samplers."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.sampling_inputs import check_latent
from ..toolkit.schedule import MAX_STEPS, klein_sigmas
from .schema import schema


def steps_input() -> io.Int.Input:
    """How many steps, as each sampling node asks."""
    return io.Int.Input(
        "steps", default=4, min=1, max=MAX_STEPS, tooltip="Euler steps; Klein is made for 4."
    )


def denoise_input() -> io.Float.Input:
    """How much of the schedule, as each sampling node asks."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="1 starts from noise; less keeps more of the latent. All the steps always run.",
    )


class ArkScheduler(io.ComfyNode):
    """Makes the SIGMAS of FLUX.2-Klein for a latent's size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkScheduler",
            "Ark Scheduler",
            search_aliases=["klein sigmas", "flux 2 scheduler", "noise levels"],
            description="FLUX.2-Klein's noise levels for a latent's size, for SamplerCustomAdvanced or Ark Sampler.",
            inputs=[
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent that will be sampled: its size sets the levels.",
                ),
                steps_input(),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="steps + 1 noise levels, ending in 0.")],
        )

    @classmethod
    def execute(cls, latent_image, steps: int, denoise: float) -> io.NodeOutput:
        """Compute."""
        samples = latent_image["samples"]
        check_latent(samples)
        return io.NodeOutput(klein_sigmas(steps, samples.shape[-2] * samples.shape[-1], denoise))
