"""ArkFastLoader: three files to MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
import time

import folder_paths
from comfy_api.latest import io

from ..patches.klein import load_text_encoder, load_transformer, load_vae
from ..toolkit.architecture import check_match
from ..toolkit.embedded import preferred
from ..toolkit.igniter import file_fingerprint

FOLDERS = {"diffusion_model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
log = logging.getLogger("ark")


def _combo(name: str, what: str) -> io.Combo.Input:
    options = folder_paths.get_filename_list(FOLDERS[name])
    return io.Combo.Input(
        name,
        options=options,
        default=preferred(FOLDERS[name], options),
        tooltip=f"{what} Files from ComfyUI's folder models/{FOLDERS[name]}; 'ark_tiny' is the embedded one.",
    )


class ArkFastLoader(io.ComfyNode):
    """Loads FLUX.2-Klein from mapped files without copying weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ArkFastLoader",
            display_name="Ark Fast Loader",
            category="Ark",
            description="Loads FLUX.2-Klein: files are mapped, checked, and handed to ComfyUI's own classes by reference.",
            inputs=[
                _combo("diffusion_model", "The Klein transformer, bf16, fp16 or fp32."),
                _combo("text_encoder", "The Qwen3 text encoder that belongs to it."),
                _combo("vae", "The FLUX.2 VAE."),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer."),
                io.Clip.Output(tooltip="Klein's text encoder and tokenizer."),
                io.Vae.Output(tooltip="The autoencoder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, diffusion_model: str, text_encoder: str, vae: str) -> bool | str:
        """Say which file is missing before anything runs."""
        chosen = {"diffusion_model": diffusion_model, "text_encoder": text_encoder, "vae": vae}
        for slot, name in chosen.items():
            if not name or folder_paths.get_full_path(FOLDERS[slot], name) is None:
                return f"{slot}: {name} is not in models/{FOLDERS[slot]}. Put the file there or choose another one."
        return True

    @classmethod
    def fingerprint_inputs(cls, diffusion_model: str, text_encoder: str, vae: str) -> tuple:
        """Load again when a file's name, size or time changes."""
        chosen = {"diffusion_model": diffusion_model, "text_encoder": text_encoder, "vae": vae}
        return tuple(file_fingerprint(_path(slot, name)) for slot, name in chosen.items())

    @classmethod
    def execute(cls, diffusion_model: str, text_encoder: str, vae: str) -> io.NodeOutput:
        """Build MODEL, CLIP and VAE."""
        start = time.perf_counter()
        model, model_dims = load_transformer(_path("diffusion_model", diffusion_model))
        clip, clip_dims = load_text_encoder(_path("text_encoder", text_encoder))
        check_match(model_dims, clip_dims, text_encoder)
        decoder, _ = load_vae(_path("vae", vae))
        report = f"Mapped {diffusion_model}, {text_encoder} and {vae} in {time.perf_counter() - start:.3f} s."
        log.info("Ark loader: %s", report)
        return io.NodeOutput(model, clip, decoder, ui={"text": [report]})


def _path(slot: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDERS[slot], name)
