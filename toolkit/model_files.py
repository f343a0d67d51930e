"""What the user names, be it a diffusers folder, ComfyUI's files or a checkpoint, to the files of each part of a Klein."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .architecture import describe
from .embedded import ASSETS, embedded_text_encoder, preferred
from .errors import InputError, ModelFileError
from .header import read_header
from .igniter import model_parts

PARTS = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "VAE"}
SIGNS = {  # a name that only this part has, alone or behind a checkpoint's prefix
    "transformer": re.compile(r"(^|\.)double_stream_modulation_img\.(lin|linear)\.weight$"),
    "text_encoder": re.compile(r"(^|\.)layers\.0\.self_attn\.q_norm\.weight$"),
    "vae": re.compile(r"(^|\.)bn\.running_mean$"),
}
COMFYUI = {
    "transformer": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
}
COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
PACK = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a Klein lie.

    Attributes:
        transformer: a safetensors file; of several shards any.
        text_encoder: as well.
        vae: as well.
        tokenizer: a folder with Qwen3's vocabulary.
        folder: of the diffusers pipeline, whose settings hold; None for single files.
        embedded: whether it is the model that travels with the pack.
    """

    transformer: Path
    text_encoder: Path
    vae: Path
    tokenizer: Path
    folder: Path | None = None
    embedded: bool = False

    @property
    def identity(self) -> list[list]:
        """Name and size of every file: what tells one model from another, cheaply."""
        files = {f for part in PARTS for f in model_parts(getattr(self, part))}
        return sorted([file.name, file.stat().st_size] for file in files)

    @property
    def names(self) -> dict[str, str]:
        """The parts as ComfyUI with Ark lists them."""
        whole = f"diffusers/{self.folder.name}" if self.folder else None
        return {part: whole or getattr(self, part).name for part in PARTS}

    def settings(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """The settings that the pipeline's folder has for a part, none for single files; "" is the pipeline itself.

        Raises:
            ModelFileError: the file cannot be read.
        """
        path = self.folder / part / name if self.folder else None
        if path is None or not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {key: found[key] for key in found if not key.startswith("_")}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelFileError(
                f"{path} cannot be read ({error}).", "Download it again."
            ) from error


def find_model(named: Sequence[str | Path] = ()) -> ModelFiles:
    """Find out what is what among paths.

    Args:
        named: in any order: a diffusers folder, ComfyUI's own folder or its `models`, a folder of files, single files, a
            checkpoint, a tokenizer's folder. None at all stands for the embedded model.

    Returns:
        Every part's place; nothing but headers was read.

    Raises:
        ModelFileError: a path is missing or of another kind, or a part is not among them; its text names it.
    """
    found: dict[str, Path] = {}
    folder = None
    for path in map(Path, named):
        path = path.expanduser()
        if not path.exists():
            raise ModelFileError(f"{path} is not there.", "Check the path given with --model.")
        if path.is_dir() and _is_pipeline(path):
            folder = path
        for part, place in _parts_of(path):
            if found.setdefault(part, place) != place:
                raise ModelFileError(
                    f"{found[part].name} and {place.name} are both a {PARTS.get(part, part)}.",
                    "Name one of them.",
                )
    tokenizer = found.pop("tokenizer", None)
    embedded = not found
    if embedded:
        found = _embedded()
    if missing := [what for part, what in PARTS.items() if part not in found]:
        raise ModelFileError(
            f"{', '.join(map(str, named))}: there is no {' and no '.join(missing)} among it.",
            "Name the missing file with --model as well.",
        )
    files = ModelFiles(**found, tokenizer=tokenizer or Path(), folder=folder, embedded=embedded)
    return files if tokenizer else replace(files, tokenizer=_find_tokenizer(files.text_encoder))


def _embedded() -> dict[str, Path]:
    return {
        "transformer": ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors",
        "text_encoder": embedded_text_encoder(),
        "vae": ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors",
    }


def _is_pipeline(folder: Path) -> bool:
    """Whether diffusers saved a pipeline here."""
    return (folder / "model_index.json").is_file() or all((folder / p).is_dir() for p in PARTS)


def _parts_of(path: Path) -> Iterator[tuple[str, Path]]:
    """The parts at one path."""
    if path.is_file():
        yield from ((part, path) for part in _recognise(path))
    elif _is_pipeline(path):
        yield from ((part, _file_in(path / part)) for part in PARTS)
        if is_tokenizer(path / "tokenizer"):
            yield "tokenizer", path / "tokenizer"
    elif is_tokenizer(path) and not any(path.glob("*.safetensors")):
        yield "tokenizer", path
    elif (models := _comfyui_models(path)) is not None:
        for part, name in COMFYUI.items():
            names = [file.name for file in sorted((models / name).glob("*.safetensors"))]
            if chosen := preferred(name, names):
                yield part, models / name / chosen
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelFileError(
                f"{path} holds no model: no model_index.json and no .safetensors files.",
                "Name a diffusers folder, or the model's files.",
            )
        done: set[Path] = set()
        for file in files:
            if file not in done:
                done.update(model_parts(file))
                yield from ((part, file) for part in _recognise(file))


def _comfyui_models(path: Path) -> Path | None:
    """ComfyUI's folder of models, if this is it or ComfyUI's own."""
    places = (path / "models", path)
    return next((p for p in places if all((p / name).is_dir() for name in COMFYUI.values())), None)


def _file_in(folder: Path) -> Path:
    """The weights in one folder of a pipeline; with several files the plain name, or any of its shards."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if f.stem in ("model", "diffusion_pytorch_model")]
    shards = [f for f in files if re.search(r"-\d{5}-of-\d{5}$", f.stem)]
    if not files:
        why = "holds no .safetensors file" if folder.is_dir() else "is not there"
        raise ModelFileError(f"{folder} {why}.", "Download the missing part of the model.")
    return (plain + shards + files)[0]


def _recognise(path: Path) -> list[str]:
    """Which parts a file holds.

    Raises:
        ModelFileError: it is damaged, a shard of it is missing, or it is another model's.
    """
    names: dict[str, Any] = {}
    for file in model_parts(path):
        names |= read_header(file).entries
    found = [part for part, sign in SIGNS.items() if any(map(sign.search, names))]
    if not found:
        raise ModelFileError(
            f"{path.name} is {describe(names)}.",
            "Name a FLUX.2-Klein transformer, its Qwen3 text encoder, or the FLUX.2 VAE.",
        )
    return found


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary."""
    names = ("vocab.json", "merges.txt")
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in names)


