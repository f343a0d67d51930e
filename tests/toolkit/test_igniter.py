"""Opening a file: the bytes are the file's, and what happens to it meanwhile gets a sentence with a remedy."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ark.toolkit.errors import ModelFileError
from ark.toolkit.header import read_header
from ark.toolkit.igniter import bytes_of, file_fingerprint, open_model, strip_prefix


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(64, 32), "b": torch.randn(7).bfloat16(), "c": torch.arange(5)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


MAPPED, READ = 0, 1 << 30  # `in_memory`: which way a file takes


@pytest.mark.parametrize("in_memory", [MAPPED, READ], ids=["mapped", "read"])
def test_tensors_equal_the_file_and_the_file_stays(model_file, in_memory: int):
    path, tensors = model_file
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    opened = open_model(path, in_memory)
    state_dict, metadata = opened.tensors, opened.metadata
    assert metadata == {"format": "pt"}
    assert sum(tensor.nbytes for tensor in state_dict.values()) == 64 * 32 * 4 + 7 * 2 + 5 * 8
    for name, tensor in tensors.items():
        assert state_dict[name].dtype == tensor.dtype
        assert torch.equal(state_dict[name], tensor)
    state_dict["a"].zero_()  # a private mapping: writing to the view must not reach the file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_truncated_file(model_file):
    path, _ = model_file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="not a whole safetensors file"):
        open_model(path)


def test_header_of_odd_length(tmp_path, model_file):
    path, tensors = model_file
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    odd = (size + 3).to_bytes(8, "little") + raw[8 : 8 + size] + b"   " + raw[8 + size :]
    path.write_bytes(odd)  # legal: torch can view such bytes only after a copy
    for in_memory in (MAPPED, READ):
        state_dict = open_model(path, in_memory).tensors
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in tensors.items())


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def replace(path):
    other = path.with_name("other.safetensors")
    save_file({"a": torch.zeros(64, 32)}, other)
    os.replace(other, path)


@pytest.mark.parametrize("in_memory", [MAPPED, READ], ids=["mapped", "read"])
@pytest.mark.parametrize("change", [truncate, grow, replace, os.remove])
def test_file_that_changes_between_header_and_bytes(model_file, change, in_memory: int):
    path, _ = model_file
    file = read_header(path)
    change(path)
    with pytest.raises(ModelFileError, match="model.safetensors (was changed|is gone)"):
        bytes_of(file, in_memory)


@pytest.mark.parametrize("change", [truncate, grow, replace, os.remove])
def test_what_was_read_outlives_every_change(model_file, change):
    path, tensors = model_file
    state_dict = open_model(path, READ).tensors
    change(path)
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change", [replace, os.remove])
def test_what_was_mapped_outlives_a_replacement(model_file, change):
    path, tensors = model_file
    state_dict = open_model(path, MAPPED).tensors
    change(path)
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def shards(tmp_path):
    tensors = {f"w{i}": torch.randn(4, i + 1) for i in range(3)}
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, (key, tensor) in zip(names, tensors.items(), strict=True):
        save_file({key: tensor}, tmp_path / name)
    index = {"weight_map": dict(zip(tensors, names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return [tmp_path / name for name in names], tensors


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("chosen", [0, 2])
def test_any_shard_stands_for_all(shards, chosen: int, with_index: bool):
    paths, tensors = shards
    if not with_index:
        (paths[0].parent / "model.safetensors.index.json").unlink()
    state_dict = open_model(paths[chosen]).tensors
    assert state_dict.keys() == tensors.keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in tensors.items())


def test_missing_shard_is_named(shards):
    paths, _ = shards
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=f"{paths[1].name} is not beside it"):
        open_model(paths[0])


def test_tensor_in_two_shards(shards):
    paths, _ = shards
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ModelFileError, match="repeats tensor w0"):
        open_model(paths[0])


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": {"w": 3}}', '{"weight_map": {"w": "../x"}}']
)
def test_damaged_index(shards, index: str):
    paths, _ = shards
    (paths[0].parent / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelFileError, match="model.safetensors.index.json"):
        open_model(paths[0])


def test_strip_prefix():
    mixed = {"vae.a": torch.zeros(1), "vae.c": torch.zeros(2), "text.b": torch.ones(1)}
    assert strip_prefix(mixed, r"(vae|ae)\.", "a").keys() == {"a", "c"}
    assert strip_prefix(mixed, r"vae\.", "b") is mixed


@pytest.mark.parametrize("name", ["model.gguf", "model.ckpt", "model.pt"])
def test_other_formats_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelFileError, match="Use the model's .safetensors"):
        open_model(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match="is not there"):
        open_model(tmp_path / "absent.safetensors")


def test_fingerprint_follows_the_content(model_file):
    path, _ = model_file
    before = file_fingerprint(path)
    path.write_bytes(path.read_bytes() + b"0")
    assert file_fingerprint(path) != before
