"""The embedded files: small enough, readable as Klein, and the rebuilt one the same everywhere."""

import hashlib

import torch
from safetensors.torch import load_file

from ark.toolkit.architecture import TextEncoderDims, TransformerDims, VaeDims, check_match
from ark.toolkit.embedded import (
    ASSETS,
    COMPACT,
    EMBEDDING,
    VOCAB_SIZE,
    embedded_folders,
    embedded_text_encoder,
    preferred,
)
from ark.toolkit.igniter import open_model


def test_all_of_it_is_at_most_20_mb():
    total = sum(
        f.stat().st_size for f in ASSETS.rglob("*") if f.is_file() and "__pycache__" not in f.parts
    )
    assert total <= 20_000_000


def test_dimensions_are_read_from_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    folders = embedded_folders()
    assert set(folders) == {"diffusion_models", "text_encoders", "vae"}
    files = {kind: next(folder.glob("ark_tiny*.safetensors")) for kind, folder in folders.items()}
    parts = {kind: open_model(path).tensors for kind, path in files.items()}
    transformer = TransformerDims.of(parts["diffusion_models"], "t")
    text_encoder = TextEncoderDims.of(parts["text_encoders"], "e")
    vae = VaeDims.of(parts["vae"], "v")
    check_match(transformer, text_encoder, "e")
    assert (transformer.num_heads * 128, text_encoder.vocab_size) == (
        transformer.hidden_size,
        VOCAB_SIZE,
    )
    assert vae.latent_channels == 32


def test_the_rebuilt_table_holds_the_trained_rows_and_is_deterministic(tmp_path, monkeypatch):
    compact = load_file(COMPACT)
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path / "one"))
    first = embedded_text_encoder()
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path / "two"))
    second = embedded_text_encoder()
    assert (
        hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
    )
    table = load_file(first)[EMBEDDING]
    assert table.shape[0] == VOCAB_SIZE
    assert torch.equal(table[compact["token_ids"]], compact[EMBEDDING][:-1])
    untrained = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    untrained[compact["token_ids"]] = False
    assert (table[untrained] == compact[EMBEDDING][-1]).all()
    assert not list(first.parent.glob("*.part"))


def test_a_users_own_klein_comes_first():
    names = ["ark_tiny_klein.safetensors", "flux-2-klein-4b.safetensors", "sdxl.safetensors"]
    assert preferred("diffusion_models", names) == "flux-2-klein-4b.safetensors"
    assert (
        preferred("diffusion_models", ["ark_tiny_klein.safetensors", "x.safetensors"])
        == "ark_tiny_klein.safetensors"
    )
    assert preferred("vae", []) is None