def _find_tokenizer(text_encoder: Path) -> Path:
    """Qwen3's vocabulary: beside the text encoder, in a ComfyUI, or in Hugging Face's cache; nothing is downloaded."""
    places = list(_tokenizer_places(text_encoder))
    for place in places:
        if is_tokenizer(place):
            return place
    raise InputError(
        f"The tokenizer is missing: no tokenizer.json, nor vocab.json and merges.txt, in {_listed(places)}.",
        "Name its folder with --model as well, or a ComfyUI with the variable COMFYUI_PATH.",
    )


def _tokenizer_places(text_encoder: Path) -> Iterator[Path]:
    # a folder of models is often a link
    ways = dict.fromkeys((text_encoder.absolute(), text_encoder.resolve()))
    for file in ways:
        yield from (file.parent, file.parent / "tokenizer", file.parent.parent / "tokenizer")
    hosts = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    hosts += [
        *(host for file in ways for host in file.parents[2:3]),
        *PACK.parents[1:2],
    ]  # HOST/models/x/file, HOST/custom_nodes/ark
    for environment in (Path(sys.prefix), PACK / ".venv"):
        hosts += sorted(environment.glob("comfyui-*"), reverse=True)  # bootstrap.py's
    yield from (host / COMFYUI_TOKENIZER for host in hosts)
    yield from _cached_tokenizers()


def _cached_tokenizers() -> Iterator[Path]:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return
    for repository, name in (
        ("black-forest-labs/FLUX.2-klein-4B", "tokenizer/vocab.json"),
        ("Qwen/Qwen3-4B", "vocab.json"),
    ):
        if isinstance(place := try_to_load_from_cache(repository, name), str):
            yield Path(place).parent


def _listed(places: Iterable[Path]) -> str:
    return ", ".join(dict.fromkeys(map(str, places)))
