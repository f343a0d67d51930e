"""bootstrap.py: its pure parts, and its failures with real processes."""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ark import bootstrap
from ark.bootstrap import BootstrapError, Client, Host, NodeError, WebSocket, to_api

ROOT = Path(bootstrap.__file__).resolve().parent

# --- the workflow's two forms --------------------------------------------------------------------------------------

INFO = {
    "Load": {"input": {"required": {"file": [["a", "b"], {}]}}},
    "Patch": {
        "input": {"required": {"model": ["MODEL"], "kernel": ["COMBO", {"options": ["auto"]}]}}
    },
    "Sample": {
        "input": {
            "required": {"model": ["MODEL"], "seed": ["INT", {}], "steps": ["INT", {}]},
            "optional": {"sigmas": ["FLOAT", {"forceInput": True}], "denoise": ["FLOAT", {}]},
        }
    },
    "Save": {"input": {"required": {"latent": ["LATENT"]}}},
}


def workflow(patch_mode=0, load_mode=0):
    """Load -> Patch -> Sample -> Save, with a note and a reroute."""
    return {
        "nodes": [
            {
                "id": 1,
                "type": "Load",
                "mode": load_mode,
                "inputs": [],
                "outputs": [{"type": "MODEL"}],
                "widgets_values": ["b"],
            },
            {
                "id": 2,
                "type": "Patch",
                "mode": patch_mode,
                "inputs": [{"name": "model", "type": "MODEL", "link": 10}],
                "outputs": [{"type": "MODEL"}],
                "widgets_values": ["auto"],
            },
            {
                "id": 3,
                "type": "Reroute",
                "inputs": [{"name": "", "type": "*", "link": 11}],
                "outputs": [{"type": "MODEL"}],
            },
            {
                "id": 4,
                "type": "Sample",
                "inputs": [{"name": "model", "type": "MODEL", "link": 12}],
                "outputs": [{"type": "LATENT"}],
                "widgets_values": [7, "randomize", 4, 0.5],
            },
            {
                "id": 5,
                "type": "Save",
                "inputs": [{"name": "latent", "type": "LATENT", "link": 13}],
                "outputs": [],
            },
            {"id": 6, "type": "MarkdownNote", "widgets_values": ["hello"]},
        ],
        "links": [
            [10, 1, 0, 2, 0, "MODEL"],
            [11, 2, 0, 3, 0, "MODEL"],
            {
                "id": 12,
                "origin_id": 3,
                "origin_slot": 0,
                "target_id": 4,
                "target_slot": 0,
                "type": "MODEL",
            },
            [13, 4, 0, 5, 0, "LATENT"],
        ],
    }


def test_to_api_names_widgets_and_links():
    graph = to_api(workflow(), INFO)
    assert set(graph) == {"1", "2", "4", "5"}
    assert graph["1"]["inputs"] == {"file": "b"}
    assert graph["4"]["inputs"] == {"seed": 7, "steps": 4, "denoise": 0.5, "model": ["2", 0]}
    assert graph["5"]["inputs"] == {"latent": ["4", 0]}


def test_to_api_passes_through_a_bypassed_node():
    graph = to_api(workflow(patch_mode=4), INFO)
    assert "2" not in graph
    assert graph["4"]["inputs"]["model"] == ["1", 0]


def test_to_api_drops_a_muted_node():
    graph = to_api(workflow(load_mode=2), INFO)
    assert "1" not in graph
    assert "model" not in graph["2"]["inputs"]


def test_to_api_names_a_missing_node():
    with pytest.raises(KeyError, match="no node Sample"):
        to_api(workflow(), {name: info for name, info in INFO.items() if name != "Sample"})


def test_named_widget_values_are_taken_as_they_are():
    flow = workflow()
    flow["nodes"][3]["widgets_values"] = {"seed": 3, "steps": 2}
    assert to_api(flow, INFO)["4"]["inputs"] == {"seed": 3, "steps": 2, "model": ["2", 0]}


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["256", "256x", "100x256", "0x16", "256x999999", "axb"])
def test_a_bad_size_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        bootstrap.parse(["demo", "--size", text])
    assert "multiples of 16" in capsys.readouterr().err


