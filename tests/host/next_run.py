"""Run inside a host's Python path: `next_run.py HOST PACK_PARENT OUT`; texts of the next prompt, encoded ahead, as JSON."""

import contextlib
import json
import sys
import threading
import types
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_management  # noqa: E402
import execution  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(pack_parent))
from ark.nodes import next_prompt  # noqa: E402
from ark.patches.text_encoder import ENCODER, load_text_encoder  # noqa: E402
from ark.toolkit import text_engine  # noqa: E402
from ark.toolkit.embedded import embedded_text_encoder  # noqa: E402
from ark.toolkit.fused.graph import recording  # noqa: E402

text_engine.DEVICES = ("cpu",)
CHOSEN = {"diffusion_model": "a", "text_encoder": "b", "vae": "c"}
server = types.ModuleType("server")
server.PromptServer = type("PromptServer", (), {})
handlers = []
server.PromptServer.instance = types.SimpleNamespace(queue_updated=lambda: None, add_on_prompt_handler=handlers.append)  # fmt: skip
queue = server.PromptServer.instance.prompt_queue = execution.PromptQueue(server.PromptServer.instance)  # fmt: skip
sys.modules["server"] = server
found = {}


def prompt(text, **inputs):
    return {
        "1": {"class_type": "ArkFastLoader", "inputs": CHOSEN},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["1", 1], **inputs}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["9", 0], "vae": ["1", 2]}},
    }


def ahead(given):
    """What becomes of the texts of a prompt that is next, behind which another waits."""
    for number, each in enumerate((given, prompt("another"))):
        queue.put((number, str(number), each, {}, []))
    results = [future.result() for future in next_prompt.look()]
    queue.wipe_queue()
    return results


def encode(clip, text):
    result = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return clip.source, result[0][0]


with torch.inference_mode():
    clip, _ = load_text_encoder(embedded_text_encoder())
    next_prompt.remember(CHOSEN, clip)
    found["empty"] = next_prompt.look()
    found["not_loaded"] = ahead(prompt("a red circle"))
    source, expected = encode(clip, "a red circle")
    found["first"] = [source, clip.cond_stage_model.engine._layers is not None]
    fresh, _ = load_text_encoder(embedded_text_encoder())
    comfy.model_management.unload_all_models()
    _, expected = encode(fresh, "a blue star")
    found["unloaded"] = ahead(prompt("a blue star"))
    encode(clip, "something else")  # loads it again
    found["ahead"] = ahead(prompt("a blue star"))
    source, result = encode(clip, "a blue star")
    found["then"] = [source, torch.equal(result, expected), result.is_inference()]
    found["known"] = ahead(prompt("a blue star"))

    queue.queue.append("of another kind")
    found["strange"] = next_prompt.look()
    queue.wipe_queue()

    # a prompt that arrives while nothing runs or waits
    turn = sys.getswitchinterval()
    for _ in range(2):
        next_prompt.watch()
    found["handlers"] = len(handlers)
    request = {"prompt": prompt("a white square"), "client_id": "x"}
    for where in (queue.queue, queue.currently_running):
        holder = {0: 1} if isinstance(where, dict) else [1]
        where.update(holder) if isinstance(where, dict) else where.extend(holder)
        handlers[0](request)
        where.clear()
    next_prompt._worker.submit(int).result()
    found["busy"] = encode(clip, "a white square")[0]
    _, expected = encode(fresh, "a black square")
    encode(clip, "loaded again")
    request["prompt"] = prompt("a black square")
    found["handed_on"] = handlers[0](request) is request
    source, result = encode(clip, "a black square")
    found["arrived"] = [source, torch.equal(result, expected)]
    found["strange_requests"] = [handlers[0](x) is x for x in ({}, [], None, {"prompt": 1}, {"prompt": {"1": {}}}, {"prompt": {"1": {"class_type": "CLIPTextEncode"}}})]  # fmt: skip
    next_prompt._worker.submit(int).result()
    found["turns"] = sys.getswitchinterval() == turn

    # what cannot be known before its turn
    found["left"] = [
        ahead(prompt(["5", 0])), ahead(prompt("x", clip=["7", 1])), ahead(prompt("x", clip=["1", 0])),
        ahead(prompt("x") | {"1": {"class_type": "ArkFastLoader", "inputs": {**CHOSEN, "vae": "d"}}}),
        ahead(prompt("x") | {"1": {"class_type": "CLIPLoader", "inputs": CHOSEN}}),
    ]  # fmt: skip

    # a LoRA of another branch lies on the weights
    key = f"{ENCODER}.transformer.model.layers.3.mlp.down_proj.weight"
    weight = dict(clip.cond_stage_model.named_parameters())[key]
    with_lora = clip.clone()
    with_lora.add_patches({key: ("diff", (torch.randn(weight.shape) * 0.05,))}, 1.0)
    _, changed = encode(with_lora, "a green ring")
    found["lora"] = ahead(prompt("a green ring"))
    source, plain = encode(clip, "a green ring")
    found["after_lora"] = [source, not torch.equal(plain, changed)]
    _, expected = encode(fresh, "a green ring")
    found["after_lora"].append(torch.equal(plain, expected))

    # what comes first is recorded by the prompts themselves
    graphs = clip.cond_stage_model.engine.graphs
    graphs.settled = lambda *inputs: False
    found["unsettled"] = [*ahead(prompt("a grey line")), encode(clip, "a grey line")[0]]
    del graphs.settled

    # where it is only replayed the device is at work when the host goes on with the prompt, unless somebody uses the engine
    model, here, asked = clip.cond_stage_model, threading.get_ident(), []
    ask_for = model.ask_for
    model.ask_for = lambda tokens: asked.append(threading.get_ident() == here) or ask_for(tokens)
    graphs._recorded["as on a GPU"] = None
    for text, lock in (("a red line", contextlib.nullcontext()), ("a blue line", recording)):
        _, expected = encode(fresh, text)
        encode(clip, "loaded")
        request["prompt"] = prompt(text)
        with lock:
            handlers[0](request)
        source, result = encode(clip, text)
        found[f"at once, {text}"] = [source, torch.equal(result, expected), asked.pop()]
    graphs._recorded.clear()
    del model.ask_for

    # whoever is as fast as that waits for it
    text, begun, go = "a pink cross", threading.Event(), threading.Event()
    encode(clip, "loaded")

    def slowly(tokens):
        begun.set()
        go.wait(20)
        return ask_for(tokens)

    model.ask_for = slowly
    queue.put((0, "0", prompt(text), {}, []))
    futures = next_prompt.look()
    begun.wait(20)
    threading.Timer(0.3, go.set).start()
    found["waited"] = [encode(clip, text)[0], futures[0].result()]
out.write_text(json.dumps(found))
