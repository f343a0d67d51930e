"""The embedded model's files: where they are, and how the one that is not shipped whole is rebuilt.

The tiny text encoder has Qwen's full vocabulary of 151,936 rows, of which only those of its captions were trained. The
repository holds these rows, their token ids, and one row for every other token; the file that loaders read is written
once, byte for byte the same everywhere, to the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .cache import cache_folder

ASSETS = Path(__file__).resolve().parent.parent / "assets"
COMPACT = ASSETS / "ark_tiny_qwen3.compact.safetensors"
EMBEDDING = "model.embed_tokens.weight"
VOCAB_SIZE = 151936  # rows of Qwen3's table, counting those that no token uses


def expand_text_encoder(compact: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rebuild the full embedding table.

    Args:
        compact: the weights with "token_ids" [N] int64 and an embedding of [N + 1, hidden]: one row a token, in order,
            and last the row of all other tokens.

    Returns:
        The weights with an embedding of [151936, hidden].
    """
    state_dict = dict(compact)
    token_ids, rows = state_dict.pop("token_ids"), state_dict[EMBEDDING]
    table = rows[-1].expand(VOCAB_SIZE, -1).clone()
    table[token_ids] = rows[:-1]
    return {**state_dict, EMBEDDING: table}


def embedded_text_encoder() -> Path:
    """The text encoder's full file, written first if it is not there (or not of this version)."""
    digest = hashlib.sha256(COMPACT.read_bytes()).hexdigest()[:12]
    target = cache_folder() / f"embedded-{digest}" / "ark_tiny_qwen3.safetensors"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(expand_text_encoder(load_file(COMPACT)), draft, metadata={"format": "pt"})
            os.replace(draft, target)  # whole or not at all, also with two processes at once
        finally:
            Path(draft).unlink(missing_ok=True)
    return target


def embedded_folders() -> dict[str, Path]:
    """The folders that make the embedded files appear in the host's lists, by the host's folder names."""
    return {
        "diffusion_models": ASSETS / "diffusion_models",
        "text_encoders": embedded_text_encoder().parent,
        "vae": ASSETS / "vae",
    }


def preferred(folder: str, names: list[str]) -> str | None:
    """The file a new node should name: the user's Klein if there is one, else the embedded one, else the first."""
    signs = {"diffusion_models": "klein", "text_encoders": "qwen_3_4b", "vae": "flux2"}
    own = [name for name in names if signs[folder] in name.lower() and "ark_tiny" not in name]
    embedded = [name for name in names if "ark_tiny" in name]
    return next(iter(own + embedded + names), None)