def test_the_interpreter_is_comfyuis_own(tmp_path, monkeypatch):
    comfyui, venv = tmp_path / "portable" / "ComfyUI", tmp_path / "ark"
    comfyui.mkdir(parents=True)
    here = Path(sys.executable)
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    assert bootstrap.interpreter(comfyui, venv) == bootstrap.interpreter(None, venv) == here

    def make(path: Path) -> Path:
        path.parent.mkdir(parents=True)
        path.touch()
        return path

    own = make(bootstrap.python_of(venv))
    assert bootstrap.interpreter(comfyui, venv) == bootstrap.interpreter(None, venv) == own
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: "torch is here")
    assert bootstrap.interpreter(comfyui, venv) == here
    assert bootstrap.interpreter(None, venv) == own
    portable = make(comfyui.parent / "python_embeded" / "python.exe")
    assert bootstrap.interpreter(comfyui, venv) == portable
    theirs = make(bootstrap.python_of(comfyui / "venv"))
    assert bootstrap.interpreter(comfyui, venv) == theirs


def test_pytest_arguments_pass_through():
    args = bootstrap.parse(["test", "-k", "golden", "--venv", "v", "-x", "tests/host"])
    assert args.rest == ["-k", "golden", "-x", "tests/host"]
    assert args.venv == "v"


def test_real_files_are_named_all_or_none(tmp_path):
    args = bootstrap.parse(["demo", "--vae", str(tmp_path / "v.safetensors")])
    with pytest.raises(BootstrapError, match="--diffusion-model and --text-encoder is missing"):
        bootstrap.named_models(args)


def test_a_folder_without_comfyui_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BootstrapError, match="not a ComfyUI folder"):
        bootstrap.find_comfyui(str(tmp_path))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(BootstrapError, match="COMFYUI_PATH names"):
        bootstrap.find_comfyui(None)


# --- requirements and pip ------------------------------------------------------------------------------------------


def test_host_requirements_are_sorted_out(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "comfyui-frontend-package==1.2\ncomfyui_workflow_templates==3\ntorch\ntorchvision\nnumpy>=1.25 # why\n\n#x\nPillow\n"
    )
    assert bootstrap.host_requirements(tmp_path) == (
        ["numpy>=1.25", "Pillow"],
        ["comfyui-frontend-package==1.2"],
    )


def test_a_version_that_the_host_pins_wins():
    assert not any(pin.startswith("yarl") for pin in bootstrap.constraints(["yarl==1.0"]))
    assert any(pin.startswith("yarl") for pin in bootstrap.constraints(["yarl>=1.0"]))


def test_pyproject_and_bootstrap_pin_the_same_versions():
    pins = {*bootstrap.TEST, *bootstrap.PINS_NEWER_PYTHON, *bootstrap.PINS_PYTHON_310}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for pin in re.findall(
        r'"((?:pytest|ruff|mypy|hypothesis|diffusers|transformers|triton)==[^";]+)', text
    ):
        assert pin in {known.split(";")[0] for known in pins}
    assert f'required-version = "=={bootstrap.TEST[2].split("==")[1]}"' in text


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "WARNING: Retrying ... Temporary failure in name resolution",
            "registry cannot be reached",
        ),
        ("ERROR: ResolutionImpossible", "could not install"),
    ],
)
def test_pip_failures_are_explained(output, sentence):
    error = bootstrap.explain_pip(output)
    assert sentence in str(error) and error.remedy and error.log == output


