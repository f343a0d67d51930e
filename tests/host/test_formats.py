"""The forms in which people have Klein's files: each renders through a real server as the plain files do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ark.assets.scenes import sample_scenes
from ark.benchmarks.classifier import judge
from ark.bootstrap import ROOT

pytestmark = pytest.mark.host
KLEIN = ROOT / "assets" / "diffusion_models" / "ark_tiny_klein.safetensors"
VAE = ROOT / "assets" / "vae" / "ark_tiny_flux2_vae.safetensors"
((SCENE, CAPTION),) = sample_scenes(1, seed=5, held_out=True)


def text_encoder() -> Path:
    from ark.toolkit.embedded import embedded_text_encoder

    return embedded_text_encoder()


def tensors_of(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def save(tensors: dict, path: Path, metadata: dict | None = None) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def models(server, folder: str) -> Path:
    return server.host.base / "models" / folder


def render(server, **files: str) -> np.ndarray:
    return server.render(
        server.graph(
            ArkFastLoader=files, CLIPTextEncode={"text": CAPTION}, ArkSampler4Step={"seed": 3}
        )
    )


def quantise(tensors: dict, linear: tuple[str, ...], scale_name: str) -> tuple[dict, list[str]]:
    """The weights of some linear layers in fp8 e4m3, one scale a tensor; the names of these layers."""
    import torch

    out, layers = {}, []
    for name, tensor in tensors.items():
        if not (name.endswith(".weight") and any(part in name for part in linear)):
            out[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().max() / 448
        out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        out[f"{layer}.{scale_name}"] = scale
        layers.append(layer)
    return out, layers


BLOCKS = (".linear1", ".linear2", "_mlp.", "_attn.qkv", "_attn.proj")
LAYERS = ("_proj",)


def fp8_by_metadata(tensors: dict, linear: tuple[str, ...], path: Path) -> None:
    """The form of the fp8 file published for Klein: scales beside the weights, formats in the file's metadata."""
    out, layers = quantise(tensors, linear, "weight_scale")
    table = {
        "format_version": "1.0",
        "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers},
    }
    save(out, path, {"_quantization_metadata": json.dumps(table)})


def fp8_undescribed(tensors: dict, linear: tuple[str, ...], path: Path) -> None:
    """Scales beside the weights, and no word of them in the metadata."""
    save(quantise(tensors, linear, "weight_scale")[0], path)


def fp8_in_a_checkpoint(tensors: dict, linear: tuple[str, ...], path: Path) -> None:
    """As `fp8_by_metadata`, under a checkpoint's names in the file and in its table."""
    prefix = (
        "model.diffusion_model."
        if "img_in.weight" in tensors
        else "text_encoders.qwen3_4b.transformer."
    )
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    fp8_by_metadata(renamed, linear, path)


