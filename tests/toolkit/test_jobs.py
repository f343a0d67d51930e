"""What is asked for, and the sentence for what cannot be."""

import json

import pytest
from PIL import Image

from ark.toolkit.errors import InputError
from ark.toolkit.jobs import Job, parse_size, read_prompts, size_of_reference

COMMON = {"seed": 5, "size": None, "steps": 4, "images": ()}


def read(tmp_path, text, **common):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, {**COMMON, **common}, (256, 256))


def test_texts_and_tables_with_the_common_values(tmp_path):
    text = '"a fox"\n\n{"prompt": "ein Bär", "seed": 9, "size": "64x32", "steps": 2}\n"c"'
    first, second, third = read(tmp_path, "\ufeff" + text)
    assert first == Job("a fox", 5, 256, 256)
    assert second == Job("ein Bär", 9, 64, 32, 2)
    assert third.seed == 7  # one more each line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "no prompt"),
        ('{"seed": 1}', "no prompt"),
        ('{"prompt": " "}', "prompt is empty"),
        ('{"prompt": "a", "sed": 1}', "'sed', which is not known"),
        ('{"prompt": "a", "seed": "1"}', "seed is '1'"),
        ('{"prompt": "a", "seed": true}', "seed is True"),
        ('"\\ud800"', "not whole Unicode"),
        ('{"prompt": "a", "seed": -1}', "seed is -1"),
        ('{"prompt": "a", "steps": 0}', "steps is 0"),
        ('{"prompt": "a", "size": "65x64"}', "'65x64' is no size"),
        ('{"prompt": "a", "image": "none.png"}', "none.png is no picture"),
        ("[" * 100000, "not JSON"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, reason):
    with pytest.raises(InputError, match="prompts.jsonl, line 3: ") as caught:
        read(tmp_path, f'"fine"\n"fine"\n{line}\n"fine"\n')
    assert reason in caught.value.reason and "Nothing was made" in caught.value.remedy


def test_a_file_without_prompts(tmp_path):
    with pytest.raises(InputError, match="no prompts"):
        read(tmp_path, "\n \n")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none", COMMON, (256, 256))


@pytest.mark.parametrize(
    "text", ["1024", "100x100", "0x0", "16x-16", "16x16x16", "99999x16", "16 x 16 px"]
)
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_the_size_of_an_edit_is_its_references(tmp_path):
    Image.new("RGB", (100, 70)).save(tmp_path / "small.png")
    Image.new("RGB", (4000, 1000)).save(tmp_path / "large.png")
    assert size_of_reference(tmp_path / "small.png") == (96, 64)
    width, height = size_of_reference(tmp_path / "large.png")
    assert width * height <= 1024 * 1024 and width == 2048 and height == 512
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera on its side
    Image.new("RGB", (100, 70)).save(tmp_path / "turned.jpg", exif=turned)
    assert size_of_reference(tmp_path / "turned.jpg") == (64, 96)
    line = json.dumps({"prompt": "a", "image": "small.png"})  # relative to the file of prompts
    (job,) = read(tmp_path, line)
    assert (job.width, job.height) == (96, 64) and job.images == (str(tmp_path / "small.png"),)


@pytest.mark.parametrize(("size", "reason"), [((63, 64), "too small"), ((64, 513), "too narrow")])
def test_a_reference_that_diffusers_does_not_take(tmp_path, size, reason):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=reason):
        size_of_reference(tmp_path / "a.png")


def test_a_digest_differs_with_everything():
    jobs = [
        Job("a"),
        Job("b"),
        Job("a", 1),
        Job("a", width=512),
        Job("a", steps=3),
        Job("a", images=("x",)),
    ]
    digests = {job.digest({"engine": engine}) for job in jobs for engine in ("fused", "plain")}
    assert len(digests) == 12