def test_no_space_is_said_before_the_install(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bootstrap.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**8})
    )
    with pytest.raises(BootstrapError, match="no space for the environment: 0.1 GB free"):
        bootstrap.Environment(tmp_path / "venv").create()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BootstrapError, match="not made by this command"):
        bootstrap.Environment(tmp_path).create()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_no_network_ends_with_a_sentence_and_a_remedy(tmp_path):
    unreachable = "http://127.0.0.1:9/simple"
    variables = {
        **os.environ,
        **dict.fromkeys(("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"), unreachable),
        **{
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
            "PIP_TIMEOUT": "1",
        },
    }
    variables.pop("COMFYUI_PATH", None)
    command = [
        sys.executable,
        str(ROOT / "bootstrap.py"),
        "demo",
        "--venv",
        str(tmp_path / "venv"),
        "--out",
        str(tmp_path / "a.png"),
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: The package registry cannot be reached." in done.stderr
    assert "remedy: Check the network" in done.stderr
    assert "Traceback" not in done.stderr


# --- the server ----------------------------------------------------------------------------------------------------

ANSWERS = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake_host(folder: Path, main: str) -> Path:
    """A folder that starts like a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "cli_args.py").write_text("")
    (folder / "requirements.txt").write_text("")
    (folder / "main.py").write_text(main)
    return folder


def running(pid: int) -> bool:
    """Whether a process runs (one that only waits to be reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"
)


@linux
def test_a_stopped_host_leaves_nothing_behind(tmp_path):
    with Host.start(fake_host(tmp_path / "host", ANSWERS)) as host:
        assert host.alive() and Client(host.url).get("/") == {}
        child = int(host.log_tail().split("child ")[1].split()[0])
        base = host.base
        assert (base / "custom_nodes/ark/bootstrap.py").is_file()
        assert json.loads((base / "user/default/comfy.settings.json").read_text()) == {
            "Comfy.TutorialCompleted": True
        }
    assert not host.alive() and not base.exists()
    assert wait_until(lambda: not running(child))
    assert bootstrap.free_port(host.port) == host.port
    assert (ROOT / "bootstrap.py").is_file()  # the link went, not the pack


@linux
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["TERM", "INT", "KILL"]
)
def test_a_host_does_not_outlive_its_parent(tmp_path, number):
    host = fake_host(tmp_path / "host", ANSWERS)
    code = (
        "import sys, time, signal, bootstrap; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        f"with bootstrap.Host.start(Path({str(host)!r}), base=Path({str(tmp_path / 'base')!r})) as host:\n"
        "    print(host.process.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid = int(parent.stdout.readline())
    child = int((tmp_path / "base/host.log").read_text().split("child ")[1].split()[0])
    assert running(pid) and running(child)
    parent.send_signal(number)
    parent.wait(10)
    parent.stdout.close()
    assert wait_until(lambda: not running(pid) and not running(child))


def test_a_host_that_fails_to_start_shows_its_log(tmp_path):
    host = fake_host(tmp_path / "host", "print('no such thing as a GPU'); raise SystemExit(7)")
    with pytest.raises(BootstrapError, match="ended during its start, exit code 7") as caught:
        Host.start(host)
    assert "no such thing as a GPU" in caught.value.log and caught.value.remedy


def test_a_host_that_never_answers_is_given_up(tmp_path):
    before = list(bootstrap._children)  # the servers of other tests, if any
    with pytest.raises(BootstrapError, match="did not answer within 1 seconds"):
        Host.start(fake_host(tmp_path / "host", "import time; time.sleep(600)"), timeout=1)
    assert bootstrap._children == before


def test_a_taken_port_is_refused(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(BootstrapError, match="is taken"),
    ):
        Host.start(fake_host(tmp_path / "host", ANSWERS), port=server.getsockname()[1])


def test_flags_that_the_host_does_not_know_are_left_out(tmp_path):
    host = fake_host(tmp_path / "host", "import sys; print(sys.argv); raise SystemExit(1)")
    (host / "comfy/cli_args.py").write_text('add("--listen"); add("--disable-api-nodes")')
    with pytest.raises(BootstrapError) as caught:
        Host.start(host, extra_args=["--cpu"])
    assert "--listen" in caught.value.log and "--disable-api-nodes" in caught.value.log
    assert "--database-url" not in caught.value.log


# --- the websocket -------------------------------------------------------------------------------------------------


def frame(opcode: int, payload: bytes, final: bool = True) -> bytes:
    size = len(payload)
    length = (
        bytes([size])
        if size < 126
        else b"\x7e" + struct.pack(">H", size)
        if size < 65536
        else b"\x7f" + struct.pack(">Q", size)
    )
    return bytes([opcode | (0x80 if final else 0)]) + length + payload


def serve_frames(listener: socket.socket, frames: list[bytes], heard: list[bytes]) -> None:
    connection, _ = listener.accept()
    with connection:
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", request)[1]
        accept = base64.b64encode(
            hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        )
        connection.sendall(
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: "
            + accept
            + b"\r\n\r\n"
        )
        for part in frames:
            connection.sendall(part)
        heard.append(connection.recv(4096))


def test_websocket_reads_every_kind_of_frame():
    long, huge = b"x" * 300, b"y" * 70000
    frames = [
        *(frame(1, "größe".encode()), frame(2, long), frame(2, huge), frame(9, b"are you there")),
        *(
            frame(1, b"in ", final=False),
            frame(9, b""),
            frame(0, b"three ", final=False),
            frame(0, b"parts"),
            frame(8, b""),
        ),
    ]
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_frames, args=(listener, frames, heard))
        thread.start()
        stream = WebSocket("127.0.0.1", listener.getsockname()[1], "/ws")
        assert [stream.receive(5) for _ in range(4)] == ["größe", long, huge, "in three parts"]
        with pytest.raises(ConnectionError):
            stream.receive(5)
        stream.close()
        thread.join(5)
    pong = heard[0]
    assert pong[0] == 0x8A and pong[1] == 0x80 | 13  # masked, as a client's frames must be
    assert bytes(byte ^ pong[2 + i % 4] for i, byte in enumerate(pong[6:19])) == b"are you there"


