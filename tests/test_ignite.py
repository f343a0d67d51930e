"""The trigger script as a user of the command line meets it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("diffusers", reason="runs diffusers' pipeline")
from ark.toolkit import command_line
from ark.toolkit.batch import MANIFEST
from ark.toolkit.embedded import ASSETS, embedded_text_encoder
from ark.toolkit.errors import InputError
from ark.toolkit.model_files import find_model

try:
    find_model()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ignite_ark_4b.py"
SMALL = ["--size", "64x64", "--steps", "1"]
KLEIN = ASSETS / "diffusion_models" / "ark_tiny_klein.safetensors"


def start(*arguments, cwd, before=None):
    def child():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        if before:
            before()

    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        preexec_fn=child if os.name == "posix" else None,
    )  # fmt: skip


def ignite(*arguments, cwd, before=None):
    """Run the script as a process of its own: exit code, stdout, stderr."""
    process = start(*arguments, cwd=cwd, before=before)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """Run the script within this process, which is faster: exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("ignite_ark_4b", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ignite_ark_4b.py", *map(str, arguments)])
        try:
            code = command_line.run(script.main, time.perf_counter())
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def hashes(folders, suffixes):
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stamps(folders):
    """Size and time of every file but what Python compiles for itself."""
    files = (path for folder in folders for path in Path(folder).rglob("*"))
    found = {path: path.lstat() for path in files if "__pycache__" not in path.parts}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_one_command_makes_a_picture_and_changes_nothing_else(tmp_path):
    packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("diffusers", "transformers", "torch")]  # fmt: skip
    packages += [folder for folder in find_model().tokenizer.parents if folder.name == "comfy"]
    models = [ASSETS, embedded_text_encoder().parent, find_model().tokenizer]
    suffixes = {".safetensors", ".json", ".txt"}
    before = hashes(packages, {".py"}), hashes(models, suffixes), stamps([*packages, *models])
    assert len(before[0]) > 1000 and len(before[1]) > 4 and len(before[2]) > len(before[0])
    code, out, err = ignite("a large green square on a black background", "--json", "--seed", 3, cwd=tmp_path)  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["images"][0]["file"] == "ark.png" and result["load"]["seconds"] > 0
    assert set(result["images"][0]["seconds"]) == {"encode", "steps", "decode"}
    assert os.listdir(tmp_path) == ["ark.png"]
    with Image.open(tmp_path / "ark.png") as image:
        assert image.size == (256, 256)
        pixels = list(image.convert("RGB").resize((32, 32)).getdata())
        share = sum(green > 100 > max(red, blue) for red, green, blue in pixels) / len(pixels)
        assert 0.05 < share < 0.6  # the square
        settings = json.loads(image.text["ark"])
    assert settings["seed"] == 3 and settings["engine"] == "fused"
    after = hashes(packages, {".py"}), hashes(models, suffixes), stamps([*packages, *models])
    assert before == after


def test_the_table_and_a_file_of_ones_own(inside, tmp_path):
    code, out, _ = inside("a red circle", "--out", "fox.png", "--engine", "plain", *SMALL)
    assert code == 0 and "image: fox.png" in out
    assert [line.split()[0] for line in out.splitlines()][:4] == ["load", "encode", "steps", "decode"]  # fmt: skip
    assert Image.open(tmp_path / "fox.png").size == (64, 64)


