"""What `assets/train_edits.py` trains is what the nodes run: the same edit by both, with the weights that ship."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ark.assets import pack, scenes
from ark.bootstrap import ROOT

pytestmark = pytest.mark.host
INSTRUCTION = "on a black background"  # as in edit_run.py
SCENE = scenes.Scene(
    "gray", (scenes.Thing("large", "red", "circle", (0.5, 0.52)),), "in the center"
)


@pytest.fixture(scope="module")
def trainer(comfyui: Path, tmp_path_factory):
    """The training's modules with the weights that ship, on CPU."""
    pytest.importorskip("diffusers", reason="the training uses diffusers' modules")
    folder = tmp_path_factory.mktemp("trained")
    pack.unpack(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "assets")
        import train

        class OneText(train.Captions):
            def __init__(self, tokenizer: Path, vocabulary: list[int]):
                self.rows = scenes.encode_scenes([SCENE])
                self.tokenize(str(tokenizer), [INSTRUCTION], "cpu", vocabulary)

        known = load_file(pack.ASSETS / pack.COMPACT.name)["token_ids"].tolist()
        texts = OneText(comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer", known)
        made = train.FlowTrainer(texts, train.load_vae(folder, "cpu"), "cpu", jitter=0.0)
        made.load(folder)
        made.train = train
        return made


@pytest.fixture(scope="module")
def shipped(comfyui: Path, trainer, run_in_host, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The same by the nodes' functions in a host."""
    folder = tmp_path_factory.mktemp("edit")
    picture = scenes.render(trainer.captions.rows, jitter=0.0).movedim(1, -1) * 0.5 + 0.5
    save_file({"image": picture.contiguous()}, folder / "picture.safetensors")
    run_in_host(
        comfyui, "edit_run.py", folder / "picture.safetensors", folder / "found.safetensors"
    )
    return load_file(folder / "found.safetensors")


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def test_an_edit_is_what_was_trained(trainer, shipped):
    train, captions = trainer.train, trainer.captions
    ids, lengths = captions.texts(torch.tensor([0]), train.MAX_TOKENS, unknown=0.0)
    features = train.text_features(trainer.text_encoder, ids, lengths)
    valid = int(lengths)
    assert relative_error(features[:, :valid], shipped["conditioning"][:, :valid]) < 1e-4
    reference = trainer.latents(captions.rows, 0.0).float()
    assert relative_error(reference, shipped["reference"]) < 1e-2  # the pool is in bf16
    made = trainer.denoise(shipped["noise"], features, shipped["reference"])
    assert relative_error(made, shipped["latents"]) < 1e-4
    alone = trainer.denoise(shipped["noise"], features)
    assert relative_error(alone, shipped["latents"]) > 1e-2  # else the reference was not looked at
