"""The embedded model draws what the prompt says, and edits so: held out, a real server, a judge that sees only pixels."""

import copy
import io
import json

import pytest
from PIL import Image

from ark.assets.scenes import sample_edits, sample_scenes
from ark.benchmarks.classifier import judge, judge_edit
from ark.benchmarks.tiny_quality import EDIT_WORKFLOW, picture_of
from ark.bootstrap import to_api

pytestmark = pytest.mark.host
ASKED = sample_scenes(6, seed=11, held_out=True)
EDITS, SEED = sample_edits(12, seed=11), 2026  # four of each kind


@pytest.mark.parametrize(("scene", "caption"), ASKED, ids=[caption for _, caption in ASKED])
def test_picture_is_of_what_the_prompt_says(server, fresh_seed: int, scene, caption: str):
    graph = server.graph(CLIPTextEncode={"text": caption}, ArkSampler4Step={"seed": fresh_seed})
    verdict = judge(server.render(graph), scene)
    assert all(verdict.values()), f"wrong: {[name for name, right in verdict.items() if not right]}"


def test_judge_sees_a_wrong_picture(server, fresh_seed: int):
    (scene, _), (_, other) = ASKED[0], ASKED[-1]
    graph = server.graph(CLIPTextEncode={"text": other}, ArkSampler4Step={"seed": fresh_seed})
    assert not all(judge(server.render(graph), scene).values())


@pytest.fixture(scope="module")
def edited(server) -> list[bool]:
    """Of each edit: whether what is asked is there, and all else as it was."""
    workflow = to_api(json.loads(EDIT_WORKFLOW.read_text()), server.client.object_info())
    found = []
    for number, (edit, instruction) in enumerate(EDITS):
        reference, stream = picture_of(edit.source), io.BytesIO()
        Image.fromarray(reference).save(stream, "PNG")
        changes = {
            "CLIPTextEncode": {"text": instruction},
            "ArkSampler4Step": {"seed": SEED + number},
            "LoadImage": {"image": server.client.upload(f"edit{number}.png", stream.getvalue())},
        }
        graph = copy.deepcopy(workflow)
        for node in graph.values():
            node["inputs"].update(changes.get(node["class_type"], {}))
        found.append(all(judge_edit(server.render(graph), reference, edit).values()))
    return found


def test_an_edit_does_what_is_asked_and_keeps_the_rest(edited: list[bool]):
    assert sum(edited) >= len(EDITS) - 2, edited  # of a hundred it gets 92 right
    for kind in ("recolour", "move", "background"):
        assert any(right for right, (edit, _) in zip(edited, EDITS, strict=True) if edit.kind == kind)  # fmt: skip
