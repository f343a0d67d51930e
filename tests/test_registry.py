"""What the registry's archive would hold: all that the pack needs, and no more."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from ark.bootstrap import ROOT, WORKFLOW, Client, Host, to_api

LARGEST = 25 << 20  # bytes of the archive; the embedded model is most of it
IMPORT_ALL = """
import importlib, importlib.util, sys
from pathlib import Path
root = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("ark", root / "__init__.py")
sys.modules["ark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ark"])
files = [*(root / "toolkit").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
files += [root / "patches" / f"{name}.py" for name in ("diffusers", "pipeline", "render")]
for file in files:
    name = ".".join(("ark", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert Path(module.__file__) == file, module.__file__
print(len(files))
"""


def tracked() -> list[str]:
    """The files that git knows."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def names() -> list[str]:
    """What is published: comfy-cli leaves out what .comfyignore matches, by the same library."""
    pathspec = pytest.importorskip("pathspec")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    rules = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", rules)
    return [name for name in tracked() if not ignored.match_file(name)]


@pytest.fixture(scope="module")
def published(names, tmp_path_factory) -> Path:
    """The archive, unpacked."""
    folder = tmp_path_factory.mktemp("registry") / "ark-klein"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_no_tests_and_no_tools_of_ours(names):
    assert not [name for name in names if re.search(r"(^|/)(tests?/|test_|conftest|\.)", name)]
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "bootstrap.py"} <= set(names)
    assert {name for name in names if name.startswith("benchmarks/")} == {
        f"benchmarks/{name}.py" for name in ("attention", "bench", "klein", "load", "models", "record")
    }  # fmt: skip


def test_the_archive_is_small(published, tmp_path):
    archive = tmp_path / "node.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in published.rglob("*"):
            packed.write(file, file.relative_to(published))
    assert archive.stat().st_size < LARGEST


def test_everything_that_is_imported_is_there(published):
    command = [sys.executable, "-c", IMPORT_ALL, str(published)]
    done = subprocess.run(command, cwd=published.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


def test_the_commands_work(published):
    command = [sys.executable, "bootstrap.py", "doctor", "--quick", "--json", "--python", sys.executable]  # fmt: skip
    done = subprocess.run(command, cwd=published, capture_output=True, text=True)
    assert "findings" in json.loads(done.stdout), done.stderr
    command = [sys.executable, "ignite_ark_4b.py", "a red circle", "--steps", "1", "--out", "made.png"]  # fmt: skip
    done = subprocess.run(command, cwd=published, capture_output=True, text=True)
    tokenizer = "The tokenizer is missing" in done.stderr  # without a ComfyUI there is none
    assert (published / "made.png").exists() or tokenizer, done.stderr


@pytest.mark.host
def test_a_server_runs_what_was_published(published, comfyui, tmp_path):
    shutil.copytree(published, tmp_path / "custom_nodes" / "ark")
    with Host.start(comfyui, tmp_path) as host:
        client = Client(host.url)
        workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        result = client.run(to_api(workflow, client.object_info()))
    assert result["status"] == "success" and len(result["images"]) == 1


def test_the_registrys_own_check_finds_nothing(published):
    # as `comfy node validate` runs it; what it finds today, it will refuse some day
    command = [sys.executable, "-m", "ruff", "check", ".", "-q", "--isolated", "--ignore-noqa", "--select", "S102,S307,E702"]  # fmt: skip
    done = subprocess.run(command, cwd=published, capture_output=True, text=True)
    assert done.stdout == "" and done.returncode == 0, done.stdout


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_registrys_entry_is_complete():
    text = project()
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    for field in ("PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"):
        assert re.search(rf'^{field} = ".+"$', text, re.MULTILINE), field


@pytest.mark.parametrize(("field", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_the_pictures_are_there(field, shape, names):
    address = re.search(rf'^{field} = "(.+)"$', project(), re.MULTILINE)[1]
    repository = re.search(r'^Repository = "https://github.com/(.+)"$', project(), re.MULTILINE)[1]
    name = address.removeprefix(f"https://raw.githubusercontent.com/{repository}/main/")
    assert name in names
    with Image.open(ROOT / name) as picture:
        width, height = picture.size
    assert width * shape[1] == height * shape[0]
    assert field == "Banner" or width <= 400  # px; the registry takes no larger icon


def test_the_changelog_has_the_version_or_says_what_is_to_come():
    version = re.search(r'^version = "(.+)"$', project(), re.MULTILINE)[1]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[(.+?)\]", text, re.MULTILINE)[1]
    assert first in ("Unreleased", version)


def test_a_wheel_holds_the_same_and_says_that_it_is_typed(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")  # building leaves things behind
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    wanted = {"ark/py.typed", "ark/nodes/load.py", "ark/web/docs/ArkFastLoader.md", "ark/workflows/ark_text_to_image.json"}  # fmt: skip
    wanted |= {f"ark/{path.relative_to(published)}" for path in published.rglob("*.safetensors")}
    wanted |= {f"ark/{path.relative_to(published)}" for path in (published / "toolkit").rglob("*.py")}  # fmt: skip
    assert wanted <= names
    assert not [name for name in names if "tests/" in name or "benchmarks/" in name]
