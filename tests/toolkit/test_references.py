"""The size at which references are seen: never more than asked for, never enlarged, whole 16s."""

import pytest

from ark.toolkit.errors import InputError
from ark.toolkit.references import MEGAPIXEL, centre_crop, check_count, scaled_size


@pytest.mark.parametrize("size", [(16, 16), (1024, 1024), (2048, 512), (333, 77)])
def test_small_pictures_stay(size):
    assert scaled_size(*size, 1.0) == size


@pytest.mark.parametrize("size", [(1025, 1024), (4000, 3000), (1411, 907), (8000, 200)])
@pytest.mark.parametrize("megapixels", [0.25, 1.0])
def test_large_pictures_keep_their_shape(size, megapixels):
    width, height = scaled_size(*size, megapixels)
    # a side is rounded to the nearest pixel
    assert abs(width - height * size[0] / size[1]) <= 0.5 * (1 + size[0] / size[1])
    assert width * height == pytest.approx(megapixels * MEGAPIXEL, abs=width + height)


@pytest.mark.parametrize("size", [(15, 400), (400, 15), (100_000, 16)])
def test_what_would_vanish_is_refused(size):
    with pytest.raises(InputError, match="larger or less narrow"):
        scaled_size(*size, 1.0)


@pytest.mark.parametrize("length", range(16, 80))
def test_crop_is_the_middle(length):
    start, kept = centre_crop(length)
    assert kept % 16 == 0 and kept > length - 16
    assert 0 <= length - kept - 2 * start <= 1


@pytest.mark.parametrize("count", [0, 5])
def test_count_is_limited(count):
    with pytest.raises(InputError, match="1 to 4"):
        check_count(count)
    assert check_count(4) is None
