"""ArkFastLoader: three files to MODEL, CLIP and VAE."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..patches.text_encoder import load_text_encoder
from ..patches.transformer import load_transformer
from ..patches.vae import load_vae
from ..toolkit.architecture import check_match
from ..toolkit.embedded import preferred
from ..toolkit.errors import ModelFileError
from ..toolkit.igniter import file_fingerprint, model_parts
from . import live, next_prompt
from .loaded import Loaded
from .schema import schema

CHECKPOINTS = "checkpoints"  # a file of this folder holds all three parts
DIFFUSERS = "diffusers"  # a folder of this folder has a folder for each part
SUBFOLDERS = {"diffusion_model": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
FOLDERS = {"diffusion_model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
PIPELINE_INDEX = "model_index.json"
FRESH = 1.0  # s; the host asks a dozen times for each prompt, and there may be many folders
log = logging.getLogger("ark")


def _combo(name: str, what: str) -> io.Combo.Input:
    options = folder_paths.get_filename_list(FOLDERS[name])
    whole = [f"{CHECKPOINTS}/{file}" for file in folder_paths.get_filename_list(CHECKPOINTS)]
    whole += [f"{DIFFUSERS}/{folder}" for folder in _diffusers_folders()]
    return io.Combo.Input(
        name,
        options=options + whole,
        default=preferred(FOLDERS[name], options),
        tooltip=f"{what} Files from ComfyUI's folder models/{FOLDERS[name]}; 'ark_tiny' is the embedded one. "
        f"A file of models/{CHECKPOINTS} serves if it holds this part, and a folder of models/{DIFFUSERS} as diffusers "
        "saves it; of a model in shards, choose any.",
    )


class ArkFastLoader(io.ComfyNode):
    """Loads FLUX.2-Klein from mapped files without copying weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkFastLoader",
            "Ark Fast Loader",
            search_aliases=[
                "load flux 2 klein",
                "klein loader",
                "load diffusion model",
                "unet loader",
                "load checkpoint",
            ],
            description="Loads FLUX.2-Klein: files are mapped, checked, and handed to ComfyUI's own classes by reference.",
            inputs=[
                _combo("diffusion_model", "The Klein transformer: bf16, fp16, fp32 or fp8."),
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
            if not name or _find(slot, name) is None:
                return f"{slot}: {name} is not in models/{FOLDERS[slot]}. Put the file there or choose another one."
        return True

    @classmethod
    def fingerprint_inputs(cls, diffusion_model: str, text_encoder: str, vae: str) -> str:
        """Load again when a file's name, size or time changes; the host takes a table apart for each node behind this one."""
        chosen = {"diffusion_model": diffusion_model, "text_encoder": text_encoder, "vae": vae}
        parts = [part for slot, name in chosen.items() for part in model_parts(_chosen(slot, name))]
        return repr([file_fingerprint(part) for part in parts])

    @classmethod
    def execute(cls, diffusion_model: str, text_encoder: str, vae: str) -> io.NodeOutput:
        """Build MODEL, CLIP and VAE."""
        start, progress = time.perf_counter(), comfy.utils.ProgressBar(3)
        paths = {
            "diffusion_model": _chosen("diffusion_model", diffusion_model),
            "text_encoder": _chosen("text_encoder", text_encoder),
            "vae": _chosen("vae", vae),
        }
        clip, clip_dims = load_text_encoder(paths["text_encoder"])  # first: it is needed first
        progress.update(1)
        model, model_dims = load_transformer(paths["diffusion_model"])
        check_match(model_dims, clip_dims, text_encoder)
        clip.patcher.lead(model)
        progress.update(1)
        decoder, _ = load_vae(paths["vae"])
        progress.update(1)
        files = {part for path in paths.values() for part in model_parts(path)}
        size, seconds = sum(part.stat().st_size for part in files), time.perf_counter() - start
        report = f"Opened {diffusion_model}, {text_encoder} and {vae}: {size / 1e9:.2f} GB in {seconds:.3f} s."
        log.info("Ark loader: %s", report)
        next_prompt.remember({"diffusion_model": diffusion_model, "text_encoder": text_encoder, "vae": vae}, clip)  # fmt: skip
        where = live.place(cls)
        live.add_to_run(where, load_ms=1e3 * seconds)
        parts = {"diffusion_model": model, "text_encoder": clip.patcher, "vae": decoder.patcher}
        loaded = Loaded(parts, size, seconds)
        loaded.listen(lambda: live.show(where, loaded.facts))
        live.show(where, loaded.facts)
        return io.NodeOutput(model, clip, decoder, ui={"text": [report, *loaded.lines()]})


def _diffusers_folders() -> dict[str, Path]:
    """The pipelines in diffusers' layout, by their path below models/diffusers; one that has just come a second later at most."""
    roots = tuple(map(Path, folder_paths.get_folder_paths(DIFFUSERS)))
    return _pipelines(roots, tuple(map(_modified, roots)), int(time.monotonic() / FRESH))


@functools.lru_cache(maxsize=1)
def _pipelines(roots: tuple[Path, ...], modified: tuple[int, ...], moment: int) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in roots:
        for index in sorted(root.glob(f"**/{PIPELINE_INDEX}")):
            found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def _modified(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return folder.stat().st_mtime_ns
    return 0


def _chosen(slot: str, name: str) -> str:
    """The path of a choice.

    Raises:
        ModelFileError: the file was there when the prompt was checked.
    """
    if (path := _find(slot, name)) is None:
        raise ModelFileError(f"{name} is not there any more.", "Put it back or choose another one.")
    return path


def _find(slot: str, name: str) -> str | None:
    """The path of a choice, None if there is no such file."""
    if path := folder_paths.get_full_path(FOLDERS[slot], name):
        return path
    folder, _, rest = name.partition("/")
    if folder == DIFFUSERS and (pipeline := _diffusers_folders().get(rest)):
        parts = sorted((pipeline / SUBFOLDERS[slot]).glob("*.safetensors"))
        return str(parts[0]) if parts else None
    return folder_paths.get_full_path(CHECKPOINTS, rest) if folder == CHECKPOINTS else None
