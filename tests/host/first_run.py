"""Run inside a host's Python path: `first_run.py HOST PACK_PARENT OUT`; first steps that are begun before they are asked for, as JSON."""

import gc
import json
import logging
import sys
import threading
import types
import weakref
from pathlib import Path

host, pack_parent, out = (Path(arg) for arg in sys.argv[1:4])
sys.argv = sys.argv[:1]
sys.path.insert(0, str(host))
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.model_management  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import execution  # noqa: E402
import torch  # noqa: E402
from comfy_execution import progress  # noqa: E402
from comfy_execution.utils import CurrentNodeContext  # noqa: E402

sys.path.append(str(pack_parent))
from tiny_klein import KLEIN, with_lora  # noqa: E402

from ark.nodes import next_prompt, next_step  # noqa: E402
from ark.patches import first_step, noise  # noqa: E402
from ark.patches.fused import engine_on, set_fused  # noqa: E402
from ark.patches.sampling import sample_klein  # noqa: E402
from ark.patches.transformer import load_transformer  # noqa: E402
from ark.toolkit.fused import reference  # noqa: E402
from ark.toolkit.fused import runner as running  # noqa: E402
from ark.toolkit.fused.graph import Graphs, recording  # noqa: E402
from ark.toolkit.schedule import klein_sigmas  # noqa: E402

# as where steps are recorded
first_step.DEVICES, Graphs.recorded = ("cpu",), 1
found, steps, drawn, before_the_host = {"off": {}}, [], [], []
denoise, draw, hosts_sample = running.step.denoise, noise._draw, comfy.samplers.CFGGuider.sample
running.step.denoise = lambda *given: steps.append(1) or denoise(*given)
noise._draw = lambda *given: drawn.append(given[0]) or draw(*given)
meanwhile = [lambda noise: None]


def watched(guider, noise, *given, **named):
    before_the_host.append(len(steps))
    meanwhile[0](noise)
    return hosts_sample(guider, noise, *given, **named)


comfy.samplers.CFGGuider.sample = watched


def sample(
    model,
    text,
    seed,
    denoise=1.0,
    size=(4, 5),
    content=0.0,
    batch=1,
    options=None,
    twice=False,
    how=None,
    **more,
):
    """Latents, and how many steps were taken for them: before the host was asked to sample, and in all."""
    steps.clear()
    before_the_host.clear()
    latent = {"samples": torch.full((batch, 128, *size), content), **more}
    positive = [[text, {"pooled_output": None, **(options or {})}]] * (1 + twice)
    result = sample_klein(model, positive, latent, seed, 4, denoise, **(how or {}))
    return result["samples"], [before_the_host[0], len(steps)]


def prompt(seed):
    return {"5": {"class_type": "ArkSampler4Step", "inputs": {"seed": seed}}, "6": {"class_type": "KSampler", "inputs": {"seed": 9}}}  # fmt: skip


