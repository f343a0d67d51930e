"""Embeddings are kept whole, within bounds, and what is damaged is not used."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from ark.toolkit import embeddings
from ark.toolkit.embeddings import Embeddings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ARK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ARK_EMBEDDINGS_GB", raising=False)
    return tmp_path / "embeddings"


def result(seed=0, tokens=16):
    torch.manual_seed(seed)
    return {"cond": torch.randn(1, tokens, 64), "attention_mask": torch.ones(1, tokens, dtype=torch.long)}  # fmt: skip


def same(a, b):
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def files(folder):
    return sorted(path.name for path in folder.glob("*/*"))


def test_after_a_restart_it_is_there_bit_for_bit(folder):
    first = Embeddings("encoder")
    assert not first.any_saved() and first.recent("a") is None and first.saved("a") is None
    assert not first.is_saved("a")
    first.keep("a", result())
    assert same(first.recent("a"), result())
    first.settle()
    again = Embeddings("encoder")
    assert again.any_saved() and again.is_saved("a") and again.recent("a") is None
    assert same(again.saved("a"), result())
    assert same(again.recent("a"), result())
    assert Embeddings("other").saved("a") is None and not Embeddings("other").any_saved()


def test_memory_holds_the_last_ones():
    size = sum(t.nbytes for t in result().values())
    kept = Embeddings("encoder", in_memory=2 * size, on_disk=0)
    for key in "ab":
        kept.keep(key, result())
    kept.recent("a")
    kept.keep("c", result())
    assert [kept.recent(key) is not None for key in "abc"] == [True, False, True]
    kept.keep("large", result(tokens=100))
    assert all(kept.recent(key) is None for key in ("a", "c", "large"))


def test_disk_holds_what_was_used_last(folder):
    kept = Embeddings("encoder")
    for at, key in enumerate("abc"):
        kept.keep(key, result())
        kept.settle()
        os.utime(folder / "encoder" / f"{key}.safetensors", (at, at))
    size = (folder / "encoder" / "a.safetensors").stat().st_size
    abandoned = folder / "encoder" / ".a.1234.part"
    abandoned.write_bytes(b"x")
    os.utime(abandoned, (0, 0))
    other = Embeddings("other", on_disk=3 * size)
    assert Embeddings("encoder").saved("a")
    other.keep("d", result())
    other.settle()
    assert files(folder) == ["a.safetensors", "c.safetensors", "d.safetensors"]
    # one that is larger than all the room is not written
    small = Embeddings("small", on_disk=size - 1)
    small.keep("e", result())
    small.settle()
    assert files(folder) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other tensors", "text", "folder"])
def test_a_damaged_file_is_ignored_and_written_anew(folder, damage):
    kept = Embeddings("encoder")
    kept.keep("a", result())
    kept.keep("b", result(1))
    kept.settle()
    path = folder / "encoder" / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "other tensors":
        from safetensors.torch import save_file

        save_file(result(), path)
    else:
        path.write_bytes({"cut": data[:-50], "flipped": data, "empty": b"", "text": b"hello" * 9}[damage])  # fmt: skip
    again = Embeddings("encoder")
    assert again.saved("a") is None
    assert same(again.saved("b"), result(1))
    again.keep("a", result())
    again.settle()
    if damage != "folder":
        assert same(Embeddings("encoder").saved("a"), result())
    assert same(again.recent("a"), result())


def test_what_is_not_finite_is_not_saved(folder):
    kept = Embeddings("encoder")
    kept.keep("a", {"cond": torch.tensor([1.0, float("nan")])})
    kept.keep("b", result(), lasting=False)
    kept.settle()
    assert files(folder) == []


def test_a_folder_that_cannot_be_written_is_said_once(folder, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    kept = Embeddings("encoder")
    with caplog.at_level(logging.WARNING, "ark"):
        for key in "abc":
            kept.keep(key, result())
            kept.settle()
    assert len(caplog.records) == 1 and "ARK_CACHE_DIR" in caplog.text
    assert same(kept.recent("c"), result()) and kept.saved("c") is None


def test_a_full_disk_leaves_nothing_behind(folder, caplog, monkeypatch):
    def full(path, *pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings, "write_whole", full)
    kept = Embeddings("encoder")
    with caplog.at_level(logging.WARNING, "ark"):
        kept.keep("a", result())
        kept.settle()
    assert "No space left" in caplog.text and files(folder) == []
    assert same(kept.recent("a"), result())


def test_the_pieces_are_a_file_as_the_library_writes_it():
    tensors = {
        "b": torch.tensor([True, False, True]),
        "a": torch.randn(3, 5).T,
        "c": torch.arange(3),
    }
    tensors |= {"empty": torch.empty(0, 4), "half": torch.randn(7).bfloat16()}
    data = b"".join(embeddings.in_pieces(tensors))
    assert data == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert same(load(data), tensors)
    embeddings.in_pieces(tensors)[-1][:1] = b"\0"
    assert not tensors["b"][0]  # a view, not a copy


@pytest.mark.parametrize(
    ("chosen", "limit"), [("", 10**9), ("0", 0), ("2.5", 25 * 10**8), ("-1", 10**9), ("lots", 10**9), ("inf", 10**9)]
)  # fmt: skip
def test_the_user_sets_the_limit(monkeypatch, chosen, limit):
    monkeypatch.setenv("ARK_EMBEDDINGS_GB", chosen)
    assert embeddings.disk_limit() == limit


def test_no_disk_if_the_user_wants_none(folder, monkeypatch):
    kept = Embeddings("encoder")
    kept.keep("a", result())
    kept.settle()
    monkeypatch.setenv("ARK_EMBEDDINGS_GB", "0")
    kept = Embeddings("encoder")
    assert kept.saved("a") is None and not kept.any_saved()
    kept.keep("b", result())
    kept.settle()
    assert files(folder) == ["a.safetensors"]


WORK = """
import sys, torch
from ark.toolkit.embeddings import Embeddings
for turn in range(30):
    kept = Embeddings("encoder", on_disk=40_000)
    for key in "abcdefghij":
        torch.manual_seed(ord(key))
        expected = torch.randn(1, 16, 64)
        found = kept.saved(key)
        assert found is None or torch.equal(found["cond"], expected)
        kept.keep(key, {"cond": expected})
    kept.settle()
    assert not kept._complained
print("done")
"""


def test_two_processes_at_once(folder):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(embeddings.__file__).parents[2]), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    both = [subprocess.Popen([sys.executable, "-c", WORK], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["done", "done"]
    assert 0 < sum(path.stat().st_size for path in folder.glob("*/*")) < 60_000
    assert not any(name.endswith(".part") for name in files(folder))


def test_what_waits_to_be_written_is_written_before_the_process_ends(folder):
    script = "import torch; from ark.toolkit.embeddings import Embeddings; Embeddings('encoder').keep('a', {'cond': torch.ones(1000, 1000)})"  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(embeddings.__file__).parents[2]), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=60)
    assert same(Embeddings("encoder").saved("a"), {"cond": torch.ones(1000, 1000)})
