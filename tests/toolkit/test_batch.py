"""A folder of pictures: each exactly once, whatever was cut off, whole files only."""

import io
import json
import multiprocessing
import os
import sys

import pytest
from PIL import Image

from ark.toolkit.batch import MANIFEST, Batch, Single
from ark.toolkit.errors import InputError
from ark.toolkit.jobs import Job
from ark.toolkit.picture import SETTINGS, describe_picture, encode_png, read_settings
from ark.toolkit.whole_file import write_whole

NAMES = {"transformer": "t.safetensors", "text_encoder": "e.safetensors", "vae": "v.safetensors"}
JOBS = [Job("a fox"), Job("a fox"), Job("ein Bär, 熊", 2)]


def make(batch, number, job):
    texts = describe_picture(job, batch.settings_of(number), NAMES)
    batch.keep(number, encode_png(Image.new("RGB", (16, 16)), texts), {"steps": 1.0})


def manifest(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def test_a_second_run_finds_everything_done(tmp_path):
    folder = tmp_path / "new" / "folder"
    with Batch(folder, JOBS, {}) as batch:
        todo = list(batch.pending())
        for number, job, _ in todo:
            make(batch, number, job)
    assert [job for _, job, _ in todo] == JOBS
    with Batch(folder, JOBS, {}) as batch:
        assert not list(batch.pending())
    lines = manifest(folder)
    assert [line["number"] for line in lines] == [1, 2, 3] and lines[2]["prompt"] == "ein Bär, 熊"
    assert sorted(os.listdir(folder)) == sorted([line["file"] for line in lines] + [MANIFEST])


def test_a_picture_without_its_line_and_a_line_that_was_cut_off(tmp_path):
    with Batch(tmp_path, JOBS, {}) as batch:
        for number, job, _ in batch.pending():
            make(batch, number, job)
    path = tmp_path / MANIFEST
    path.write_bytes(b'{"file": 5}\n' + path.read_bytes()[:-20])
    (tmp_path / f".{batch.files[0].name}.abc.part").write_bytes(b"half")
    (tmp_path / ".mine.part").write_bytes(b"not Ark's")
    with Batch(tmp_path, JOBS, {}) as batch:
        assert not list(batch.pending())
    assert [line["number"] for line in manifest(tmp_path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.glob(".*")] == [".mine.part"]


def test_a_disk_that_is_full_at_the_line_loses_no_picture(tmp_path, monkeypatch):
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == 4:  # two of each picture
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError), Batch(tmp_path, JOBS, {}) as batch:  # fmt: skip
        patched.setattr(os, "fsync", fsync)
        for number, job, _ in batch.pending():
            make(batch, number, job)
    assert [line["number"] for line in manifest(tmp_path)] == [1]
    with Batch(tmp_path, JOBS, {}) as batch:
        assert [number for number, _, _ in batch.pending()] == [3]
    assert [line["number"] for line in manifest(tmp_path)] == [1, 2]


def test_a_picture_that_was_deleted_is_made_again(tmp_path):
    with Batch(tmp_path, JOBS, {}) as batch:
        for number, job, _ in batch.pending():
            make(batch, number, job)
    batch.files[1].unlink()
    with Batch(tmp_path, JOBS, {}) as batch:
        ((number, job, _),) = batch.pending()
        make(batch, number, job)
    assert sorted(line["number"] for line in manifest(tmp_path)) == [1, 2, 3]


def test_a_file_of_that_name_that_is_no_such_picture_is_replaced(tmp_path):
    with Batch(tmp_path, JOBS[:1], {}) as batch:
        batch.files[0].write_bytes(b"something else")
        assert len(list(batch.pending())) == 1


def test_other_settings_are_other_pictures(tmp_path):
    one, two = (
        Batch(tmp_path, JOBS, {"engine": "fused"}),
        Batch(tmp_path, JOBS, {"engine": "plain"}),
    )
    assert not set(one.files) & set(two.files)


def _enter(folder, answer):
    try:
        with Batch(folder, JOBS, {}):
            answer.put("entered")
    except InputError as error:
        answer.put(str(error))


def test_two_runs_do_not_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with Batch(tmp_path, JOBS, {}):
        other = context.Process(target=_enter, args=(tmp_path, answer))
        other.start()
        assert "Another run is writing" in answer.get(timeout=60)
        other.join()


def test_a_reference_whose_name_is_no_text(tmp_path):
    jobs = [Job("a", images=("x\udcff.png",))]
    with Batch(tmp_path, jobs, {}) as batch:
        for number, job, _ in batch.pending():
            make(batch, number, job)
    assert manifest(tmp_path)[0]["images"] == ["x\udcff.png"]
    with Batch(tmp_path, jobs, {}) as batch:
        assert not list(batch.pending())


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), Batch(tmp_path / "file", JOBS, {}):
        pass
    for path, reason in ((tmp_path, "no name for a PNG"), (tmp_path / "a.jpg", "no name for a PNG"), (tmp_path / "no" / "a.png", "no folder")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            Single(path, JOBS[0], {})


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on the size of files")
def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    import resource

    (tmp_path / "a.png").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError):
            write_whole(tmp_path / "a.png", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def test_a_name_as_long_as_a_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole" and len(os.listdir(tmp_path)) == 1


def test_a_picture_says_how_it_was_made(tmp_path):
    job = Job("ein Bär, 熊", 2**64 - 1, 256, 128, images=("x/ref.png",))
    texts = describe_picture(job, {"engine": "fused", "digest": "abc"}, NAMES)
    png = encode_png(Image.new("RGB", (8, 8)), texts)
    (tmp_path / "a.png").write_bytes(png)
    found = read_settings(tmp_path / "a.png")
    assert found["prompt"] == job.prompt and found["seed"] == job.seed and found["digest"] == "abc"
    chunks = Image.open(io.BytesIO(png)).text
    assert chunks["parameters"].startswith("ein Bär, 熊\nSteps: 4, ") and "Model: t" in chunks["parameters"]  # fmt: skip
    graph = json.loads(chunks["prompt"])
    for node in graph.values():  # every link has its node
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    assert json.loads(chunks[SETTINGS])["engine"] == "fused"
