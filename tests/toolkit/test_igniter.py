"""Mapping a file: the bytes are the file's, and every kind of damage gets a sentence with a remedy."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ark.toolkit.errors import ModelFileError
from ark.toolkit.igniter import file_fingerprint, load_state_dict


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(64, 32), "b": torch.randn(7).bfloat16(), "c": torch.arange(5)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


def raw_file(path, header: bytes, body: bytes):
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def test_tensors_equal_the_file_and_the_file_stays(model_file):
    path, tensors = model_file
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    state_dict, metadata = load_state_dict(path)
    assert metadata == {"format": "pt"}
    assert sum(tensor.nbytes for tensor in state_dict.values()) == 64 * 32 * 4 + 7 * 2 + 5 * 8
    for name, tensor in tensors.items():
        assert state_dict[name].dtype == tensor.dtype
        assert torch.equal(state_dict[name], tensor)
    state_dict["a"].zero_()  # a private mapping: writing to the view must not reach the file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def header_of(entry: dict) -> bytes:
    return json.dumps({"w": entry}).encode()


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda p: p.write_bytes(b""),
        "text": lambda p: p.write_text("this is a web page, not a model" * 20),
        "huge header": lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "no json": lambda p: raw_file(p, b"not json at all", b""),
        "past the end": lambda p: raw_file(
            p, header_of({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), b"\0" * 8
        ),
        "shape lies": lambda p: raw_file(
            p, header_of({"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}), b"\0" * 16
        ),
        "negative": lambda p: raw_file(
            p, header_of({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}), b"\0" * 16
        ),
        "hole": lambda p: raw_file(
            p, header_of({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}), b"\0" * 24
        ),
        "no tensors": lambda p: raw_file(p, b"{}", b""),
    }.items(),
    ids=lambda item: item[0],
)
def test_damage_is_named(tmp_path, damage):
    path = tmp_path / "broken.safetensors"
    damage[1](path)
    with pytest.raises(ModelFileError, match="broken.safetensors") as caught:
        load_state_dict(path)
    assert caught.value.remedy in str(caught.value)


def test_truncated_file(model_file):
    path, _ = model_file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="not a whole safetensors file"):
        load_state_dict(path)


@pytest.mark.parametrize("name", ["model.gguf", "model.ckpt", "model.pt"])
def test_other_formats_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelFileError, match="Use the model's .safetensors"):
        load_state_dict(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match="is not there"):
        load_state_dict(tmp_path / "absent.safetensors")


def test_fingerprint_follows_the_content(model_file):
    path, _ = model_file
    before = file_fingerprint(path)
    path.write_bytes(path.read_bytes() + b"0")
    assert file_fingerprint(path) != before
