"""The embedded model draws what the prompt says, and edits so: held out, a real server, a judge that sees only pixels."""

import io
import json

import pytest
from PIL import Image
from safetensors import safe_open

from ark.assets.scenes import sample_edits, sample_scenes
from ark.benchmarks.classifier import judge, judge_edit
from ark.benchmarks.tiny_quality import EDIT_WORKFLOW, picture_of
from ark.bootstrap import to_api
from ark.toolkit.embedded import COMPACT

pytestmark = pytest.mark.host
ASKED = sample_scenes(6, seed=11, held_out=True)
EDITS = sample_edits(6, seed=11)  # two of each kind
BEFORE_EDITS = 50  # tokens that it knew before assets/train_edits.py taught it more


@pytest.mark.parametrize(("scene", "caption"), ASKED, ids=[caption for _, caption in ASKED])
def test_picture_is_of_what_the_prompt_says(server, fresh_seed: int, scene, caption: str):
    graph = server.graph(CLIPTextEncode={"text": caption}, ArkSampler4Step={"seed": fresh_seed})
    verdict = judge(server.render(graph), scene)
    assert all(verdict.values()), f"wrong: {[name for name, right in verdict.items() if not right]}"


def test_judge_sees_a_wrong_picture(server, fresh_seed: int):
    (scene, _), (_, other) = ASKED[0], ASKED[-1]
    graph = server.graph(CLIPTextEncode={"text": other}, ArkSampler4Step={"seed": fresh_seed})
    assert not all(judge(server.render(graph), scene).values())


def words_known() -> int:
    with safe_open(COMPACT, "pt") as file:
        return file.get_slice("token_ids").get_shape()[0]


@pytest.mark.skipif(words_known() <= BEFORE_EDITS, reason="the embedded model was not taught to edit yet (assets/train_edits.py)")  # fmt: skip
@pytest.mark.parametrize(("edit", "instruction"), EDITS, ids=[words for _, words in EDITS])
def test_an_edit_does_what_is_asked_and_keeps_the_rest(
    server, fresh_seed: int, edit, instruction: str
):
    reference, stream = picture_of(edit.source), io.BytesIO()
    Image.fromarray(reference).save(stream, "PNG")
    name = server.client.upload(f"edit{fresh_seed}.png", stream.getvalue())
    graph = to_api(json.loads(EDIT_WORKFLOW.read_text()), server.client.object_info())
    changes = {
        "CLIPTextEncode": {"text": instruction},
        "ArkSampler4Step": {"seed": fresh_seed},
        "LoadImage": {"image": name},
    }
    for node in graph.values():
        node["inputs"].update(changes.get(node["class_type"], {}))
    verdict = judge_edit(server.render(graph), reference, edit)
    assert all(verdict.values()), f"wrong: {[name for name, right in verdict.items() if not right]}"
