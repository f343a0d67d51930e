"""What a user can do wrong, through the API: the error names the thing, the reason and the remedy, and the server lives on."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from ark.bootstrap import ROOT, NodeError

pytestmark = pytest.mark.host

SMALL = {"width": 64, "height": 64}
FOLDER = {"diffusion_model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
KLEIN = ROOT / "assets" / "diffusion_models" / "ark_tiny_klein.safetensors"
VAE = ROOT / "assets" / "vae" / "ark_tiny_flux2_vae.safetensors"
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}


def read_header(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header and data."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_raw(path: Path, header: dict, data: bytes) -> None:
    """Write a safetensors file as told, true or not."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Write a valid safetensors file of zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    write_raw(path, header, bytes(offset))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes of a file."""
    return {
        name: tuple(entry["shape"])
        for name, entry in read_header(path)[0].items()
        if name != "__metadata__"
    }


def qwen3_shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """A Qwen3 text encoder of one head, in its file's names."""
    shapes = {"model.embed_tokens.weight": (1000, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        parts = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (64, hidden),
        }
        parts |= {
            "mlp.up_proj": (64, hidden),
            "mlp.down_proj": (hidden, 64),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
        }
        parts |= {f"self_attn.{name}_proj": (128, hidden) for name in "qkv"} | {
            "self_attn.o_proj": (hidden, 128)
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def truncated(path: Path) -> None:
    raw = KLEIN.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(KLEIN.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>Log in to download this file</body></html>" * 50)


def offsets_beyond_the_end(path: Path) -> None:
    header, data = read_header(KLEIN)
    entry = header[next(name for name in header if name != "__metadata__")]
    entry["data_offsets"] = [start + 10**9 for start in entry["data_offsets"]]
    write_raw(path, header, data)


def offsets_that_overlap(path: Path) -> None:
    header, data = read_header(KLEIN)
    names = [name for name in header if name != "__metadata__" and header[name]["shape"] == [128]]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    write_raw(path, header, data)


def shape_larger_than_its_bytes(path: Path) -> None:
    header, data = read_header(KLEIN)
    header["txt_in.weight"]["shape"][0] *= 4
    write_raw(path, header, data)


def flux1(path: Path) -> None:
    shapes = {
        "img_in.weight": (256, 64),
        "txt_in.weight": (256, 4096),
        "double_blocks.0.img_mod.lin.weight": (1536, 256),
    }
    write_zeros(
        path,
        shapes
        | {
            "double_blocks.0.img_attn.qkv.weight": (768, 256),
            "single_blocks.0.linear1.weight": (64, 256),
        },
    )


def sdxl_checkpoint(path: Path) -> None:
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (64, 2816),
    }
    write_zeros(path, shapes | {"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3)}, "F16")


def sdxl_unet(path: Path) -> None:
    write_zeros(
        path, {"input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (64, 2816)}, "F16"
    )


def the_vae(path: Path) -> None:
    shutil.copy(VAE, path)


def the_transformer(path: Path) -> None:
    shutil.copy(KLEIN, path)


def transformer_that_lacks_a_tensor(path: Path) -> None:
    shapes = shapes_of(KLEIN)
    del shapes["final_layer.linear.weight"]
    write_zeros(path, shapes)


def nvfp4_transformer(path: Path) -> None:
    header, data = read_header(KLEIN)
    config = json.dumps({"format": "nvfp4"}).encode()
    entry = {
        "dtype": "U8",
        "shape": [len(config)],
        "data_offsets": [len(data), len(data) + len(config)],
    }
    write_raw(path, {**header, "single_blocks.0.linear1.comfy_quant": entry}, data + config)


def int8_transformer(path: Path) -> None:
    write_zeros(path, shapes_of(KLEIN), "I8")


def broken_quantisation(path: Path) -> None:
    header, data = read_header(KLEIN)
    write_raw(path, {**header, "__metadata__": {"_quantization_metadata": "{not json"}}, data)


def int8_text_encoder(path: Path) -> None:
    write_zeros(path, qwen3_shapes(64, 27), "I8")


def wide_text_encoder(path: Path) -> None:
    write_zeros(path, qwen3_shapes(96, 27))


def short_text_encoder(path: Path) -> None:
    write_zeros(path, qwen3_shapes(64, 12))


def sd_vae(path: Path) -> None:
    write_zeros(
        path,
        {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
        "F16",
    )


DOWNLOAD_AGAIN = "Download it again"
CHOOSE_KLEIN = "Choose a FLUX.2-Klein transformer"
# slot, what is in the file, what the error says besides the file's name: reason, remedy
BAD_FILES = [
    ("diffusion_model", truncated, "not a whole safetensors file", DOWNLOAD_AGAIN),
    ("diffusion_model", cut_in_the_header, "not a whole safetensors file", DOWNLOAD_AGAIN),
    ("diffusion_model", empty, "not a whole safetensors file", DOWNLOAD_AGAIN),
    ("diffusion_model", web_page, "not a whole safetensors file", "it is not a safetensors file"),
    ("diffusion_model", offsets_beyond_the_end, "not a whole safetensors file", DOWNLOAD_AGAIN),
    ("diffusion_model", offsets_that_overlap, "not a whole safetensors file", DOWNLOAD_AGAIN),
    (
        "diffusion_model",
        shape_larger_than_its_bytes,
        "not a whole safetensors file",
        DOWNLOAD_AGAIN,
    ),
    ("diffusion_model", flux1, "is a FLUX.1 transformer", CHOOSE_KLEIN),
    ("diffusion_model", sdxl_checkpoint, "is an SDXL or SD checkpoint", CHOOSE_KLEIN),
    ("diffusion_model", sdxl_unet, "is an SDXL or SD U-Net", CHOOSE_KLEIN),
    ("diffusion_model", the_vae, "is the FLUX.2 autoencoder", CHOOSE_KLEIN),
    (
        "diffusion_model",
        transformer_that_lacks_a_tensor,
        "final_layer.linear.weight",
        DOWNLOAD_AGAIN,
    ),
    ("diffusion_model", nvfp4_transformer, "is quantised to nvfp4", "Use the bf16 or the fp8 file"),
    ("diffusion_model", int8_transformer, "is quantised to int8", "Use the bf16 or the fp8 file"),
    ("diffusion_model", broken_quantisation, "describes its quantisation", "use the bf16 file"),
    ("text_encoder", int8_text_encoder, "is quantised to int8", "Use the bf16 or the fp8 file"),
    (
        "text_encoder",
        wide_text_encoder,
        "makes conditioning of width 288 (3 x 96)",
        "Choose the Qwen3 text encoder of hidden size 64",
    ),
    ("text_encoder", short_text_encoder, "has 12 layers", "Choose the Qwen3 text encoder"),
    ("text_encoder", the_transformer, "is a FLUX.2 transformer", "Choose a Qwen3 text encoder"),
    ("text_encoder", truncated, "not a whole safetensors file", DOWNLOAD_AGAIN),
    ("vae", sd_vae, "is an autoencoder of another model", "Choose the FLUX.2 autoencoder"),
    ("vae", the_transformer, "is a FLUX.2 transformer", "Choose the FLUX.2 autoencoder"),
    ("vae", web_page, "not a whole safetensors file", DOWNLOAD_AGAIN),
]


def refused(server, graph: dict) -> str:
    """Queue a graph that must fail: the text that the user sees."""
    with pytest.raises(NodeError) as caught:
        server.client.run(graph, timeout=120)
    return str(caught.value)


@pytest.fixture
def lives_on(server, fresh_seed: int):
    """After the test the server renders the next prompt, the sampler included."""
    yield
    assert server.host.alive(), server.host.log_tail()
    graph = server.graph(
        ArkSampler4Step={"seed": fresh_seed, "steps": 1}, EmptyFlux2LatentImage=SMALL
    )
    result = server.client.run(graph, timeout=120)
    assert server.node_of(graph, "ArkSampler4Step") in result["node_seconds"]
    assert server.pixels(result["images"][0]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("slot", "write", "reason", "remedy"),
    BAD_FILES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_file_is_refused_by_name(server, lives_on, slot, write, reason, remedy):
    path = server.host.base / "models" / FOLDER[slot] / f"{write.__name__}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    before = path.read_bytes()
    text = refused(server, server.graph(ArkFastLoader={slot: path.name}))
    assert "ArkFastLoader" in text and path.name in text
    assert reason in text
    assert remedy in text
    assert path.read_bytes() == before
    path.unlink()  # nothing keeps it open on any system


@pytest.mark.parametrize("slot", FOLDER)
def test_missing_file_is_refused_before_anything_runs(server, lives_on, slot):
    text = refused(server, server.graph(ArkFastLoader={slot: "not_there.safetensors"}))
    assert f"not_there.safetensors is not in models/{FOLDER[slot]}" in text
    assert "Put the file there or choose another one" in text


def test_file_outside_the_folders_is_refused(server, lives_on):
    outside = server.host.base / "models" / "outside.safetensors"
    shutil.copy(KLEIN, outside)
    text = refused(
        server, server.graph(ArkFastLoader={"diffusion_model": "../outside.safetensors"})
    )
    assert "outside.safetensors" in text and "not in models/diffusion_models" in text


def test_replaced_file_is_read_again(server, lives_on):
    path = server.host.base / "models" / "vae" / "replaced.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(VAE, path)
    graph = server.graph(ArkFastLoader={"vae": path.name}, EmptyFlux2LatentImage=SMALL)
    server.render(graph)
    web_page(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    assert "replaced.safetensors is not a whole safetensors file" in refused(server, graph)


@pytest.mark.parametrize(
    ("node", "channels"), [("EmptySD3LatentImage", 16), ("EmptyLatentImage", 4)]
)
def test_latent_of_the_wrong_channels(server, lives_on, node, channels):
    graph = server.graph()
    graph[server.node_of(graph, "EmptyFlux2LatentImage")] = {
        "class_type": node,
        "inputs": {**SMALL, "batch_size": 1},
    }
    text = refused(server, graph)
    assert "ArkSampler4Step" in text
    assert f"The latent has {channels} channels" in text and "128" in text
    assert "Use EmptyFlux2LatentImage" in text


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("steps", 0, "min of 1"),
        ("steps", 51, "max of 50"),
        ("denoise", 0.0, "min of 0.01"),
        ("denoise", 1.5, "max of 1.0"),
        ("cfg", -1.0, "min of 0.0"),
    ],
)
def test_number_out_of_range(server, lives_on, name, value, limit):
    text = refused(server, server.graph(ArkSampler4Step={name: value}))
    assert "ArkSampler4Step" in text and name in text
    assert str(value) in text
    assert limit in text


def test_cfg_without_a_negative(server, lives_on):
    text = refused(server, server.graph(ArkSampler4Step={"cfg": 3.0}, EmptyFlux2LatentImage=SMALL))
    assert "cfg is 3, and there is no negative" in text
    assert "set cfg to 1" in text


def test_five_reference_images(server, lives_on):
    graph = server.graph(EmptyFlux2LatentImage=SMALL)
    sampler = graph[server.node_of(graph, "ArkSampler4Step")]["inputs"]
    vae = graph[server.node_of(graph, "VAEDecode")]["inputs"]["vae"]
    graph["image"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 70, "height": 50, "batch_size": 5, "color": 0},
    }
    graph["references"] = {
        "class_type": "ArkReferenceImages",
        "inputs": {"conditioning": sampler["positive"], "vae": vae, "image1": ["image", 0]},
    }
    sampler["positive"] = ["references", 0]
    text = refused(server, graph)
    assert "ArkReferenceImages" in text
    assert "There are 5 reference images" in text and "Connect fewer" in text


def test_attention_that_does_not_exist(server, lives_on):
    text = refused(server, server.graph(ArkSageCombustion={"attention": "warp"}))
    assert "warp is not one of auto" in text


def test_attention_that_cannot_run_here_says_why(server, lives_on):
    if not server.on_cpu:
        pytest.skip("this machine's GPU can run it")
    text = refused(server, server.graph(ArkSageCombustion={"attention": "cudnn"}))
    assert "cudnn: needs an NVIDIA GPU, this is CPU" in text
    assert "Choose 'auto'" in text


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "a red circle, " * 358, "{} {0} <|im_end|> (a:1.3) \\ embedding:none", "日本 🟥"],
)
def test_unusual_prompts_work(server, lives_on, prompt):
    image = server.render(
        server.graph(CLIPTextEncode={"text": prompt}, EmptyFlux2LatentImage=SMALL)
    )
    assert image.std() > 0
