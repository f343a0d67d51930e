"""ArkSampler4Step: Klein's distilled steps."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.fused import engine_on
from ..patches.state import sample_and_tell
from . import live, next_step
from .schedule import denoise_input, steps_input
from .schema import schema


class ArkSampler4Step(io.ComfyNode):
    """Samples FLUX.2-Klein with its own noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkSampler4Step",
            "Ark Sampler (4 Step)",
            search_aliases=["klein sampler", "ksampler", "euler", "four steps", "4 steps"],
            description="FLUX.2-Klein's few Euler steps on its own noise levels, which depend on the picture's size.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt, with or without reference images."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="128 channels: EmptyFlux2LatentImage, or an encoded picture; a noise mask is honoured.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise; the same seed gives the same noise as ComfyUI's own samplers.",
                ),
                steps_input(),
                denoise_input(),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="For the undistilled base model, with a negative: two passes a step. At 1 there is one pass.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to stay away from, where cfg is not 1. The distilled Klein needs none.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels instead of Klein's own; steps and denoise are then not looked at.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The sampled latent, ready for VAE Decode.")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        seed: int,
        steps: int,
        denoise: float,
        cfg: float = 1.0,
        negative=None,
        sigmas=None,
    ) -> io.NodeOutput:
        """Sample."""
        others = {"negative": negative, "cfg": cfg, "sigmas": sigmas}
        result, facts = sample_and_tell(model, positive, latent_image, seed, steps, denoise, **others)  # fmt: skip
        where = live.place(cls)
        if where and (engine := engine_on(model)):
            prompt = getattr(cls.hidden, "prompt", None)
            next_step.sampled(prompt, where.node, engine.first, model.load_device)
        live.show(where, facts)
        size = f"{facts['width']}x{facts['height']}"
        live.add_to_run(where, sample_ms=facts["ms"], steps=facts["steps"], images=facts["batch"], size=size)  # fmt: skip
        return io.NodeOutput(result)
