"""Many pictures into one folder, each exactly once, however often the run is cut off.

A picture's file has its settings' digest in its name and is written whole; after it a line is added to the manifest. A
run that starts again passes over what has a line, and adds the line where only the picture was still written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import InputError
from .jobs import Job
from .picture import read_settings
from .whole_file import write_whole

MANIFEST = "manifest.jsonl"
LOCK = ".ark-batch.lock"


class Batch:
    """The pictures of one file of prompts. Use as a context manager: the folder is one run's at a time.

    Args:
        folder: made if it is not there.
        jobs: in order.
        settings: what else decides on the pictures: model, engine, precision.

    Attributes:
        files: each job's file.
        count: how many there are.

    Raises:
        InputError: the folder cannot be written, or another run is writing to it.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], settings: Mapping[str, Any]):
        self.folder, self.jobs, self.count = folder, list(jobs), len(jobs)
        self._settings = dict(settings)
        self._keys = [job.digest(settings) for job in jobs]
        digits = max(5, len(str(len(jobs))))
        self.files = [
            folder / f"{number:0{digits}}-{key}.png"
            for number, key in enumerate(self._keys, start=1)
        ]
        self._manifest = folder / MANIFEST
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Batch:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(FileLock(self.folder / LOCK, timeout=0))
        except Timeout as error:
            raise InputError(f"Another run is writing to {self.folder}.", "Wait for it, or name another folder with --out.") from error  # fmt: skip
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}).", "Name a folder with --out.") from error  # fmt: skip
        own = {path.name for path in (*self.files, self._manifest)}
        for draft in self.folder.glob(
            ".*.part"
        ):  # what a run that was killed left, `whole_file.py`
            if draft.name[1:].rsplit(".", 2)[0] in own:
                draft.unlink(missing_ok=True)
        self._done = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        with contextlib.suppress(OSError):
            (self.folder / LOCK).unlink()

    def _read(self) -> set[str]:
        """The names of the files that the manifest has; lines that were cut off or whose file is gone are removed from it."""
        try:
            data = self._manifest.read_bytes()
        except FileNotFoundError:
            return set()
        whole, names = [], set()
        for line in data.splitlines(keepends=True):
            try:
                name = json.loads(line)["file"]
                there = line.endswith(b"\n") and (self.folder / name).is_file()
            except (ValueError, KeyError, TypeError):
                continue
            if there:
                whole.append(line)
                names.add(name)
        if b"".join(whole) != data:
            write_whole(self._manifest, b"".join(whole))
        return names

    def pending(self) -> Iterator[tuple[int, Job, Path]]:
        """What is still to be made: number from 1, job, file. A picture that only lacks its line gets it."""
        for number, (job, path) in enumerate(zip(self.jobs, self.files, strict=True), start=1):
            if path.name in self._done:
                continue
            if path.is_file() and read_settings(path).get("digest") == self._keys[number - 1]:
                self._add(number, job, path, {})
                continue
            yield number, job, path

    def settings_of(self, number: int) -> dict[str, Any]:
        """What a picture's own metadata says beside its job."""
        return {**self._settings, "digest": self._keys[number - 1]}

    def keep(self, number: int, png: bytes, seconds: Mapping[str, float]) -> None:
        """Write a picture, then its line.

        Args:
            number: the job's, from 1.
            png: the file's bytes, with `settings_of` in its metadata.
            seconds: that its parts took.
        """
        path = self.files[number - 1]
        write_whole(path, png)
        self._add(number, self.jobs[number - 1], path, seconds)

    def _add(self, number: int, job: Job, path: Path, seconds: Mapping[str, float]) -> None:
        entry = {
            "number": number,
            "file": path.name,
            **asdict(job),
            "digest": self._keys[number - 1],
        }
        entry["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        with self._manifest.open("ab") as file:
            size = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    os.truncate(self._manifest, size)
                raise
        self._done.add(path.name)


class Single:
    """One picture in a file of the user's choice; the same shape as `Batch`.

    Args:
        path: of the file; what was there is replaced.
        job: what is made.
        settings: what else decides on it.

    Raises:
        InputError: the file cannot be written there.
    """

    def __init__(self, path: Path, job: Job, settings: Mapping[str, Any]):
        if path.is_dir() or path.suffix.lower() != ".png":
            raise InputError(
                f"{path} is no name for a PNG file.", "Name one that ends in .png with --out."
            )
        if not path.parent.is_dir():
            raise InputError(
                f"There is no folder {path.parent}.", "Make it, or name another file with --out."
            )
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path.parent} cannot be written.", "Name another file with --out.")
        self._path, self._job, self._settings, self.count = path, job, dict(settings), 1

    def __enter__(self) -> Single:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pending(self) -> Iterator[tuple[int, Job, Path]]:
        """The one picture."""
        yield 1, self._job, self._path

    def settings_of(self, number: int) -> dict[str, Any]:
        """What the picture's metadata says beside its job."""
        return self._settings

    def keep(self, number: int, png: bytes, seconds: Mapping[str, float]) -> None:
        """Write the picture."""
        write_whole(self._path, png)
