"""Whatever people have is recognised; what is missing has a sentence that names it."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ark.toolkit import model_files
from ark.toolkit.embedded import ASSETS, embedded_text_encoder
from ark.toolkit.errors import InputError, ModelFileError
from ark.toolkit.model_files import find_model

KLEIN = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"
VAE = ASSETS / "vae" / "ark_tiny_flux2_vae.safetensors"


@pytest.fixture(autouse=True)
def tokenizer(tmp_path, monkeypatch):
    """A vocabulary by name alone, where a ComfyUI has it."""
    host = tmp_path / "host"
    folder = host / model_files.COMFYUI_TOKENIZER
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    return folder


@pytest.fixture(scope="module")
def encoder():
    return embedded_text_encoder()


def write_shards(folder, name, path):
    weights = load_file(path)
    keys = sorted(weights)
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        save_file(
            {k: weights[k] for k in part}, folder / f"{name}-{number:05}-of-00002.safetensors"
        )
    weight_map = {k: f"{name}-{1 + i % 2:05}-of-00002.safetensors" for i, k in enumerate(keys)}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def diffusers_folder(folder, encoder):
    write_shards(folder / "transformer", "diffusion_pytorch_model", KLEIN)
    write_shards(folder / "text_encoder", "model", encoder)
    (folder / "vae").mkdir()
    shutil.copy(VAE, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    return folder


def test_nothing_is_the_embedded_model(tokenizer):
    found = find_model()
    assert found.embedded and found.tokenizer == tokenizer and found.transformer == KLEIN
    assert len(found.identity) == 3 and found.names["vae"] == VAE.name


def test_single_files_in_any_order(encoder, tokenizer):
    found = find_model([VAE, str(encoder), KLEIN])
    assert (found.transformer, found.text_encoder, found.vae) == (KLEIN, encoder, VAE)
    assert not found.embedded and found.folder is None and found.settings("vae") == {}


def test_a_checkpoint(tmp_path, encoder):
    weights = {f"model.diffusion_model.{k}": v for k, v in load_file(KLEIN).items()}
    weights |= {f"text_encoders.qwen3_4b.transformer.{k}": v for k, v in load_file(encoder).items()}
    weights |= {f"vae.{k}": v for k, v in load_file(VAE).items()}
    path = tmp_path / "all.safetensors"
    save_file(weights, path)
    found = find_model([path])
    assert found.transformer == found.text_encoder == found.vae == path


def test_a_diffusers_folder_with_shards(tmp_path, encoder):
    folder = diffusers_folder(tmp_path / "klein", encoder)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_text("{}")
    found = find_model([folder])
    assert found.folder == folder and found.tokenizer == folder / "tokenizer"
    assert found.vae == folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert found.names["vae"] == "diffusers/klein" and len(found.identity) == 5


def test_half_a_shard_and_a_missing_part(tmp_path, encoder):
    folder = diffusers_folder(tmp_path / "klein", encoder)
    (folder / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="-00002-of-00002.safetensors is not beside it"):
        _ = find_model([folder]).identity
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelFileError, match="vae is not there"):
        find_model([folder])
    (folder / "vae").mkdir()
    with pytest.raises(ModelFileError, match=r"vae holds no \.safetensors"):
        find_model([folder])


def test_comfyuis_own_folder_and_a_flat_one(tmp_path, encoder):
    comfyui, flat = tmp_path / "comfyui", tmp_path / "flat"
    flat.mkdir()
    for source, name in ((KLEIN, "diffusion_models"), (encoder, "text_encoders"), (VAE, "vae")):
        (comfyui / "models" / name).mkdir(parents=True)
        shutil.copy(source, comfyui / "models" / name)
        shutil.copy(source, flat)
    for named in (comfyui, comfyui / "models"):
        assert find_model([named]).vae == comfyui / "models" / "vae" / VAE.name
    assert find_model([flat]).transformer == flat / KLEIN.name


@pytest.mark.skipif(sys.platform == "win32", reason="makes a link")
def test_a_comfyui_whose_models_are_a_link_has_its_tokenizer(tmp_path, encoder, tokenizer, monkeypatch):  # fmt: skip
    monkeypatch.delenv("COMFYUI_PATH")
    store = tmp_path / "store" / "much"
    for source, name in ((KLEIN, "diffusion_models"), (encoder, "text_encoders"), (VAE, "vae")):
        (store / name).mkdir(parents=True)
        shutil.copy(source, store / name)
    host = tokenizer.parents[2]
    (host / "models").symlink_to(store)
    assert find_model([host]).tokenizer == tokenizer


def test_what_is_missing_is_named(tmp_path, encoder, monkeypatch):
    with pytest.raises(ModelFileError, match="none is not there"):
        find_model([tmp_path / "none"])
    with pytest.raises(ModelFileError, match="no text encoder and no VAE among it"):
        find_model([KLEIN])
    with pytest.raises(ModelFileError, match="holds no model"):
        find_model([tmp_path])
    shutil.copy(VAE, tmp_path / "second.safetensors")
    with pytest.raises(ModelFileError, match="are both a VAE"):
        find_model([KLEIN, encoder, VAE, tmp_path / "second.safetensors"])
    other = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, other)
    with pytest.raises(ModelFileError, match="other.safetensors is a FLUX.1 transformer"):
        find_model([other])
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ModelFileError, match="pickle"):
        find_model([tmp_path / "a.ckpt"])


def test_a_missing_tokenizer_is_named(tmp_path, encoder, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH")
    monkeypatch.setattr(model_files, "_tokenizer_places", lambda path: iter([tmp_path / "x"]))
    with pytest.raises(InputError, match="The tokenizer is missing"):
        find_model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text("{}")
    assert find_model([tmp_path / "mine"]).tokenizer == tmp_path / "mine"  # and the embedded model
