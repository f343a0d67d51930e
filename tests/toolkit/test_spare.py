"""Memory that is ready before it is asked for."""

import torch

from ark.toolkit.spare import MOST, Spare

KIND = (512, 1024), torch.float32


def test_what_was_prepared_is_taken_once_and_can_be_written_anywhere():
    spare = Spare()
    spare.prepare(*KIND)
    spare.settle()
    with torch.inference_mode():
        first, second = spare.take(*KIND), spare.take(*KIND)
    assert first.shape == second.shape == KIND[0] and first.dtype == second.dtype == KIND[1]
    assert not first.any() and not first.is_inference() and not second.is_inference()
    first.fill_(1.0)
    spare.prepare(*KIND)
    spare.settle()
    assert not spare.take(*KIND).any() and first.all()


def test_each_kind_has_its_own():
    spare = Spare()
    side = 512
    spare.prepare((side, side), torch.int64)
    spare.settle()
    for shape, dtype in (((side**2,), torch.int64), ((side, side), torch.int32), ((side, side), torch.int64)):  # fmt: skip
        taken = spare.take(shape, dtype)
        assert taken.shape == shape and taken.dtype == dtype


def test_what_waits_is_bounded():
    spare = Spare()
    sizes = [(MOST // 16, 1), (MOST // 8, 1), (MOST // 8 - 200, 1), (MOST // 4 + 1, 1)]
    for shape in sizes:
        spare.prepare(shape, torch.float32)
    spare.settle()
    assert [shape for shape, _ in spare._ready] == sizes[1:3]


def test_what_is_small_is_not_worth_it():
    spare = Spare()
    spare.prepare((3, 4), torch.float32)
    spare.settle()
    assert not spare._ready and spare.take((3, 4), torch.float32).shape == (3, 4)
