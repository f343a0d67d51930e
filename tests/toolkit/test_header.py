"""The header parser against damage: every bad file gives a ModelFileError that names it, and nothing else happens."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ark.toolkit import header as header_module
from ark.toolkit.errors import ModelFileError
from ark.toolkit.header import read_header

FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def raw(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def f32(start: int, end: int, shape: list | None = None) -> dict:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


# after the invalid files that safetensors' own tests keep (bindings and fuzz corpus), and more of the kind
INVALID = {
    "nothing": b"",
    "short": b"\x01\x02\x03",
    "header larger than the file": raw(b"{}", length=1000),
    "header larger than allowed": struct.pack("<Q", 100_000_001) + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "does not begin with {": raw(b' {"a": 1}'),
    "a list": raw(b"[1, 2]"),
    "not closed": raw(b'{"a": '),
    "deep": raw(b'{"a":' * 50_000),
    "a number of many digits": raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"0000"),
    "no tensors": raw({}),
    "only metadata": raw({"__metadata__": {"a": "b"}}),
    "metadata not text": raw({"__metadata__": {"a": 1}, "w": f32(0, 4)}, bytes(4)),
    "metadata a list": raw({"__metadata__": [], "w": f32(0, 4)}, bytes(4)),
    "a name twice": raw(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "entry is text": raw({"w": "F32"}),
    "entry lacks offsets": raw({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "unknown dtype": raw({"w": {**f32(0, 4), "dtype": "F7"}}, bytes(4)),
    "dtype is a list": raw({"w": {**f32(0, 4), "dtype": [1]}}, bytes(4)),
    "negative size": raw({"w": f32(0, 4, [-1])}, bytes(4)),
    "fraction": raw({"w": f32(0, 4, [1.0])}, bytes(4)),
    "true for one": raw({"w": f32(0, 4, [True])}, bytes(4)),
    "shape overflows 64 bits": raw({"w": f32(0, 4, [2**32, 2**32, 2**32])}, bytes(4)),
    "too many dimensions": raw({"w": f32(0, 4, [1] * 1000)}, bytes(4)),
    "offsets backwards": raw({"w": f32(4, 0, [1])}, bytes(4)),
    "offsets negative": raw({"w": f32(-4, 0, [1])}, bytes(4)),
    "three offsets": raw({"w": {**f32(0, 4), "data_offsets": [0, 4, 8]}}, bytes(4)),
    "past the end": raw({"w": f32(0, 8)}, bytes(4)),
    "far past the end": raw({"w": f32(0, 2**62)}, bytes(4)),
    "shape lies": raw({"w": f32(0, 4, [2])}, bytes(4)),
    "gap": raw({"a": f32(0, 4), "b": f32(8, 12)}, bytes(12)),
    "gap at the start": raw({"a": f32(4, 8)}, bytes(8)),
    "overlap": raw({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)),
    "the same bytes": raw({"a": f32(0, 4), "b": f32(0, 4)}, bytes(4)),
    "bytes left over": raw({"a": f32(0, 4)}, bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_invalid_file_is_an_error_that_names_it(tmp_path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="model.safetensors") as caught:
        read_header(path)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["shape lies", "past the end", "unknown dtype", "overlap", "gap"])
def test_error_names_the_tensor(tmp_path, name: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(INVALID[name])
    with pytest.raises(ModelFileError, match="tensor [wab] "):
        read_header(path)


def test_number_of_tensors_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(header_module, "MAX_TENSORS", 3)
    path = tmp_path / "model.safetensors"
    save_file({str(i): torch.zeros(1) for i in range(4)}, path)
    with pytest.raises(ModelFileError, match="4 tensors"):
        read_header(path)


def test_valid_corner_cases(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "fp8": torch.ones(3, 3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"k": "v"})
    found = read_header(path)
    assert found.metadata == {"k": "v"}
    assert {n: (e.dtype, e.shape) for n, e in found.entries.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }


def agree(path) -> None:
    """Whatever the file is: no exception but ModelFileError, and none where safetensors itself reads the file."""
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        theirs = None
    try:
        ours = {name: entry.shape for name, entry in read_header(path).entries.items()}
    except ModelFileError:
        ours = None
    if ours is not None:
        assert ours == theirs, "read although safetensors refuses it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.ones(2).bfloat16()}, path)
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_any_byte_may_be_wrong(tmp_path, whole: bytes, data):
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(broken)), st.integers(0, len(broken))))
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken[:cut])
    agree(path)


numbers = st.one_of(
    st.integers(-5, 40), st.sampled_from([2**31, 2**63, 2**64, 2**200, 1.5, None, True])
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "X", 3, None]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, max_size=3),
        "extra": st.integers(),
    },
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=5), entries, max_size=4), body=st.binary(max_size=40)
)
def test_any_header_may_come(tmp_path, header: dict, body: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header, body))
    agree(path)