# --- a real host, stock nodes only ---------------------------------------------------------------------------------

GRAPH = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "ark"}},
}


@pytest.fixture(scope="module")
def client(comfyui):
    with Host.start(comfyui) as host:
        yield Client(host.url)


@pytest.mark.host
def test_a_prompt_is_followed_to_its_image(client):
    result = client.run(GRAPH)
    kinds = [kind for kind, _ in result["events"]]
    assert result["status"] == "success" and kinds[-1] == "executing" and "execution_start" in kinds
    assert set(result["node_seconds"]) == {"1", "2"}
    assert [image[:4] for image in result["images"]] == [b"\x89PNG"]
    assert struct.unpack(">II", result["images"][0][16:24]) == (64, 32)


@pytest.mark.host
def test_a_refused_prompt_carries_the_servers_words(client):
    bad = {
        **GRAPH,
        "1": {"class_type": "EmptyImage", "inputs": {**GRAPH["1"]["inputs"], "width": -5}},
    }
    with pytest.raises(NodeError, match="EmptyImage: Value -5 smaller than min") as caught:
        client.run(bad)
    assert caught.value.node_type == "EmptyImage"
    with pytest.raises(NodeError, match="Nonsense"):
        client.run({"1": {"class_type": "Nonsense", "inputs": {}}})


@pytest.mark.host
def test_a_failing_node_raises_and_the_server_lives_on(client):
    crop = {"class_type": "ImagePadForOutpaint", "inputs": {"image": ["1", 0], "left": 16000, "top": 16000, "right": 16000,
            "bottom": 16000, "feathering": 0}}  # fmt: skip
    batch = {
        "class_type": "EmptyImage",
        "inputs": {"width": 16384, "height": 16384, "batch_size": 4096, "color": 0},
    }
    graph = {
        "1": batch,
        "3": crop,
        "2": {**GRAPH["2"], "inputs": {"images": ["3", 0], "filename_prefix": "ark"}},
    }
    with pytest.raises(NodeError) as caught:  # 13 TB asked for
        client.run(graph)
    assert caught.value.node_type == "EmptyImage"
    assert client.run(GRAPH)["status"] == "success"
