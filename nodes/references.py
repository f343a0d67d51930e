"""ArkReferenceImages: the pictures that an edit is about."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.references import add_references
from ..toolkit.references import MAX_MEGAPIXELS, MAX_REFERENCES
from .schema import schema


class ArkReferenceImages(io.ComfyNode):
    """Scales and encodes one to four pictures, and puts them into the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        further = [
            io.Image.Input(
                f"image{number}",
                optional=True,
                tooltip=f"Image {number}, if the prompt speaks of so many.",
            )
            for number in range(2, MAX_REFERENCES + 1)
        ]
        return schema(
            "ArkReferenceImages",
            "Ark Reference Images",
            search_aliases=["edit image klein", "reference latent", "kontext", "multi reference"],
            description="Scales and encodes one to four pictures for FLUX.2-Klein to edit, and gives a latent of their size.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt: what is to be done to the pictures."),
                io.Vae.Input("vae", tooltip="The FLUX.2 VAE."),
                io.Image.Input("image1", tooltip="The picture to edit: the result gets its size."),
                *further,
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.01,
                    max=MAX_MEGAPIXELS,
                    step=0.01,
                    optional=True,
                    tooltip="Larger pictures are made smaller, to so many times 1024x1024 px; smaller ones stay.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The prompt with the pictures."),
                io.Latent.Output(tooltip="An empty latent of the size of image1, for the sampler."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        conditioning,
        vae,
        image1,
        image2=None,
        image3=None,
        image4=None,
        megapixels: float = 1.0,
    ) -> io.NodeOutput:
        """Encode."""
        images = [image for image in (image1, image2, image3, image4) if image is not None]
        return io.NodeOutput(*add_references(conditioning, vae, images, megapixels))
