"""The trigger script's command line: its options, what it says, and how it ends."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ArkError, InputError
from .imports import OPTIONAL, left_out

ENGINES = {  # the patch's arguments
    "fused": {"engine": "fused"},
    "compile": {"compile": "default"},
    "plain": {},
}
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
EXAMPLES = """
the model: nothing (the embedded one), a diffusers folder, a ComfyUI folder, or single files in any order:
  --model flux-2-klein-4b.safetensors qwen_3_4b.safetensors flux2-vae.safetensors

a batch: --batch FILE has one JSON value a line, a text or {"prompt": ..., "seed": ..., "size": ..., "steps": ..., "image": ...};
  --out names a folder, which gets the images and manifest.jsonl; the same command again goes on where it was cut off

exit codes: 0 made, 1 failed, 2 asked for something that cannot be, 130 stopped with Ctrl-C
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ends the process with code 2 if it cannot be."""
    parser = argparse.ArgumentParser(
        prog="ignite_ark_4b.py", description="Makes pictures with FLUX.2-Klein.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("prompt", nargs="?", help="what the picture shows")
    add("--model", nargs="+", action="extend", default=[], metavar="PATH", help="see below (default: the embedded model)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="the picture (default: ark.png); of a batch the folder (default: ark-batch)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the noise, the same as ComfyUI's (default: 0; in a batch one more each line)")  # fmt: skip
    add("--size", metavar="WxH", help="px, multiples of 16 (default: the first reference's, else 1024x1024, embedded model 256x256)")  # fmt: skip
    add("--steps", type=int, default=4, metavar="N", help="default: 4")
    add("--image", nargs="+", action="extend", default=[], metavar="REF", help="pictures to edit")
    add("--attention", default="auto", metavar="NAME", help="auto (measured once on a GPU), a kernel's name, or none for diffusers' own")  # fmt: skip
    add("--engine", choices=list(ENGINES), default="fused", help="fused: Ark's own step (default); compile: torch.compile, block by block; plain: diffusers' code")  # fmt: skip
    add("--precision", choices=["bf16", "fp8"], default="bf16", help="of the fused engine's large matrices; fp8 is faster and lossy")  # fmt: skip
    add("--device", choices=["cuda", "cpu"], help="default: cuda if there is one (which card: CUDA_VISIBLE_DEVICES)")  # fmt: skip
    add("--batch", type=Path, metavar="FILE", help="many prompts, see below")
    add("--json", action="store_true", help="print one JSON value instead of the table")
    args = parser.parse_args(arguments)
    if (args.prompt is None) == (args.batch is None):
        what = "both a prompt and --batch" if args.batch else "no prompt: put it first, in quotes"
        parser.error(what)
    if args.precision != "bf16" and args.engine != "fused":
        parser.error(f"--precision {args.precision} needs --engine fused")
    return args


def outputs_of(args: argparse.Namespace, files: Any) -> Any:
    """What is to be made and where it goes, all of it checked.

    Args:
        args: as parsed.
        files: the model's, see `model_files.py`.

    Returns:
        A `Single` or a `Batch`.

    Raises:
        InputError: something asked for cannot be.
    """
    from .batch import Batch, Single
    from .jobs import Job, check_images, parse_size, read_prompts, with_size

    usual = (256, 256) if files.embedded else (1024, 1024)
    size = parse_size(args.size) if args.size else None
    settings = {"model": files.identity, **{k: getattr(args, k) for k in ("attention", "engine", "precision")}}  # fmt: skip
    images = tuple(args.image)
    check_images(images)
    first = Job("-" if args.prompt is None else args.prompt, args.seed, steps=args.steps, images=images)  # checks  # fmt: skip
    if args.batch is None:
        return Single((args.out or Path("ark.png")).expanduser(), with_size(first, size, usual), settings)  # fmt: skip
    common = {"seed": args.seed, "size": size, "steps": args.steps, "images": images}
    jobs = read_prompts(args.batch.expanduser(), common, usual)
    return Batch((args.out or Path("ark-batch")).expanduser(), jobs, settings)


class Console:
    """What the user sees: bars and lines on stderr, the result on stdout.

    Args:
        args: as parsed.
        start: `time.perf_counter()` when the process began its work.
    """

    def __init__(self, args: argparse.Namespace, start: float):
        self._json, self._start = args.json, start
        self._bar: Any = None
        self._made: list[dict[str, Any]] = []
        self._load: dict[str, Any] = {}
        self._compiler: Any = None

    def say(self, text: str) -> None:
        """Print a line about what happens."""
        print(text, file=sys.stderr, flush=True)

    def stopping(self) -> None:
        """Say that Ctrl-C was heard."""
        self.say("\nStopping at the next step; press Ctrl-C again to stop at once.")

    def loading(self, moved: int, total: int) -> None:
        """Draw how far the weights are, in bytes."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(desc="load", total=total, unit="B", unit_scale=True, disable=None, leave=False)  # fmt: skip
        self._bar.update(moved - self._bar.n)
        if moved >= total:
            self._bar.close()

    def loaded(self, pipeline: Any, report: Any, combustion: Any) -> None:
        """Take down what loading took, and let the pipeline draw its steps.

        Args:
            pipeline: diffusers'.
            report: a `LoadReport`.
            combustion: what runs the transformer.
        """
        gc.freeze()  # it stays, so nobody need look at it again
        gc.enable()
        pipeline.set_progress_bar_config(desc="steps", disable=None, leave=False)
        moved = sum(transfer.nbytes for transfer in report.transfers) or report.nbytes
        seconds = sum(transfer.seconds for transfer in report.transfers) or report.seconds
        self._load = {
            "seconds": report.seconds, "bytes": report.nbytes, "GB/s": moved / 1e9 / seconds,
            "importing": report.importing, "waiting": report.waiting, "transfers": list(map(str, report.transfers)),
            "before": time.perf_counter() - self._start - report.seconds,
        }  # fmt: skip
        self._compiler = combustion.compiler
        kernel = combustion.report.partition(":")[0]
        kernel = "the library's own" if kernel in ("", "\nengine", "host") else kernel
        self._load["combustion"] = combustion.report
        self.say(f"attention: {kernel}")

    def made(self, path: Path, job: Any, seconds: dict[str, float], left: int) -> None:
        """Report a picture that is written."""
        entry = {"file": str(path), "prompt": job.prompt, "seed": job.seed, "size": f"{job.width}x{job.height}"}  # fmt: skip
        self._made.append({**entry, "steps": job.steps, "seconds": seconds})
        if "first_image" not in self._load:
            self._load["first_image"] = time.perf_counter() - self._start
        if left:
            self.say(f"{path.name} ({left} left)")

    def summary(self, passed_over: int) -> None:
        """Print the table, or the JSON value.

        Args:
            passed_over: pictures of a batch that were there already.
        """
        compiled = self._compiler.seconds if self._compiler else 0.0
        process = time.perf_counter() - self._start
        if self._json:
            print(json.dumps({"images": self._made, "passed_over": passed_over, "load": self._load, "compile": compiled, "process": process}))  # fmt: skip
            return
        rows = []
        if self._load:
            how = f"at {self._load['GB/s']:.1f} GB/s" if self._load["transfers"] else "mapped"
            rows.append(("load", self._load["seconds"], f"{self._load['bytes'] / 1e9:.2f} GB {how}"))  # fmt: skip
        if compiled:
            rows.append(("compile", compiled, "within the first steps"))
        if self._made:
            seconds = [made["seconds"] for made in self._made]
            for stage in seconds[0]:
                note = f"{self._made[0]['steps']} of them" if stage == "steps" else ""
                rows.append((stage, statistics.mean(s[stage] for s in seconds), note))
            whole = [sum(s.values()) for s in seconds]
            note = f"mean of {len(whole)}, the fastest {min(whole):.3f} s" if len(whole) > 1 else ""
            rows.append(("an image", statistics.mean(whole), note))
        rows.append(("whole run", process, f"{passed_over} were there already" if passed_over else ""))  # fmt: skip
        for name, value, note in rows:
            print(f"{name:<10}{value:9.3f} s  {note}".rstrip())
        if self._made:
            last = self._made[-1]["file"]
            print(f"image: {last}" if len(self._made) == 1 else f"images: {Path(last).parent}")


