"""ArkSampler4Step: Klein's distilled steps."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.sampling import sample_klein
from ..toolkit.schedule import MAX_STEPS


class ArkSampler4Step(io.ComfyNode):
    """Samples FLUX.2-Klein with its own noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ArkSampler4Step",
            display_name="Ark Sampler (4 Step)",
            category="Ark",
            description="FLUX.2-Klein's few Euler steps on its own noise levels, which depend on the picture's size.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. A distilled model needs no negative."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="128 channels: EmptyFlux2LatentImage, or an encoded picture.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise; the same seed gives the same noise as ComfyUI's own samplers.",
                ),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Euler steps; Klein is made for 4.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from noise; less keeps more of the latent. All the steps always run.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent, ready for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed: int, steps: int, denoise: float
    ) -> io.NodeOutput:
        """Sample."""
        return io.NodeOutput(sample_klein(model, positive, latent_image, seed, steps, denoise))
