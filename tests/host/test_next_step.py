"""The first step of a prompt that is like the last one is begun before its sampler's turn: through a real server and its queue."""

import io
import json
import shutil
import time
from pathlib import Path

import pytest

from ark.bootstrap import WORKFLOW, Client, Host, to_api

pytestmark = pytest.mark.host
PACK = "begun_steps.py"
WHITE = "--whitelist-custom-nodes"


@pytest.fixture(scope="module")
def asked(comfyui, tmp_path_factory):
    """Runs prompts of a text and a seed, one after the other or queued at once: pictures, and what was begun and taken."""
    base = tmp_path_factory.mktemp("begun")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name(PACK), base / "custom_nodes" / PACK)
    with Host.start(
        comfyui, base, extra_args=["--cpu", "--cache-classic", WHITE, "ark", PACK]
    ) as host:
        client = Client(host.url)
        graph = to_api(json.loads(WORKFLOW.read_text(encoding="utf-8")), client.object_info())

        def prompt(text, seed, **more):
            made = json.loads(json.dumps(graph))
            for node in made.values():
                if node["class_type"] in ("CLIPTextEncode", "ArkTextEncode"):
                    node["inputs"]["text"] = text
                if node["class_type"] == "ArkSageCombustion":
                    node["inputs"] |= {"engine": "fused", "precision": "bf16"}
                if node["class_type"] == "ArkSampler4Step":
                    node["inputs"] |= {"seed": seed, **more}
            return made

        def picture(number):
            while number not in (history := client.get(f"/history/{number}")):
                time.sleep(0.05)
            (image,) = [image for node in history[number]["outputs"].values() for image in node.get("images", [])]  # fmt: skip
            place = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
            return client.get(f"/view?{place}", raw=True)

        def run(given, queued=False):
            numbers = []
            for each in given:
                numbers.append(client.prompt(prompt(*each[:2], **(each[2] if each[2:] else {}))))
                if not queued:
                    picture(numbers[-1])
            return [picture(number) for number in numbers], client.get("/begun")

        yield run, client


def pixels(png):
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


RUNS = [("a red circle", 1), ("a red circle", 2), ("a red circle", 3), ("a blue star", 3), ("a blue star", 4), ("a green ring", 5)]  # fmt: skip
QUEUED = [("a grey line", 6), ("a grey line", 7), ("a white dot", 8)]
OTHERS = [("a white dot", 9, {"steps": 3}), ("a white dot", 10, {"steps": 3})]


def test_it_is_begun_and_taken_and_the_pictures_are_the_same(asked):
    run, client = asked
    client.get("/begun?on=1")
    run(RUNS[:2])  # the second is the first that the model lies ready for
    found, began = {}, {}
    for name, given, queued in (("runs", RUNS[2:], False), ("queued", QUEUED, True), ("others", OTHERS, False)):  # fmt: skip
        found[name], began[name] = run(given, queued)
    client.get("/begun?on=0")
    for name, given in (("runs", RUNS[2:]), ("queued", QUEUED), ("others", OTHERS)):
        plain, log = run(given)
        runs = [line for line in log if not line.startswith("not begun")]
        assert runs == ["not taken"] * len(given)  # and all of them ran
        assert all((pixels(a) == pixels(b)).all() for a, b in zip(found[name], plain, strict=True))
    arrival, start, text = ([f"begun {when}", "taken"] for when in ("on arrival", "at its start", "after its text"))  # fmt: skip
    assert began["runs"] == arrival + text + arrival + text
    assert began["queued"] == text + start + text
    # of a prompt that is another one in more than that nothing is begun
    assert began["others"] == ["not taken", *arrival]