with torch.inference_mode():
    loaded, _ = load_transformer(KLEIN)
    plain, _ = set_fused(loaded)
    texts = [torch.randn(1, 512, 192) for _ in range(2)]

    def told(model, name, runs, like=plain, **how):
        """Steps of each run of a text and a seed, and whether the latents are those of a model whose first step is not begun."""
        made = [sample(model, texts[text], seed, **how) for text, seed in runs]
        first_step.DEVICES = ()
        expected = [sample(like, texts[text], seed, **how)[0] for text, seed in runs]
        first_step.DEVICES = ("cpu",)
        pairs = list(zip(made, expected, strict=True))
        found[name] = [[*counts, torch.equal(mine, right)] for (mine, counts), right in pairs]
        off = [float((mine - right).abs().max()) for (mine, _), right in pairs]
        if any(off):
            found["off"][name] = off

    def fresh():
        """A model whose first step is known."""
        model, _ = set_fused(loaded)
        for seed in range(2):
            sample(model, texts[0], seed)
        return model

    fused, _ = set_fused(loaded)
    told(fused, "runs", [(0, 0), (0, 1), (0, 2), (1, 2)])
    told(fused, "other size", [(0, 1), (0, 2), (0, 3)], size=(4, 6))
    told(fused, "batch", [(0, 1), (0, 2), (0, 3)], batch=2)

    # whose first level is 1 but for rounding
    found["level"] = float(klein_sigmas(4, 16 * 16)[0])
    told(fused, "level runs", [(0, 1), (0, 2), (0, 3)], size=(16, 16))
    told(fused, "image at that level", [(0, 1)], size=(16, 16), content=0.3)

    # what is not of pure noise
    told(fused, "image", [(0, 1)] * 3, denoise=0.5, content=0.3)
    told(fused, "mask", [(0, 1)] * 3, content=0.3, noise_mask=torch.ones(1, 64, 80))

    # of another model, whose inputs somebody changes
    def shifted(apply, given):
        return apply(given["input"] + 0.125, given["timestep"], **given["c"])

    fused = fresh()
    changed, same = fused.clone(), plain.clone()
    for model in (changed, same):
        model.set_model_unet_function_wrapper(shifted)
    told(changed, "other model", [(0, 1)] * 3, like=same)
    # who is called in a run may write to weights, whatever it does
    called = fresh().clone()
    called.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, lambda patcher: None)
    told(called, "calls others", [(0, 1)] * 3)
    # and of this very one
    fused = fresh()
    meanwhile[0] = lambda noise: noise.mul_(1.25)
    told(fused, "changed", [(0, 1)] * 3)
    meanwhile[0] = lambda noise: None

    # what is given something else, in turns with what is not
    def in_turns(name, **how):
        fused = fresh()
        told(fused, name, [(0, 1)] * 3, **how)
        told(fused, f"{name}, then", [(0, 1)] * 3)

    in_turns("reference", options={"reference_latents": [torch.randn(1, 128, 3, 4)]})
    in_turns("cfg", how={"cfg": 2.0, "negative": [[texts[1], {"pooled_output": None}]]})
    in_turns("two texts", twice=True)
    in_turns("part", denoise=0.8)
    texts.append(torch.randn(2, 512, 192))
    told(fresh(), "texts of a batch", [(2, 1)] * 3)
    fused, own = fresh(), comfy.sample.prepare_noise
    comfy.sample.prepare_noise = lambda *given: own(*given) * 0.5
    told(fused, "noise of others", [(0, 1)] * 3)
    comfy.sample.prepare_noise = own

    # other weights, where the others were
    fused = fresh()

    def another_record(noise):
        found["record"], engine_on(fused)._made = id(engine_on(fused)._made), None

    meanwhile[0] = another_record
    made, counts = sample(fused, texts[0], 1)
    meanwhile[0] = lambda noise: None
    found["other record"] = [counts, found.pop("record") == id(engine_on(fused)._made), torch.equal(made, sample(plain, texts[0], 1)[0])]  # fmt: skip

    # weights that are no longer there, or others
    fused = fresh()
    comfy.model_management.unload_all_models()
    told(fused, "unloaded", [(0, 1)])
    fused = fresh()
    sample(with_lora(loaded, 1.0), texts[0], 1)
    told(fused, "after a LoRA", [(0, 1)])
    lora, _ = set_fused(with_lora(loaded, 1.0))
    told(lora, "LoRA", [(0, 1)] * 3, like=set_fused(with_lora(loaded, 1.0))[0])

    # a run that fails leaves nothing for the next one
    fused = fresh()

    def fail(noise):
        raise KeyError("interrupted")

    meanwhile[0] = fail
    try:
        sample(fused, texts[0], 3)
    except KeyError:
        found["failed"] = [len(steps), engine_on(fused).first._run is None]
    meanwhile[0] = lambda noise: None
    told(fused, "after a failure", [(1, 2)])

    # numbers that are not finite: seen when all has been asked for, and repeated on the host's own code
    expected, _ = sample(loaded, texts[0], 1)
    fused = fresh()
    broken = running.step.denoise
    running.step.denoise = lambda *given: broken(*given) * float("nan")
    made, counts = sample(fused, texts[0], 1)
    found["not finite"] = [counts, torch.equal(made, expected), bool(made.isfinite().all())]
    made, counts = sample(fused, texts[0], 1)
    found["not finite"].append([counts, torch.equal(made, expected)])
    running.step.denoise = broken

    # an engine goes with its model
    gone = fresh()
    gc.disable()
    alive = weakref.ref(engine_on(gone)), weakref.ref(engine_on(gone)._made)
    del gone
    found["alive"] = [one() is not None for one in alive]
    gc.enable()

    # noise, drawn when a prompt arrives, or is the next one
    server, handlers = types.ModuleType("server"), []
    server.PromptServer = type("PromptServer", (), {})
    server.PromptServer.instance = types.SimpleNamespace(queue_updated=lambda: None, add_on_prompt_handler=handlers.append)  # fmt: skip
    queue = server.PromptServer.instance.prompt_queue = execution.PromptQueue(server.PromptServer.instance)  # fmt: skip
    sys.modules["server"] = server
    next_prompt.watch()

    def drawn_by(do):
        drawn.clear()
        do()
        noise.settle()
        return list(drawn)

    found["arrives"] = drawn_by(lambda: handlers[0]({"prompt": prompt(7)}))
    found["taken"] = drawn_by(
        lambda: told(plain, "drawn before", [(0, 7)])
    )  # twice, once of it anew
    torch.set_default_dtype(torch.bfloat16)
    handlers[0]({"prompt": prompt(8)})
    noise.settle()
    torch.set_default_dtype(torch.float32)
    told(plain, "drawn among bf16", [(0, 8)])
    for number, seed in enumerate((11, 12)):
        queue.put((number, str(number), prompt(seed), {}, []))
    found["queued"] = drawn_by(next_prompt.look)
    found["busy"] = drawn_by(lambda: handlers[0]({"prompt": prompt(13)}))
    queue.wipe_queue()

    # what is begun of a prompt that arrives, and of its run
    def graph(seed, text="0", **more):
        made = {"4": {"class_type": "Text", "inputs": {"text": text}}, "5": {"class_type": "ArkSampler4Step", "inputs": {"seed": seed, "positive": ["4", 0]}}}  # fmt: skip
        return {**made, **more}

    def arrive(given):
        steps.clear()
        handlers[0]({"prompt": given})
        return len(steps)

    def whole(given, text=0):
        """Steps when a prompt arrives, by the time the host is asked, in all; whether the latents are right."""
        seed = given["5"]["inputs"]["seed"]
        counts = [arrive(given)]
        made, more = sample(fused, texts[text], seed)
        counts += [counts[0] + more[0], counts[0] + more[1]]
        next_step.sampled(
            {number: {**node, "is_changed": 1} for number, node in given.items()},
            "5",
            engine_on(fused).first,
            "cpu",
        )
        arrivals.append([*counts, made, text, seed])

    fused, arrivals = fresh(), []
    for given in (graph(20), graph(21), graph(22)):
        whole(given)
    found["the same"] = arrive(graph(22))
    found["other seed type"] = arrive(graph(["7", 0]))
    found["another node"] = arrive(graph(23, **{"8": {"class_type": "PreviewAny", "inputs": {}}}))
    whole(graph(23, text="1"), text=1)
    whole(graph(24, text="1"), text=1)
    # nobody comes for it
    found["vain"] = arrive(graph(25, text="1"))
    whole(graph(26, text="2"), text=1)
    for seed in range(27, 35):
        whole(graph(seed, text="2"), text=1)
    first_step.DEVICES = ()
    found["arrivals"] = [[*counts, torch.equal(made, sample(plain, texts[text], seed)[0])] for *counts, made, text, seed in arrivals]  # fmt: skip
    first_step.DEVICES = ("cpu",)
    # that is like the last one in more than it is, or in less
    fused = fresh()
    whole(graph(50))
    given = graph(51)
    began = arrive(given)
    made, counts = sample(fused, texts[1], 51)
    found["other text in the end"] = [began, counts, torch.equal(made, sample(plain, texts[1], 51)[0])]  # fmt: skip

    def then(name, seed, given=None, last=None, model=None, sampler="5", before=lambda: None):
        """Steps when a prompt arrives, after a run like it."""
        global fused
        fused = model or fresh()
        for number in range(2):
            sample(fused, texts[0], number)
        next_step.sampled(last or graph(seed), sampler, engine_on(fused).first, "cpu")
        before()
        found[name] = arrive(given or graph(seed + 1))

    then("like it", 52)
    found["twice"] = arrive(graph(53))
    then("its seed is a bool", 54, graph(True))
    others = [{"9": {"class_type": "KSampler", "inputs": {"seed": seed}}} for seed in (3, 4)]
    then("another's seed", 54, graph(55, **others[1]), graph(54, **others[0]))
    then("another class", 54, graph(55) | {"4": {**graph(55)["4"], "class_type": "Texts"}})
    then("no such sampler", 54, sampler="6")
    then("two samplers", 54, graph(55, **{"7": graph(55)["5"]}))
    called = fresh().clone()
    then("calls others meanwhile", 54, model=called, before=lambda: called.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, lambda patcher: None))  # fmt: skip
    with_references = {"options": {"reference_latents": [torch.randn(1, 128, 3, 4)]}}
    then("after an edit", 54, before=lambda: sample(fused, texts[0], 9, **with_references))
    waiting = queue.currently_running
    add = (lambda: waiting.update({0: 1})) if isinstance(waiting, dict) else (lambda: waiting.append(1))  # fmt: skip
    then("while another runs", 54, before=add)
    waiting.clear()
    begin = first_step.FirstStep.begin

    def full(*given):
        raise torch.cuda.OutOfMemoryError("the card is full")

    first_step.FirstStep.begin = full
    then("cannot be begun", 54, before=noise._coming.clear)
    found["cannot be begun"] = [found["cannot be begun"], [seed for seed, *_ in noise._coming]]
    first_step.FirstStep.begin = begin
    then("a seed that is too large", (1 << 64) - 1)
    then("replaced", 54)  # nobody comes for it
    found["replaced"] = [found["replaced"], arrive(graph(56)), arrive(graph(57))]
    # a conditioning that lies where the model does, in its dtype, and is written to meanwhile
    fused = fresh()
    first = engine_on(fused).first
    text = texts[0].to(first._known.like.dtype, copy=True)
    first.begin(58, noise.ahead, text)
    text *= 1.5
    made, counts = sample(fused, text, 58)
    found["written to"] = [counts[1], torch.equal(made, sample(plain, text, 58)[0])]
    # neither a text's node nor the start of a prompt comes to harm
    form, ran, said = next_step._form, [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    noise.log.addHandler(handler)
    noise.log.setLevel(logging.INFO)

    def broken(*given):
        ran.append(given)
        raise LookupError("a host with another list of prompts")

    progress.add_progress_handler(next_step.Then(broken))
    progress.reset_progress_state("next", types.SimpleNamespace(original_prompt={}))
    progress.add_progress_handler(next_step.Then(broken, "4"))
    for _ in range(2):
        progress.get_progress_state().finish_progress("4")
    next_step._form, next_step._awaited = broken, next_step._last[0]._replace(encoder="4")
    with CurrentNodeContext("next", "4"):
        next_step._encoded(texts[0])
    next_step._form = form
    found["handlers"] = [len(ran), said.copy()]
    then("unloaded before its run", 54)
    kept = weakref.ref(engine_on(fused)._made)
    comfy.model_management.unload_all_models()
    gc.collect()
    found["kept of what was unloaded"] = kept() is not None
    # its noise is on its way in a thread that waits
    fused = fresh()
    whole(graph(56))
    go = threading.Event()
    for _ in range(2):
        noise._worker.submit(go.wait)
    noise.expect(57)
    found["on its way"] = arrive(graph(57))
    go.set()
    made, counts = sample(fused, texts[0], 57)
    found["on its way, then"] = [counts[1], torch.equal(made, sample(plain, texts[0], 57)[0])]
    for seed in range(60, 70):
        noise.ahead(seed, (1, 128, 4, 5), torch.device("cpu"))
    found["kept noise"] = len(noise._coming)
    # its noise, drawn by the device if that is found to draw the same
    noise.LEAST_NUMBERS, noise.PARTS, there = 0, 3, []
    noise.operations_for = lambda device: (types.SimpleNamespace(jump=lambda *given: how(*given), normal=reference.normal, compile_randn=lambda: None), "")  # fmt: skip

    def right_jump(*given):
        there.append(given)
        return reference.jump(*given)

    def other_jump(*given):
        return right_jump(*given) ^ 1

    def broken_jump(*given):
        raise RuntimeError("no memory")

    def ahead(name=""):
        """What the device draws, steps, and torch's seed after that."""
        there.clear()
        whole(graph(70 + len(arrivals)))
        *counts, made, text, seed = arrivals[-1]
        hurried[name] = [len(there), counts, made, text, seed, torch.get_rng_state()]

    hurried = {}
    for kind, first, later in (("same", right_jump, right_jump), ("other", other_jump, other_jump), ("broken", broken_jump, broken_jump), ("later broken", right_jump, broken_jump), ("later other", right_jump, other_jump)):  # fmt: skip
        fused, how, noise._there = fresh(), first, {}
        said.clear()
        ahead()
        noise.settle()
        how = later
        ahead(kind)
        found[f"said, {kind}"] = [line for line in said if "processor" in line]
        if kind == "same":  # a prompt that the host is going to refuse costs nothing
            arrive(graph(1 << 64))
            found["refused"] = all(noise._there.values()) and len(noise._there)
    first_step.DEVICES = ()
    for kind, (*mine, made, text, seed, after) in hurried.items():
        right = torch.equal(made, sample(plain, texts[text], seed)[0])
        found[f"there, {kind}"] = [*mine, right, torch.equal(after, torch.get_rng_state())]
    first_step.DEVICES, noise._there = ("cpu",), {}
    noise.operations_for = lambda device: (reference, "")
    # weights that are gone, and a recording that is being made
    fused = fresh()
    whole(graph(40))
    with recording:
        found["while recording"] = arrive(graph(41))
    comfy.model_management.unload_all_models()
    found["nothing there"] = arrive(graph(42))
    noise.settle()
    found["no graph"] = [drawn_by(lambda given=given: handlers[0]({"prompt": given})) for given in ({"5": {}}, 3, prompt("x"))]  # fmt: skip
    many = {str(n): prompt(50 + n)["5"] for n in range(6)}
    found["many"] = [drawn_by(lambda: handlers[0]({"prompt": many})), drawn_by(lambda: [sample(plain, texts[0], 50 + n) for n in range(6)])]  # fmt: skip
    found["large"] = drawn_by(lambda: sample(plain, texts[0], 1, size=(160, 4)) and noise.expect(5))
    noise.MOST_NUMBERS = 0
    found["too large"] = drawn_by(lambda: noise.expect(6))
    fused = fresh()
    whole(graph(90))
    found["too large ahead"] = drawn_by(lambda: arrive(graph(91))) + steps

out.write_text(json.dumps(found))