def run(main: Callable[[argparse.Namespace, Console], None], start: float) -> int:
    """Parse, run, and turn every failure into a sentence, a remedy and an exit code.

    Args:
        main: does the work.
        start: see `Console`.
    """
    args = parse()
    gc.disable()  # until everything is loaded
    try:
        with left_out(*OPTIONAL, compiler=args.engine != "compile"):
            return _run(main, args, start)
    finally:
        gc.enable()


def _run(main: Callable[[argparse.Namespace, Console], None], args: argparse.Namespace, start: float) -> int:  # fmt: skip
    def fail(reason: str, remedy: str, code: int = 1) -> int:
        print(f"error: {reason}\nremedy: {remedy}", file=sys.stderr)
        if args.json:
            print(json.dumps({"error": reason, "remedy": remedy}))
        return code

    try:
        main(args, Console(args, start))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nStopped; only whole files are left.", file=sys.stderr)
        return 130
    except InputError as error:
        return fail(error.reason, error.remedy, 2)
    except ArkError as error:
        return fail(error.reason, error.remedy)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("diffusers", "transformers", "PIL", "torch", "filelock"):  # fmt: skip
            raise
        return fail(f"A library is missing or too old: {error}.", 'Run: pip install -e ".[diffusers]" in this folder.')  # fmt: skip
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno in FULL:
            return fail("The disk is full; nothing was left half-written.", "Free some space, then run the same command again.")  # fmt: skip
        return fail(str(error), "Check the path and its rights, then run the same command again.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(f"The GPU's memory is full ({str(error).splitlines()[0]})", "Choose a smaller --size, or close what uses the GPU.")  # fmt: skip
