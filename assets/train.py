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
        pool = world.sample_scenes(count, SEED, held_out=False)
        bodies = tokenizer([caption for _, caption in pool])["input_ids"]
        if vocabulary is None:
            vocabulary = sorted({token for ids in (head, tail, [PAD], *bodies) for token in ids})
        self.vocabulary = vocabulary
        compact = {token: row for row, token in enumerate(vocabulary)}
        ids = torch.full((count, 64), compact[PAD], dtype=torch.int16)
        lengths = torch.empty(count, dtype=torch.int16)
        for row, body in enumerate(bodies):
            tokens = torch.tensor(
                [compact[token] for token in head + body + tail], dtype=torch.int16
            )
            ids[row, : len(tokens)], lengths[row] = tokens, len(tokens)
        self.ids, self.lengths = ids.to(device), lengths.to(device)
        self.rows = world.encode_scenes([scene for scene, _ in pool]).to(device)
        self.pad, self.unknown = compact[PAD], len(vocabulary)
        self.head, self.tail = len(head), len(tail)

    def batch(
        self, size: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scene rows [B, 11], token ids [B, tokens], valid lengths [B], indices [B]; now and then a word goes unknown."""
        pick = torch.randint(len(self.ids), (size,), device=self.ids.device)
        ids, lengths = (
            F.pad(self.ids[pick].long(), (0, tokens - 64), value=self.pad),
            self.lengths[pick].long(),
        )
        at = torch.arange(tokens, device=ids.device)
        body = (at >= self.head) & (at < (lengths - self.tail)[:, None])
        drop = body & (torch.rand(ids.shape, device=ids.device) < 0.003)
        return self.rows[pick], ids.masked_fill(drop, self.unknown), lengths, pick


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


def position_ids(
    height: int, width: int, tokens: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Klein's (time, y, x, text) axes: image [H*W, 4], text [L, 4]."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero)
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


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_floats(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class FlowTrainer:
    """Joint flow-matching training of text encoder and transformer."""

    def __init__(self, captions: Captions, vae: AutoencoderKLFlux2, device: str):
        self.captions, self.vae, self.device = captions, vae.requires_grad_(False), device
        self.transformer = Flux2Transformer2DModel(**TRANSFORMER_CONFIG).to(device)
        self.text_encoder = Qwen3Model(text_config(captions.unknown + 1)).to(device)
        torch.nn.init.normal_(self.text_encoder.embed_tokens.weight, std=1.0)
        self.parameters = [p for m in (self.transformer, self.text_encoder) for p in m.parameters()]
        self.names = [f"{k}.{n}" for k, m in (("transformer", self.transformer), ("text_encoder", self.text_encoder)) for n, _ in m.named_parameters()]  # fmt: skip
        self.average = [p.detach().clone() for p in self.parameters]
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        groups = [
            {"params": matrices, "weight_decay": 0.01},
            {"params": others, "weight_decay": 0.0},
        ]
        self.rate = torch.zeros((), device=device)  # on the device, for the CUDA graph
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), fused=True, capturable=True
        )
        self.anchors, self.places = torch.tensor(KLEIN_SIGMAS, device=device), {}
        self.mean = vae.bn.running_mean.view(1, -1, 1, 1)
        self.std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        for block in (*self.text_encoder.layers, *self.transformer.transformer_blocks):
            block.compile(dynamic=False)
        for block in self.transformer.single_transformer_blocks:
            block.compile(dynamic=False)
        rows = captions.rows
        self.pool = torch.cat([self.latents(rows[i : i + 128]) for i in range(0, len(rows), 128)])
        print(f"{len(self.pool)} latents encoded", flush=True)

    @torch.no_grad()
    def latents(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            pictures = world.render(rows).to(memory_format=torch.channels_last)
            latents = self.vae.quant_conv(self.vae.encoder(pictures)).float().chunk(2, 1)[0]
        return ((pack_latents(latents) - self.mean) / self.std).bfloat16()

    def loss(self, latents, ids, lengths, sigma, noise, image_ids, text_ids):
        features = text_features(self.text_encoder, ids, lengths)
        clean, noise = latents.flatten(2).transpose(1, 2), noise.flatten(2).transpose(1, 2)
        noisy = (1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise
        velocity = self.transformer(
            hidden_states=noisy, encoder_hidden_states=features, timestep=sigma, img_ids=image_ids, txt_ids=text_ids,
            return_dict=False,
        )[0]  # fmt: skip
        return (velocity.float() - (noise - clean)).square().mean()

    def step(self, batch: int, tokens: int, share: float) -> torch.Tensor:
        """One update of the weights and of their average, without a word from the host, so that it can be a CUDA graph."""
        image_ids, text_ids = self.places[tokens]
        _, ids, lengths, pick = self.captions.batch(batch, tokens)
        latents = self.pool[pick].float()
        anchored = self.anchors[torch.randint(4, (batch,), device=self.device)]
        sigma = torch.rand(batch, device=self.device)
        sigma = torch.where(torch.rand(batch, device=self.device) < 0.6, anchored, sigma)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(
                latents, ids, lengths, sigma, torch.randn_like(latents), image_ids, text_ids
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], share)
        return loss.detach()

    def run(
        self, seconds: float, batch: int, tokens: int, peak: float, floor: float, share: float
    ) -> None:
        """Train for a while, the rate falling from `peak` to `floor`; `share` of each step goes into the average."""
        start, side = time.time(), torch.cuda.Stream()
        self.places[tokens] = position_ids(16, 16, tokens, self.device)
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
        began, step, total = time.time(), 0, torch.zeros((), device=self.device)
        print(f"flow/{tokens} captured after {began - start:.0f}s", flush=True)
        while (now := time.time()) - start < seconds:
            progress = (now - began) / (seconds - (began - start))
            self.rate.fill_(
                min(1.0, (step + 1) / 300) * (floor + (peak - floor) * half_cosine(progress))
            )
            graph.replay()
            total += loss
            step += 1
            if step % 20 == 0:
                torch.cuda.synchronize()
            if step % 500 == 0:
                print(
                    f"flow/{tokens} {step} {now - start:.0f}s loss {total.item() / 500:.4f} lr {self.rate.item():.2e}",
                    flush=True,
                )
                total.zero_()

    @torch.no_grad()
    def sample(self, captions: Captions, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Render `count` pictures with four Euler steps from the current weights: pictures, scene rows."""
        rows, ids, lengths, _ = captions.batch(count, MAX_TOKENS)
        image_ids, text_ids = position_ids(16, 16, MAX_TOKENS, self.device)
        features = text_features(self.text_encoder, ids, lengths)
        latents = torch.randn(count, 256, 128, device=self.device)
        sigmas = (*KLEIN_SIGMAS, 0.0)
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            velocity = self.transformer(
                hidden_states=latents, encoder_hidden_states=features, img_ids=image_ids, txt_ids=text_ids,
                timestep=torch.full((count,), sigma, device=self.device), return_dict=False,
            )[0]  # fmt: skip
            latents = latents + (following - sigma) * velocity
        packed = latents.transpose(1, 2).reshape(count, 128, 16, 16) * self.std + self.mean
        return self.vae.decode(F.pixel_shuffle(packed, 2)).sample, rows


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
        vae = AutoencoderKLFlux2(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
        vae.load_state_dict(load_file(args.resume / "vae.safetensors", device=device), strict=False)
        trainer = FlowTrainer(captions, vae.eval(), device)
        state = {}
        for name in ("transformer", "text_encoder"):
            state |= {
                f"{name}.{k}": v
                for k, v in load_file(args.resume / f"{name}.safetensors", device=device).items()
            }
        for name, parameter, average in zip(
            trainer.names, trainer.parameters, trainer.average, strict=True
        ):
            parameter.data.copy_(state[name])
            average.copy_(state[name])
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
    from torchvision.utils import save_image

    torch.compiler.set_stance("force_eager")
    captions, trained = trainer.captions, [p.detach().clone() for p in trainer.parameters]
    for parameter, average in zip(trainer.parameters, trainer.average, strict=True):
        parameter.data.copy_(average.bfloat16())
    (out / "vocabulary.json").write_text(json.dumps(captions.vocabulary))
    for name in ("vae", "transformer", "text_encoder"):
        half = {
            k: v.bfloat16().contiguous()
            for k, v in getattr(trainer, name).state_dict().items()
            if v.is_floating_point()
        }
        save_file(half, out / f"{name}.safetensors")
    pictures, rows = trainer.sample(captions, 48)
    distance = (pictures.clamp(-1, 1) - world.render(rows, jitter=0.0)).abs().mean()
    save_image(pictures.clamp(-1, 1) * 0.5 + 0.5, out / "samples.png", nrow=8)
    truth = world.render(rows)
    with torch.no_grad():
        again = trainer.vae(truth, sample_posterior=False).sample
    save_image(again.clamp(-1, 1) * 0.5 + 0.5, out / "reconstructions.png", nrow=8)
    error = (again - truth).abs().mean()
    print(f"saved; distance from the truth: 4 steps {distance:.4f}, autoencoder {error:.4f}")
    for parameter, value in zip(trainer.parameters, trained, strict=True):
        parameter.data.copy_(value)
    torch.compiler.set_stance("default")


if __name__ == "__main__":
    main()