def fp8_scaled(tensors: dict, linear: tuple[str, ...], path: Path) -> None:
    """ComfyUI's earlier form, where every linear layer is quantised: a marker, and `scale_weight`."""
    import torch

    out, _ = quantise(tensors, linear, "scale_weight")
    save({**out, "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, path)


def fp8_cast(tensors: dict, linear: tuple[str, ...], path: Path) -> None:
    """Weights cast to fp8 with no scale."""
    import torch

    cast = {
        name: t.to(torch.float8_e4m3fn) if any(part in name for part in linear) else t
        for name, t in tensors.items()
    }
    save(cast, path)


EVERY_LINEAR = (*BLOCKS, "img_in", "txt_in", "time_in", "_modulation", "final_layer.linear")


@pytest.mark.parametrize(
    ("write", "linear"),
    [
        (fp8_by_metadata, BLOCKS),
        (fp8_undescribed, BLOCKS),
        (fp8_in_a_checkpoint, BLOCKS),
        (fp8_scaled, EVERY_LINEAR),
        (fp8_cast, BLOCKS),
    ],
)
def test_fp8_transformer_draws_what_the_prompt_says(server, write, linear):
    path = models(server, "diffusion_models") / f"{write.__name__}.safetensors"
    write(tensors_of(KLEIN), linear, path)
    picture = render(server, diffusion_model=path.name)
    verdict = judge(picture, SCENE)
    assert all(verdict.values()), verdict
    assert (picture != render(server)).any(), "the quantised weights were not used"


@pytest.mark.parametrize(
    "write", [fp8_by_metadata, fp8_undescribed, fp8_in_a_checkpoint, fp8_scaled, fp8_cast]
)
def test_fp8_text_encoder_draws_what_the_prompt_says(server, write):
    path = models(server, "text_encoders") / f"{write.__name__}.safetensors"
    write(tensors_of(text_encoder()), LAYERS, path)
    picture = render(server, text_encoder=path.name)
    verdict = judge(picture, SCENE)
    assert all(verdict.values()), verdict


def test_shards_in_a_folder(server):
    tensors = tensors_of(KLEIN)
    folder, names = models(server, "diffusion_models") / "sharded", list(tensors)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        save(
            {name: tensors[name] for name in part},
            folder / f"klein-{number:05}-of-00002.safetensors",
        )
    np.testing.assert_array_equal(
        render(server, diffusion_model="sharded/klein-00002-of-00002.safetensors"), render(server)
    )
    (folder / "klein-00001-of-00002.safetensors").unlink()
    with pytest.raises(Exception, match="klein-00001-of-00002.safetensors is not beside it"):
        render(server, diffusion_model="sharded/klein-00002-of-00002.safetensors")


def test_checkpoint_that_holds_all_three(server):
    parts = {
        "model.diffusion_model.": KLEIN,
        "text_encoders.qwen3_4b.transformer.": text_encoder(),
        "vae.": VAE,
    }
    whole = {
        prefix + name: t for prefix, path in parts.items() for name, t in tensors_of(path).items()
    }
    save(whole, models(server, "checkpoints") / "whole.safetensors")
    name = "checkpoints/whole.safetensors"
    info = server.client.object_info()["ArkFastLoader"]["input"]["required"]
    assert name in (
        info["vae"][0] if isinstance(info["vae"][0], list) else info["vae"][1]["options"]
    )
    np.testing.assert_array_equal(
        render(server, diffusion_model=name, text_encoder=name, vae=name), render(server)
    )


def to_diffusers(state_dict: dict) -> dict:
    """The transformer under the names that diffusers saves it with: the inverse of Ark's renaming."""
    import torch

    from ark.toolkit import keys

    def back(key: str, table: dict[str, str]) -> str:
        return next((old + key[len(new) :] for old, new in table.items() if key.startswith(new)), key)  # fmt: skip

    renamed = {}
    for key, tensor in state_dict.items():
        if key == "final_layer.adaLN_modulation.1.weight":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        kind, *rest = key.split(".", 2)
        if kind == "double_blocks" and (stream := rest[1].removesuffix(".qkv.weight")) != rest[1]:
            for name, part in zip(keys._QKV[stream], tensor.chunk(3), strict=True):
                renamed[f"transformer_blocks.{rest[0]}.attn.{name}.weight"] = part
        elif kind == "double_blocks":
            renamed[f"transformer_blocks.{rest[0]}.{back(rest[1], keys._DOUBLE)}"] = tensor
        elif kind == "single_blocks":
            renamed[f"single_transformer_blocks.{rest[0]}.{back(rest[1], keys._SINGLE)}"] = tensor
        else:
            renamed[back(key, keys._TRANSFORMER)] = tensor
    return renamed


def test_a_folder_of_diffusers_with_shards_and_an_index(server):
    pipeline = models(server, "diffusers") / "black-forest-labs" / "tiny"
    tensors = to_diffusers(tensors_of(KLEIN))
    names, weight_map = list(tensors), {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        save({name: tensors[name] for name in part}, pipeline / "transformer" / file)
        weight_map |= dict.fromkeys(part, file)
    index = pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save(tensors_of(text_encoder()), pipeline / "text_encoder" / "model.safetensors")
    save(tensors_of(VAE), pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    name = "diffusers/black-forest-labs/tiny"
    np.testing.assert_array_equal(
        render(server, diffusion_model=name, text_encoder=name, vae=name), render(server)
    )
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Exception, match="vae: diffusers/black-forest-labs/tiny is not in models"):
        render(server, vae=name)
