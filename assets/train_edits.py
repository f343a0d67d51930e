"""Teach the embedded Klein to edit: `python assets/train_edits.py --tokenizer DIR --start DIR --out DIR` (one GPU).

Goes on from the folder that `python assets/pack.py --unpack DIR` or an earlier run wrote. Each step's batch is one third
captions, so that nothing is forgotten, and two thirds edits: the reference's latents (the autoencoder's mean) follow the
picture's own tokens at time 10, as ComfyUI and diffusers put them, and the loss is of the picture's own tokens only. Both
kinds are in one CUDA graph and share one pass of the text encoder. The autoencoder stays as it is.

The pictures come in families of four: a scene, one thing recoloured in it, one moved, another background. There are three
edits and three ways back in each, and each scene that has words is a caption's picture. As in `train.py`, text is cut to
64 tokens first, and Klein's own 512 come after that. --minutes bounds everything, and files are written well before the
end. With `--device cpu` a handful of steps runs without a compiler, to try the script out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import scenes as world
import torch
from train import (
    MAX_TOKENS,
    REFERENCE_TIME,
    SEED,
    Captions,
    FlowTrainer,
    averaged,
    load_vae,
    text_features,
    write_picture,
    write_weights,
)

KINDS = list(world.INSTRUCTIONS)
CENTERS = (4, 5, 9, 10)  # columns of `encode_scenes`


class Families(Captions):
    """Scenes in families, their captions and the edits between them; and what is held out, to watch the training."""

    def __init__(
        self, tokenizer_dir: str, count: int, watched: int, device: str, vocabulary: list[int]
    ):
        rng, scenes = random.Random(SEED), []
        captions, pictures, instructions, pairs = [], [], [], []
        families = world.sample_families(count, SEED)
        for edits in families:
            first = len(scenes)
            scenes += [edits[0].source, *(edit.result for edit in edits)]
            for number, edit in enumerate(edits, start=first + 1):
                instructions += [edit.instruction(rng), edit.back().instruction(rng)]
                pairs += [(first, number), (number, first)]
            with_words = [n for n in range(first, len(scenes)) if scenes[n].where]
            captions += [scenes[n].caption(rng) for n in with_words]
            pictures += with_words
        self.rows = shake(world.encode_scenes(scenes), families).to(device)
        self.pictures = torch.tensor(pictures, device=device)
        self.pairs = torch.tensor(pairs, device=device)  # [edits, 2]: source, result

        asked = world.sample_edits(watched, SEED)
        self.watched = [edit for edit, _ in asked]
        told = world.sample_scenes(watched // 2, SEED, held_out=True)
        self.told = world.encode_scenes([scene for scene, _ in told]).to(device)
        texts = [captions, instructions, [words for _, words in asked], [words for _, words in told]]  # fmt: skip
        self.tokenize(tokenizer_dir, sum(texts, []), device, vocabulary)
        numbers = torch.arange(len(self.ids), device=device)
        *_, self.watched_texts, self.told_texts = numbers.split([len(part) for part in texts])


def shake(rows: torch.Tensor, families: list[tuple[world.Edit, ...]]) -> torch.Tensor:
    """Move the centres off their places, alike in each four rows but for the thing that is moved."""
    offsets = (world.JITTER * torch.randn(len(families), 1, 2, 2)).repeat(1, len(KINDS) + 1, 1, 1)
    move = KINDS.index("move")
    moved = torch.tensor([edits[move].which for edits in families])
    fresh = world.JITTER * torch.randn(len(families), 2)
    offsets[torch.arange(len(families)), move + 1, moved] = fresh
    rows[:, CENTERS] += offsets.view(-1, 4)
    return rows


class EditTrainer(FlowTrainer):
    """Captions and edits in each batch."""

    def loss(self, batch: int, tokens: int) -> torch.Tensor:
        """Of one batch: a third pictures from captions, the rest edits of a reference."""
        image_ids, text_ids = self.places[tokens]
        behind = image_ids.clone()
        behind[:, 0] = REFERENCE_TIME
        families, told = self.captions, batch // 3
        caption = torch.randint(len(families.pictures), (told,), device=self.device)
        edit = torch.randint(len(families.pairs), (batch - told,), device=self.device)
        source, result = families.pairs[edit].unbind(1)
        picks = torch.cat([caption, len(families.pictures) + edit])
        features = text_features(self.text_encoder, *families.texts(picks, tokens))
        sigma = self.some_sigmas(batch)
        pictures = self.flow_loss(
            self.pool[families.pictures[caption]].float(), features[:told], sigma[:told], image_ids, text_ids
        )  # fmt: skip
        edits = self.flow_loss(
            self.pool[result].float(), features[told:], sigma[told:], torch.cat([image_ids, behind]), text_ids,
            reference=self.pool[source].float(),
        )  # fmt: skip
        return (told * pictures + (batch - told) * edits) / batch

    @torch.no_grad()
    def watch(self, out: Path) -> None:
        """Render held-out captions and edits, and say how near they are to the truth: nothing here steers the training.

        Of an edit, "asked" is right where nine in ten of the pixels that should change are nearer to the truth than to
        the reference, "kept" where not more than 1.5 % of the others differ from it visibly.
        """
        families = self.captions
        ids, lengths = families.texts(families.told_texts, MAX_TOKENS, unknown=0.0)
        truth = world.render(families.told, jitter=0.0)
        error = (self.sample(ids, lengths).clamp(-1, 1) - truth).abs().mean()
        print(f"held-out captions: distance {error:.4f}")

        scenes = [scene for edit in families.watched for scene in (edit.source, edit.result)]
        rows = world.encode_scenes(scenes).to(self.device)
        source, truth = world.render(rows[::2], jitter=0.0), world.render(rows[1::2], jitter=0.0)
        ids, lengths = families.texts(families.watched_texts, MAX_TOKENS, unknown=0.0)
        found = self.sample(ids, lengths, self.latents(rows[::2], 0.0).float()).clamp(-1, 1)
        wrong, left = (found - truth).abs().amax(1), (found - source).abs().amax(1)
        change = (truth - source).abs().amax(1) > 0.2
        asked = ((wrong < left) & change).sum((1, 2)) > 0.9 * change.sum((1, 2))
        kept = ((wrong > 0.3) & ~change).sum((1, 2)) < 0.015 * (~change).sum((1, 2))
        error, idle = (found - truth).abs().mean((1, 2, 3)), (source - truth).abs().mean((1, 2, 3))
        for number, kind in enumerate(KINDS):  # `sample_edits` takes the kinds in turn
            of = slice(number, None, len(KINDS))
            print(
                f"held-out edits, {kind}: asked {asked[of].float().mean():.1%}, kept {kept[of].float().mean():.1%}, "
                f"both {(asked & kept)[of].float().mean():.1%} of {len(asked[of])}; "
                f"distance {error[of].mean():.4f}, of the reference as it was {idle[of].mean():.4f}",
                flush=True,
            )
        lines = [part[:24].split(8) for part in (source, found, truth)]  # the truth beneath each
        shown = torch.cat([line for three in zip(*lines, strict=True) for line in three])
        write_picture(torch.nn.functional.avg_pool2d(shown, 2), out / "edits.png")


def keep(trainer: EditTrainer, out: Path) -> None:
    """Write the averaged weights and say how good they are."""
    start = time.time()
    with averaged(trainer):
        write_weights(trainer, out)
        trainer.watch(out)
    print(f"saved in {time.time() - start:.1f}s", flush=True)


def main() -> None:
    start = time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a folder with Qwen's tokenizer files")
    parser.add_argument("--start", required=True, type=Path, help="a folder of an earlier run")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--families", type=int, default=12_000)
    parser.add_argument("--watched", type=int, default=96, help="held-out edits at each save")
    parser.add_argument("--batch", type=int, default=192, help="half as many at 512 tokens")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    torch.manual_seed(SEED + 2)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    args.out.mkdir(parents=True, exist_ok=True)

    known = json.loads((args.start / "vocabulary.json").read_text())
    families = Families(args.tokenizer, args.families, args.watched, args.device, known)
    print(
        f"{len(families.pictures)} captions, {len(families.pairs)} edits, {len(families.vocabulary)} tokens "
        f"({len(families.vocabulary) - len(known)} of them new) after {time.time() - start:.0f}s",
        flush=True,
    )
    trainer = EditTrainer(families, load_vae(args.start, args.device), args.device, jitter=0.0)
    trainer.load(args.start)
    print(f"ready after {time.time() - start:.0f}s", flush=True)
    keep(
        trainer, args.out
    )  # before anything is learnt: what to compare with, and whether saving works
    end = start + 60 * args.minutes - (10 if trainer.on_gpu else 0)  # seconds for the last save
    trainer.run(0.6 * (end - time.time()), args.batch, 64, 1.2e-3, 3e-4, 0.002)
    keep(trainer, args.out)
    trainer.run(
        end - time.time(), args.batch // 2, MAX_TOKENS, 5e-4, 5e-6, 0.002, lambda: keep(trainer, args.out)
    )  # fmt: skip
    keep(trainer, args.out)
    print(f"ended after {time.time() - start:.0f}s", flush=True)


if __name__ == "__main__":
    main()