@pytest.mark.parametrize("references", [1, 2])
def test_an_edit_has_the_references_size(inside, tmp_path, references):
    for number in range(references):
        Image.new("RGB", (100 + 32 * number, 64), "blue").save(tmp_path / f"{number}.png")
    code, _, err = inside("make it red", "--steps", 1, "--image", *[f"{n}.png" for n in range(references)])  # fmt: skip
    assert code == 0, err
    with Image.open(tmp_path / "ark.png") as image:
        assert image.size == (96, 64)
        graph = json.loads(image.text["prompt"])
    assert [n["class_type"] for n in graph.values()].count("ReferenceLatent") == references


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no prompt"),
        (["a", "--batch", "x"], 2, "both a prompt and --batch"),
        (["a", "--engine", "warp"], 2, "invalid choice"),
        (["a", "--engine", "plain", "--precision", "fp8"], 2, "needs --engine fused"),
        (["a", "--size", "100x100"], 2, "multiples of 16"),
        (["a", "--size", "big"], 2, "is no size"),
        (["a", "--seed", "-1"], 2, "seed is -1"),
        (["a", "--steps", "0"], 2, "steps is 0"),
        ([" "], 2, "prompt is empty"),
        ([""], 2, "prompt is empty"),
        (["a", "--image", "none.png"], 2, "none.png is no picture"),
        (["a", "--out", "none/a.png"], 2, "no folder none"),
        (["a", "--out", "a.jpg"], 2, "no name for a PNG"),
        (["a", "--model", "none"], 1, "none is not there"),
        (["a", "--model", str(KLEIN)], 1, "no text encoder and no VAE"),
        (["--batch", "none.jsonl"], 2, "none.jsonl cannot be read"),
        (["a", *SMALL, "--attention", "warp"], 1, "no kernel of this name"),
    ],
)
def test_what_cannot_be_is_said_with_a_remedy(inside, tmp_path, arguments, code, message):
    ended, out, err = inside(*arguments)
    assert ended == code and message in err and not out and not os.listdir(tmp_path)
    assert "remedy: " in err or "usage: " in err


def test_a_broken_line_is_named_before_anything_is_made(inside, tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n{"prompt": "b", }\n')
    code, out, err = inside("--batch", "p.jsonl", "--json")
    assert code == 2 and "p.jsonl, line 2" in err
    assert "line 2" in json.loads(out)["error"] and os.listdir(tmp_path) == ["p.jsonl"]


def test_a_wrong_architecture(inside, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    code, _, err = inside("a", "--model", "m.safetensors")
    assert code == 1 and "m.safetensors is a FLUX.1 transformer" in err


def test_a_library_that_is_missing_is_named(inside, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _, err = inside("a red circle", *SMALL)
    assert code == 1 and "diffusers" in err and "pip install" in err and not os.listdir(tmp_path)


def test_half_a_shard_is_named(inside, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    save_file(load_file(KLEIN), folder / "klein-00001-of-00002.safetensors")
    code, _, err = inside("a", "--model", "model")
    assert code == 1 and "klein-00002-of-00002.safetensors is not beside it" in err


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_an_interrupted_batch_goes_on_and_makes_every_prompt_once(tmp_path):
    prompts = [f"a red circle number {number}" for number in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    arguments = ("--batch", "p.jsonl", "--out", "out", "--size", "128x128", "--steps", "10")
    process = start(*arguments, cwd=tmp_path)
    out = tmp_path / "out"
    deadline = time.monotonic() + 200
    while not list(out.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Stopping at the next step" in err
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 0 < len(first) < 5 and not list(out.glob(".*"))
    for path in out.glob("*.png"):
        Image.open(path).load()  # whole
    code, text, err = ignite(*arguments, "--json", cwd=tmp_path)
    assert code == 0, err
    result = json.loads(text)
    assert result["passed_over"] == len(first) and len(result["images"]) == 5 - len(first)
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert sorted(line["number"] for line in lines) == [1, 2, 3, 4, 5]
    assert [line["prompt"] for line in sorted(lines, key=lambda line: line["number"])] == prompts
    assert len(list(out.glob("*.png"))) == 5 and len(list(out.iterdir())) == 6
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in first.items())


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on the size of files")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    code, _, err = ignite("a red circle", *SMALL, cwd=tmp_path, before=limit)
    assert code == 1 and "The disk is full" in err, err
    assert not os.listdir(tmp_path)


def test_help_is_quick_and_needs_nothing(tmp_path):
    code, out, _ = ignite("--help", cwd=tmp_path)
    assert code == 0 and "--batch" in out and "exit codes" in out
