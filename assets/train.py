"""Train the embedded Klein: `python assets/train.py --tokenizer DIR --out DIR [--resume DIR] [--minutes 8]` (one GPU).

The modules are diffusers' and transformers' own at tiny width; nothing of Ark's is used, so what is trained here is
also an independent check of the code that loads it. Three stages, all from one seed:

1. the autoencoder, on rendered pictures (L1, a light KL, and noise on the latents so that it forgives small errors);
2. text encoder and transformer together, flow matching with the text cut to 64 tokens, which is quick;
3. the same at Klein's own 512 tokens, ending with the weights' moving average.

Six in ten noise levels are Klein's own four for a 256x256 picture, so no separate distillation is needed. A step of the
flow is one CUDA graph: launched kernel by kernel it takes four times as long. What ships came from 7.7 minutes (before
the CUDA graph) and 6.1 more with --resume, on one H100.
`assets/pack.py` turns the result into the files that ship.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import scenes as world
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

SEED = 20261124
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
PAD, TAPS, MAX_TOKENS = 151643, (9, 18, 27), 512
KL_WEIGHT = 3e-4
REFERENCE_TIME = 10  # the first reference's place on the time axis, as in ComfyUI and diffusers
CHANGED = 0.3  # mean difference of a token's latents from the reference's, above which it is meant to change
REPORT = 500  # steps between two lines
KLEIN_SIGMAS = (1.0, 0.95539, 0.87713, 0.70411)  # 4 steps at 256x256
# token ids of <think> and </think>; older Qwen vocabularies name them otherwise, the ids are what counts
THINK = {"<think>": 151667, "</think>": 151668}

# The group norm has 32 groups: at width 32 it is an instance norm, which forgets how strong a colour is and grows droplet
# artefacts. Two channels a group are the least that let one of them carry the scale of the other.
VAE_CONFIG = dict(
    block_out_channels=(64, 64, 64, 64), layers_per_block=2, latent_channels=32, sample_size=256
)
TRANSFORMER_CONFIG = dict(
    num_layers=2,
    num_single_layers=2,
    num_attention_heads=2,
    joint_attention_dim=192,
    guidance_embeds=False,
)


def text_config(vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=28, num_attention_heads=1,
        num_key_value_heads=1, head_dim=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip


class Captions:
    """A pool of scenes with their token ids in a compact vocabulary; the last row stands for every other token."""

    def __init__(
        self, tokenizer_dir: str, count: int, device: str, vocabulary: list[int] | None = None
    ):
        pool = world.sample_scenes(count, SEED, held_out=False)
        self.rows = world.encode_scenes([scene for scene, _ in pool]).to(device)
        self.tokenize(tokenizer_dir, [caption for _, caption in pool], device, vocabulary)

    def tokenize(
        self, tokenizer_dir: str, texts: list[str], device: str, vocabulary: list[int] | None
    ) -> None:
        """Fill `ids` and `lengths`; tokens that a given vocabulary lacks are appended to it."""
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        start, middle = TEMPLATE.split("{}")
        head = tokenizer(start)["input_ids"]
        before, after = middle.split("<think>\n\n</think>")
        tail = tokenizer(before)["input_ids"] + [
            THINK["<think>"],
            *tokenizer("\n\n")["input_ids"],
            THINK["</think>"],
        ]
        tail += tokenizer(after)["input_ids"]
        bodies = tokenizer(texts)["input_ids"]
        known = vocabulary or []
        needed = {token for ids in (head, tail, [PAD], *bodies) for token in ids}
        self.vocabulary = known + sorted(needed - set(known))
        compact = {token: row for row, token in enumerate(self.vocabulary)}
        lengths = [len(head) + len(body) + len(tail) for body in bodies]
        self.pad, self.unknown = compact[PAD], len(self.vocabulary)
        self.head, self.tail = len(head), len(tail)
        ids = [[compact[t] for t in head + body + tail] for body in bodies]
        ids = [row + [self.pad] * (64 - len(row)) for row in ids]
        self.ids = torch.tensor(ids, dtype=torch.int16, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int16, device=device)

    def texts(
        self, pick: torch.Tensor, tokens: int, unknown: float = 0.003
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, tokens] and valid lengths [B] of texts by number [B]; a share of the words goes unknown."""
        ids, lengths = (
            F.pad(self.ids[pick].long(), (0, tokens - 64), value=self.pad),
            self.lengths[pick].long(),
        )
        at = torch.arange(tokens, device=ids.device)
        body = (at >= self.head) & (at < (lengths - self.tail)[:, None])
        drop = body & (torch.rand(ids.shape, device=ids.device) < unknown)
        return ids.masked_fill(drop, self.unknown), lengths

    def batch(
        self, size: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scene rows [B, 11], token ids [B, tokens], valid lengths [B], indices [B]."""
        pick = torch.randint(len(self.ids), (size,), device=self.ids.device)
        return self.rows[pick], *self.texts(pick, tokens), pick


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[B, 32, H, W] to [B, 128, H/2, W/2]."""
    return F.pixel_unshuffle(latents, 2)


def text_features(
    text_encoder: Qwen3Model, ids: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """[B, L] to Klein's conditioning [B, L, 3 * hidden]: causal, padding never attended to."""
    at = torch.arange(ids.shape[1], device=ids.device)
    mask = (at[None, :] <= at[:, None])[None] & (at[None, None, :] < lengths[:, None, None])
    hidden, taps = text_encoder.embed_tokens(ids), []
    rotary = text_encoder.rotary_emb(hidden, at[None])
    for count, layer in enumerate(text_encoder.layers[: max(TAPS)], start=1):
        hidden = layer(
            hidden, attention_mask=mask[:, None], position_ids=at[None], position_embeddings=rotary
        )
        if count in TAPS:
            taps.append(hidden)
    return torch.cat(taps, dim=-1)


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """[B, 128, H, W] to [B, H * W, 128]."""
    return latents.flatten(2).transpose(1, 2)


def position_ids(
    height: int, width: int, tokens: int, device: str, reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Klein's (time, y, x, text) axes: image [H*W, 4], text [L, 4]; a reference of the same size follows, at time 10."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
    if reference:
        image = torch.cat([image, image + torch.tensor([REFERENCE_TIME, 0, 0, 0])])
    return image.to(device), torch.cartesian_prod(zero, zero, zero, torch.arange(tokens)).to(device)


def train_vae(captions: Captions, seconds: float, device: str) -> AutoencoderKLFlux2:
    """Rendered pictures, L1 + L2 and a KL that leaves latents their noise, so that small errors are forgiven."""
    vae = AutoencoderKLFlux2(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.compile(dynamic=False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    pool = torch.cat(
        [to_bytes(world.render(captions.batch(128, 64)[0], jitter=0.06)) for _ in range(96)]
    )
    start, step = time.time(), 0
    while (spent := time.time() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = (
                min(1.0, (step + 1) / 100) * 1e-3 * (0.02 + 0.98 * half_cosine(spent / seconds))
            )
        pictures = pool[torch.randint(len(pool), (32,), device=device)]
        grounds = to_floats(pictures[:, :, :1, :1])
        if spent < 0.75 * seconds:  # quarters first, four times as fast; whole pictures to end with
            top, left = torch.randint(0, 129, (2,)).tolist()
            pictures = pictures[:, :, top : top + 128, left : left + 128]
        pictures = to_floats(pictures)
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, 1)
            logvar = logvar.clamp(-12, 6)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            out = vae.decoder(vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = out - pictures
        drawn = (pictures - grounds).abs().amax(1, keepdim=True) > 0.02
        weight = 1 + 4 * drawn.float()  # the objects are few of the pixels and all of the meaning
        fit = (weight * (error.abs() + error.square())).mean() / weight.mean()
        loss = fit + KL_WEIGHT * min(1.0, step / 1000) * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 250 == 0:
            print(
                f"vae {step} {spent:.0f}s l1 {error.abs().mean():.4f} fit {fit:.4f} kl {kl:.3f}",
                flush=True,
            )
    vae.eval()
    with torch.no_grad():  # the batch norm holds the statistics of latents as sampled, so that idle channels stay small
        moments = [vae.encode(to_floats(pool[i : i + 64])).latent_dist for i in range(0, 1024, 64)]
        means = torch.cat([pack_latents(moment.mode()) for moment in moments])
        noise = torch.cat([pack_latents(moment.var) for moment in moments])
        vae.bn.running_mean.copy_(means.mean((0, 2, 3)))
        vae.bn.running_var.copy_(means.var((0, 2, 3)) + noise.mean((0, 2, 3)))
        print(
            f"vae latents: share of signal in the variance {means.var((0, 2, 3)).sum() / vae.bn.running_var.sum():.3f}"
        )
    return vae


def load_vae(folder: Path, device: str) -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    vae.load_state_dict(load_file(folder / "vae.safetensors", device=device), strict=False)
    return vae.eval()


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class FlowTrainer:
    """Joint flow-matching training of text encoder and transformer."""

    def __init__(
        self, captions: Captions, vae: AutoencoderKLFlux2, device: str, jitter: float = world.JITTER
    ):
        self.captions, self.vae, self.device = captions, vae.requires_grad_(False), device
        on_gpu = self.on_gpu = device == "cuda"  # elsewhere: eager, to try the script out
        self.transformer = Flux2Transformer2DModel(**TRANSFORMER_CONFIG).to(device)
        self.text_encoder = Qwen3Model(text_config(captions.unknown + 1)).to(device)
        torch.nn.init.normal_(self.text_encoder.embed_tokens.weight, std=1.0)
        self.parameters = [p for m in (self.transformer, self.text_encoder) for p in m.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": 0.01},
            {"params": others, "weight_decay": 0.0},
        ]
        self.rate = torch.zeros((), device=device)  # on the device, for the CUDA graph
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), fused=True, capturable=on_gpu
        )
        self.anchors, self.places = torch.tensor(KLEIN_SIGMAS, device=device), {}
        self.mean = vae.bn.running_mean.view(1, -1, 1, 1)
        self.std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks  # fmt: skip
        for block in (*self.text_encoder.layers, *double, *single) if on_gpu else ():
            block.compile(dynamic=False)
        parts = captions.rows.split(128)
        self.pool = torch.cat([self.latents(rows, jitter) for rows in parts])
        print(f"{len(self.pool)} latents encoded", flush=True)

    @torch.no_grad()
    def latents(self, rows: torch.Tensor, jitter: float = world.JITTER) -> torch.Tensor:
        with self.autocast():
            pictures = world.render(rows, jitter=jitter).to(memory_format=torch.channels_last)
            latents = self.vae.quant_conv(self.vae.encoder(pictures)).float().chunk(2, 1)[0]
        return ((pack_latents(latents) - self.mean) / self.std).bfloat16()

    def load(self, folder: Path) -> None:
        """Go on from the weights that an earlier run wrote, with fewer tokens or the same."""
        for module in ("transformer", "text_encoder"):
            state = load_file(folder / f"{module}.safetensors", device=self.device)
            for name, parameter in getattr(self, module).named_parameters():
                value = state[name]
                # new tokens go before the last row, which stands for all others
                if name == "embed_tokens.weight":
                    new = parameter.data[len(value) - 1 : -1].to(value)
                    value = torch.cat([value[:-1], new, value[-1:]])
                parameter.data.copy_(value)
        for parameter, average in zip(self.parameters, self.average, strict=True):
            average.copy_(parameter.data)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.on_gpu)

    def velocity(self, noisy, features, sigma, image_ids, text_ids, reference=None):
        """What Klein says: of the picture's own tokens [B, L, 128], which those of a reference follow."""
        tokens = noisy if reference is None else torch.cat([noisy, reference], 1)
        found = self.transformer(
            hidden_states=tokens, encoder_hidden_states=features, timestep=sigma, img_ids=image_ids, txt_ids=text_ids,
            return_dict=False,
        )[0]  # fmt: skip
        return found[:, : noisy.shape[1]]

    def flow_loss(self, latents, features, sigma, image_ids, text_ids, reference=None):
        """Flow matching from noise to latents [B, 128, 16, 16], with or without a reference of that shape.

        Where the reference differs, errors count more: what an edit changes is few of the tokens and all of its meaning.
        """
        noise = to_tokens(torch.randn_like(latents))
        clean = to_tokens(latents)
        noisy = (1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise
        reference = None if reference is None else to_tokens(reference)
        velocity = self.velocity(noisy, features, sigma, image_ids, text_ids, reference)
        error = (velocity.float() - (noise - clean)).square().mean(-1)
        if reference is not None:
            weight = 1 + 4 * ((clean - reference).abs().mean(-1) > CHANGED).float()
            error = error * weight / weight.mean(1, keepdim=True)
        return error.mean()

    def some_sigmas(self, batch: int) -> torch.Tensor:
        """Noise levels [B], six in ten of them Klein's own."""
        anchored = self.anchors[torch.randint(4, (batch,), device=self.device)]
        sigma = torch.rand(batch, device=self.device)
        return torch.where(torch.rand(batch, device=self.device) < 0.6, anchored, sigma)

    def loss(self, batch: int, tokens: int) -> torch.Tensor:
        """Of one batch: pictures from captions."""
        image_ids, text_ids = self.places[tokens]
        _, ids, lengths, pick = self.captions.batch(batch, tokens)
        features = text_features(self.text_encoder, ids, lengths)
        sigma = self.some_sigmas(batch)
        return self.flow_loss(self.pool[pick].float(), features, sigma, image_ids, text_ids)

    def step(self, batch: int, tokens: int, share: float) -> torch.Tensor:
        """One update of the weights and of their average, without a word from the host, so that it can be a CUDA graph."""
        with self.autocast():
            loss = self.loss(batch, tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], share)
        return loss.detach()

    def captured(self, batch: int, tokens: int, share: float) -> tuple[Callable, torch.Tensor]:
        """A step as a CUDA graph, and where it leaves its loss; without a GPU the step itself."""
        if not self.on_gpu:
            loss = torch.zeros(())
            return lambda: loss.copy_(self.step(batch, tokens, share)), loss
        side = torch.cuda.Stream()
        self.rate.fill_(1e-5)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and sets up what a graph may not
            for _ in range(4):
                self.step(batch, tokens, share)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            loss = self.step(batch, tokens, share)
        return graph.replay, loss

    def run(
        self, seconds: float, batch: int, tokens: int, peak: float, floor: float, share: float, keep: Callable | None = None
    ) -> None:  # fmt: skip
        """Train for a while, the rate falling from `peak` to `floor`; `share` of each step goes into the average.

        `keep`, which may save something, is called every quarter of the time.
        """
        start = time.time()
        self.places[tokens] = position_ids(16, 16, tokens, self.device)
        replay, loss = self.captured(batch, tokens, share)
        began, step, total = time.time(), 0, torch.zeros((), device=self.device)
        every = REPORT if self.on_gpu else 1
        kept = 1
        print(f"flow/{tokens} captured after {began - start:.0f}s", flush=True)
        while (now := time.time()) - start < seconds:
            progress = (now - began) / (seconds - (began - start))
            self.rate.fill_(
                min(1.0, (step + 1) / 300) * (floor + (peak - floor) * half_cosine(progress))
            )
            replay()
            total += loss
            step += 1
            if self.on_gpu and step % 20 == 0:
                torch.cuda.synchronize()
            if step % every == 0:
                print(
                    f"flow/{tokens} {step} {now - start:.0f}s loss {total.item() / every:.4f} lr {self.rate.item():.2e}",
                    flush=True,
                )
                total.zero_()
            if keep and kept < 4 and progress > kept / 4:
                kept += 1
                keep()

    def denoise(
        self, noise: torch.Tensor, features: torch.Tensor, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Latents [B, 128, 16, 16] from noise in four Euler steps, with or without a reference of that shape."""
        count, tokens = features.shape[:2]
        image_ids, text_ids = position_ids(16, 16, tokens, self.device, reference is not None)
        reference = None if reference is None else to_tokens(reference)
        latents, sigmas = to_tokens(noise), (*KLEIN_SIGMAS, 0.0)
        for now, following in zip(sigmas, sigmas[1:], strict=False):
            sigma = torch.full((count,), now, device=self.device)
            velocity = self.velocity(latents, features, sigma, image_ids, text_ids, reference)
            latents = latents + (following - now) * velocity
        return latents.transpose(1, 2).reshape(noise.shape)

    @torch.no_grad()
    def sample(self, ids, lengths, reference: torch.Tensor | None = None) -> torch.Tensor:
        """Render pictures [B, 3, 256, 256] of texts from the current weights."""
        noise = torch.randn(len(ids), 128, 16, 16, device=self.device)
        latents = self.denoise(noise, text_features(self.text_encoder, ids, lengths), reference)
        return self.vae.decode(F.pixel_shuffle(latents * self.std + self.mean, 2)).sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a folder with Qwen's tokenizer files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run wrote")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    torch.manual_seed(SEED + bool(args.resume))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    device, total = "cuda", args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)

    known = json.loads((args.resume / "vocabulary.json").read_text()) if args.resume else None
    captions = Captions(args.tokenizer, 64_000, device, known)
    print(
        f"{len(captions.vocabulary)} tokens, longest caption {int(captions.lengths.max())}",
        flush=True,
    )
    if args.resume:
        trainer = FlowTrainer(captions, load_vae(args.resume, device), device)
        trainer.load(args.resume)
        seconds = total
    else:
        vae = train_vae(captions, 0.4 * total, device)
        trainer = FlowTrainer(captions, vae, device)
        seconds = 0.6 * total
    trainer.run(0.55 * seconds, 256, 64, 1.2e-3, 3e-4, 0.002)
    save(trainer, args.out)
    trainer.run(0.45 * seconds, 128, MAX_TOKENS, 5e-4, 5e-6, 0.002)
    save(trainer, args.out)


def save(trainer: FlowTrainer, out: Path) -> None:
    """Write the averaged weights in bf16, and pictures made with them; training may go on afterwards."""
    with averaged(trainer):
        write_weights(trainer, out)
        captions = trainer.captions
        rows, ids, lengths, _ = captions.batch(48, MAX_TOKENS)
        pictures = trainer.sample(ids, lengths)
        distance = (pictures.clamp(-1, 1) - world.render(rows, jitter=0.0)).abs().mean()
        write_picture(pictures, out / "samples.png")
        truth = world.render(rows)
        with torch.no_grad():
            again = trainer.vae(truth, sample_posterior=False).sample
        write_picture(again, out / "reconstructions.png")
        error = (again - truth).abs().mean()
        print(f"saved; distance from the truth: 4 steps {distance:.4f}, autoencoder {error:.4f}")


@contextmanager
def averaged(trainer: FlowTrainer) -> Iterator[None]:
    """The averaged weights in place, as bf16 holds them, and no compiled code; then all as it was."""
    torch.compiler.set_stance("force_eager")
    trained = [p.detach().clone() for p in trainer.parameters]
    for parameter, average in zip(trainer.parameters, trainer.average, strict=True):
        parameter.data.copy_(average.bfloat16())
    yield
    for parameter, value in zip(trainer.parameters, trained, strict=True):
        parameter.data.copy_(value)
    torch.compiler.set_stance("default")


def write_weights(trainer: FlowTrainer, out: Path) -> None:
    """Each file is whole or as it was: a run may be cut off."""
    (out / "vocabulary.json").write_text(json.dumps(trainer.captions.vocabulary))
    for name in ("vae", "transformer", "text_encoder"):
        half = {
            k: v.bfloat16().contiguous()
            for k, v in getattr(trainer, name).state_dict().items()
            if v.is_floating_point()
        }
        save_file(half, out / f"{name}.part")
        (out / f"{name}.part").replace(out / f"{name}.safetensors")


def write_picture(pictures: torch.Tensor, target: Path) -> None:
    """[B, 3, H, W] in -1..1, eight a line."""
    from torchvision.utils import save_image

    save_image(pictures.clamp(-1, 1) * 0.5 + 0.5, target, nrow=8)


if __name__ == "__main__":
    main()
