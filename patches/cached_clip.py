"""A CLIP that remembers what its prompts became, also across restarts: a repeated prompt does not load the text encoder.

Kept by the tokens and weights that the host made of the prompt. With a LoRA on the text encoder, whose name the host makes
up anew each time, only in memory; with hooks, or anything else that other nodes set on it, not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import numbers
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.cli_args import args

from ..toolkit.embeddings import Embeddings
from ..toolkit.fused.graph import recording
from ..toolkit.igniter import OpenedModel
from .deliver import current

TEXTS = 16  # whose tokens are remembered
FORMAT = 1  # counts up when what is kept means something else
# what its numbers depend on
SOURCES = "toolkit/qwen3.py", "toolkit/fused/text.py", "toolkit/fused/attend_causal.py", "toolkit/fused/swiglu.py", "toolkit/fused/reference.py", "toolkit/text_engine.py", "patches/text_engine.py", "patches/text_encoder.py"  # fmt: skip
HOSTS_OWN = {"manual_cast_dtype"}  # an object patch that newer hosts set on every text encoder
# called with each conditioning [1, seq_len, width] that is given, in the prompt's thread
encoded: list[Callable[[torch.Tensor], Any]] = []
PLAIN_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"transformer_options": {}})
log = logging.getLogger("ark")


class CachedCLIP(comfy.sd.CLIP):
    """The host's CLIP with embeddings.

    Attributes:
        embeddings: what is kept, None for nothing.
        source: where the last result came from: "memory", "disk" or "encoder".
        bypassed: why something was not kept.
    """

    embeddings: Embeddings | None = None
    source: str | None = None

    @classmethod
    def of(cls, clip: comfy.sd.CLIP, embeddings: Embeddings | None) -> CachedCLIP:
        """Make one in place of a CLIP that the host built."""
        made: Any = cls(no_init=True)
        vars(made).update(vars(clip))
        made.embeddings, made.bypassed, made._tokens = embeddings, set(), {}
        return made

    def clone(self, *given: Any, **named: Any) -> CachedCLIP:
        """As the host's; what is kept is shared."""
        made = self.of(super().clone(*given, **named), self.embeddings)
        made.bypassed, made._tokens = self.bypassed, self._tokens
        return made

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict:
        """As the host's; the last texts are remembered, without a user's embeddings, whose files may change."""
        if return_word_ids or options or self.tokenizer_options or "embedding:" in text:
            return super().tokenize(text, return_word_ids, **options)
        key = text, id(self.tokenizer)
        if key not in self._tokens:
            self._tokens[key] = super().tokenize(text)
            while len(self._tokens) > TEXTS:
                # another thread may have been here
                self._tokens.pop(next(iter(self._tokens)), None)
        # other nodes may write into what they get
        return {name: list(map(list, sections)) for name, sections in self._tokens[key].items()}

    def encode_from_tokens(
        self, tokens: dict, return_pooled: bool | str = False, return_dict: bool = False
    ) -> Any:
        """As the host's, from what is kept if it is there."""
        key, embeddings = self._key(tokens, return_pooled), self.embeddings
        if key is None or embeddings is None:
            self.source = "encoder"
            return super().encode_from_tokens(tokens, return_pooled, return_dict)
        embeddings.wait_for(key)
        if (found := self._find(embeddings, key)) is None:
            self.source = "encoder"
            found = super().encode_from_tokens(tokens, return_pooled, True)
            if all(value is None or torch.is_tensor(value) for value in found.values()):
                kept = {name: value for name, value in found.items() if value is not None}
                embeddings.keep(key, kept, lasting=not self.patcher.patches)
        found = {"cond": found["cond"], "pooled_output": found.get("pooled_output"), **found}
        for tell in encoded:
            tell(found["cond"])
        if return_dict:
            return found
        return (found["cond"], found["pooled_output"]) if return_pooled else found["cond"]

    def load_model(self, *args: Any, **named: Any) -> Any:
        """As the host's; what lies there, and has its memory in a recording, needs nothing of the host."""
        engine = self.cond_stage_model.engine
        if engine is not None and engine.graphs.recorded and self.patcher.is_loaded():
            return self.patcher
        return super().load_model(*args, **named)

    def encode_ahead(self, text: str) -> Callable[[], bool]:
        """Begin to encode a prompt that is going to be asked for: whoever asks from now on waits for the rest.

        That is so only while the weights lie on the device as this CLIP wants them: nothing is loaded for it. Where the engine
        only replays what it has recorded, and nobody uses it, the device is at work when this returns.

        Returns:
            What does the rest, to be called in another thread; it says whether the prompt is known then.
        """
        model, tokens = self.cond_stage_model, self.tokenize(text)
        key, embeddings = self._key(tokens, True), self.embeddings
        if key is None or embeddings is None or self.patcher.patches or model.engine is None:
            return lambda: False
        if embeddings.recent(key) is not None:
            return lambda: True
        with contextlib.ExitStack() as coming:
            coming.enter_context(embeddings.coming(key))
            begun = None
            if model.engine.graphs.recorded and not embeddings.is_saved(key):
                begun = self._ask(tokens, blocking=False)
            promised = coming.pop_all()

        def rest() -> bool:
            with promised:
                if begun is None and embeddings.saved(key) is not None:
                    return True
                bring = begun or self._ask(tokens)
                if bring is None:
                    return False
                with recording, self._as_host():
                    conditioning, _, others = bring()
                embeddings.keep(key, {"cond": conditioning, **others})
            return True

        return rest

    def _ask(self, tokens: dict, blocking: bool = True) -> Callable[[], tuple] | None:
        """Let the device encode, see `ask_for`; None if it is not ready, or if somebody would have to be waited for."""
        model = self.cond_stage_model
        with contextlib.ExitStack() as held:
            for lock in (model.engine.lock, recording):
                if not lock.acquire(blocking):
                    return None
                held.callback(lock.release)
            # another CLIP's LoRA may lie on the same model
            if model.current_weight_patches_uuid != self.patcher.patches_uuid:
                return None
            with self._as_host():
                return model.ask_for(tokens)

    @contextlib.contextmanager
    def _as_host(self) -> Iterator[None]:
        """As in the thread that runs prompts."""
        with current(self.patcher.load_device), torch.inference_mode():
            yield

    def _find(self, embeddings: Embeddings, key: str) -> Any:
        device = comfy.model_management.intermediate_device()
        if (found := embeddings.recent(key)) is not None:
            self.source = "memory"
        elif not self.patcher.patches and (found := embeddings.saved(key)) is not None:
            self.source = "disk"
            self.patcher.send_follower()  # else it would leave when this encoder is loaded
        return found and {name: tensor.to(device) for name, tensor in found.items()}

    def _key(self, tokens: dict, return_pooled: bool | str) -> str | None:
        """Names a result; None if it must not be kept."""
        if self.embeddings is None:
            return None
        try:
            prompt = _digest(tokens)
            if reason := why_not(self):
                raise TypeError(reason)
        except TypeError as reason:
            if str(reason) not in self.bypassed:
                self.bypassed.add(str(reason))
                log.info("Ark text encoder: embeddings are not kept (%s).", reason)
            return None
        lora = self.patcher.patches_uuid if self.patcher.patches else ""
        settings = f"{self.layer_idx} {return_pooled == 'unprojected'} {lora}"
        return hashlib.sha256(f"{prompt} {settings}".encode()).hexdigest()


