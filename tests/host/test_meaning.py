"""The embedded model draws what the prompt says: held-out captions, a real server, a judge that sees only pixels."""

import pytest

from ark.assets.scenes import sample_scenes
from ark.benchmarks.classifier import judge

pytestmark = pytest.mark.host
ASKED = sample_scenes(6, seed=11, held_out=True)


@pytest.mark.parametrize(("scene", "caption"), ASKED, ids=[caption for _, caption in ASKED])
def test_picture_is_of_what_the_prompt_says(server, fresh_seed: int, scene, caption: str):
    graph = server.graph(CLIPTextEncode={"text": caption}, ArkSampler4Step={"seed": fresh_seed})
    verdict = judge(server.render(graph), scene)
    assert all(verdict.values()), f"wrong: {[name for name, right in verdict.items() if not right]}"


def test_judge_sees_a_wrong_picture(server, fresh_seed: int):
    (scene, _), (_, other) = ASKED[0], ASKED[-1]
    graph = server.graph(CLIPTextEncode={"text": other}, ArkSampler4Step={"seed": fresh_seed})
    assert not all(judge(server.render(graph), scene).values())
