"""FLUX.2-Klein 4B from the command line: diffusers' own pipeline, set alight by Ark.

    python ignite_ark_4b.py "a red fox in the snow" --out fox.png
    python ignite_ark_4b.py "make it night" --image fox.png --model FLUX.2-klein-4B --precision fp8
    python ignite_ark_4b.py --batch prompts.jsonl --out pictures
    python ignite_ark_4b.py --help

What is the library's stays the library's: its pipeline, its scheduler, its modules. Ark brings the weights to them (the
igniter) and lets the transformer run on faster code (combustion), on the objects alone; no file of the environment changes.
"""

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

START, HERE = time.perf_counter(), Path(__file__).resolve().parent


def main(args, console) -> None:
    """Make what the command line asks for."""
    from ark.toolkit.command_line import ENGINES, outputs_of
    from ark.toolkit.model_files import find_model
    from ark.toolkit.picture import describe_picture, encode_png
    from ark.toolkit.stop import Stop

    files = find_model(args.model)  # only headers are read
    with outputs_of(args, files) as outputs, Stop(console.stopping) as stop:
        todo = list(outputs.pending())  # a batch passes over what is there
        if todo:
            from ark.patches.diffusers import ignite
            from ark.patches.pipeline import load_pipeline
            from ark.patches.render import Renderer
            from ark.toolkit.rehearsal import Rehearsal

            def watch(moved: int, total: int) -> None:
                console.loading(moved, total)
                stop.check()

            fused = args.engine == "fused"
            rehearsal = Rehearsal(args.precision, args.attention) if fused else None
            pipeline, load = load_pipeline(files, args.device, watch=watch, rehearsal=rehearsal)
            options = {**ENGINES[args.engine], "precision": args.precision}
            with ignite(pipeline, args.attention, **options) as combustion:
                console.loaded(pipeline, load, combustion)
                renderer = Renderer(pipeline)
                for done, (number, job, path) in enumerate(todo, start=1):
                    picture = renderer(job, combustion.run, stop.check)
                    texts = describe_picture(job, outputs.settings_of(number), files.names)
                    outputs.keep(number, encode_png(picture.image, texts), picture.seconds)
                    console.made(path, job, picture.seconds, len(todo) - done)
        console.summary(passed_over=outputs.count - len(todo))


if __name__ == "__main__":  # this folder is the package `ark`, whatever it is called
    spec: Any = importlib.util.spec_from_file_location("ark", HERE / "__init__.py")
    sys.modules["ark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ark"])
    from ark.toolkit.command_line import run

    sys.exit(run(main, START))