def why_not(clip: comfy.sd.CLIP) -> str | None:
    """What other nodes set on a CLIP that may change its result in a way that no key names."""
    patcher = clip.patcher
    if clip.apply_hooks_to_conds or patcher.forced_hooks or patcher.hook_patches:
        return "hooks are set on it"
    if patcher.object_patches.keys() - HOSTS_OWN:
        return "another node set object patches"
    others = "weight_wrapper_patches", "injections", "wrappers", "callbacks"
    if found := [name for name in others if _anything(getattr(patcher, name, None))]:
        return f"another node set {', '.join(found)}"
    if patcher.model_options not in PLAIN_OPTIONS:
        return "another node set model_options"
    if any(map(_changed, _down_to_layers(clip.cond_stage_model))):
        return "another node changed its forward"
    return None


def _down_to_layers(module: torch.nn.Module, depth: int = 5) -> Iterator[torch.nn.Module]:
    """The model and what is in it, down to the layers: all of it would take longer than a repeated prompt does."""
    yield module
    for child in module.children() if depth else ():
        yield from _down_to_layers(child, depth - 1)


def _changed(module: torch.nn.Module) -> bool:
    own = "forward", "encode_token_weights", "encode"
    return bool(module._forward_hooks or module._forward_pre_hooks or vars(module).keys() & {*own})


def _anything(value: Any) -> bool:
    """Whether there is a list that is not empty in a nest of dicts."""
    return any(map(_anything, value.values())) if isinstance(value, dict) else bool(value)


def _digest(tokens: dict) -> str:
    """Names what the host's tokenizer made: ids, their weights, and embeddings of a user's file by their numbers.

    Raises:
        TypeError: there is something else among them.
    """
    found = hashlib.sha256()
    for piece in _pieces(tokens):
        found.update(piece)
    return found.hexdigest()


def _pieces(tokens: dict) -> Iterator[bytes]:
    for name, sections in sorted(tokens.items()):
        yield repr(name).encode()
        for section in sections:
            ids = [pair[0] for pair in section]
            # the usual case: one by one takes longer than all the rest of a known prompt
            if {*map(type, ids)} <= {int}:
                yield b"ids" + array("q", ids).tobytes()
                yield b"weights" + array("d", (pair[1] for pair in section)).tobytes()
                continue
            yield b"["
            for token, weight, *_ in section:  # a word's number may follow
                if isinstance(token, numbers.Integral):
                    yield f"{int(token)}:{float(weight)!r},".encode()
                elif torch.is_tensor(token):
                    yield f"{token.dtype} {list(token.shape)}:{float(weight)!r},".encode()
                    yield token.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()  # fmt: skip
                else:
                    raise TypeError(f"its prompt has a {type(token).__name__}")


def encoder_name(opened: OpenedModel, device: torch.device) -> str:
    """Names a file and all else that the result depends on beside the prompt, in 32 digits.

    A file is another one if its path, its place on disk, its size or its time differs.
    """
    files = []
    for file, _ in opened.parts:
        _, inode, size, modified = file.identity
        files.append((str(Path(file.path).resolve()), inode, size, modified))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = FORMAT, sorted(files), torch.__version__, _host_version(), card, args.fp32_text_enc, _sources()  # fmt: skip
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    root = Path(__file__).resolve().parent.parent
    return hashlib.sha256(b"".join((root / name).read_bytes() for name in SOURCES)).hexdigest()


def _host_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__
