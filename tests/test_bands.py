"""Bands against torch's own interpolation, flips, crops and blurs."""

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from common.fused import _layout
from common.fused import bands as b
from common.fused.axes import FLIP, Axis
from tests.chains import channels_last

SIZES = [(32, 28), (28, 28), (1, 9), (9, 1), (97, 500), (500, 97), (333, 3), (7, 8), (64, 128)]
# weights are near 1 in size; a cubic one is a sum of terms of up to 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def torch_matrix(size, out, mode, antialias, dtype):
    """torch's weights: it resizes the rows of the identity, as three channels."""
    eye = torch.eye(size, dtype=dtype).expand(1, 3, size, size)
    if size == 1:  # the other axis must keep its size and not be 1
        eye = eye.expand(1, 3, 1, 3)
    shape = (out, eye.shape[-1])
    return interpolate(channels_last(eye), shape, mode=mode, antialias=antialias)[0, 0, :, :size]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_has_the_weights_of_torch(mode, antialias, dtype):
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, 300, (20, 2), generator=generator).tolist()
    for size, out in SIZES + random:
        bands = b.resize(size, out, mode, antialias, dtype)
        expected = torch_matrix(size, out, mode, antialias, dtype).double()
        torch.testing.assert_close(
            bands.matrix()[0], expected, atol=TOLERANCE[dtype], rtol=0, msg=f"{size} -> {out}"
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_windows_are_what_torch_reads(mode, antialias, dtype):
    for size, out in [(32, 28), (28, 32), (97, 50), (50, 97), (300, 7), (3, 100), (6, 3)]:
        bands = b.resize(size, out, mode, antialias, dtype)
        images = torch.zeros(size, 3, size, 3, dtype=dtype)  # image i has a NaN in row i
        images[range(size), :, range(size)] = torch.nan
        result = interpolate(channels_last(images), (out, 3), mode=mode, antialias=antialias)
        expected = result[:, 0, :, 0].isnan().T
        pixel = torch.arange(size)
        first, count = bands.first[0, :, None], bands.count[0, :, None]
        actual = (pixel >= first) & (pixel < first + count)
        assert torch.equal(actual, expected), (size, out)


def test_boxes_are_resized_each():
    boxes = [(0, 9), (5, 20), (40, 1), (13, 16)]
    for mode in ("bilinear", "bicubic"):
        for antialias in (True, False):
            steps = (("resize", 16, mode, antialias, torch.float32, 3, 0),)
            bands = Axis(50, 16, [(*box, steps) for box in boxes])
            for matrix, (s, n) in zip(bands.matrix(), boxes, strict=True):
                single = b.resize(n, 16, mode, antialias).matrix()[0]
                assert torch.equal(matrix[:, s : s + n], single)
                assert matrix.abs().sum() == single.abs().sum()


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
def test_crop_pads_as_torchvision(mode):
    image = torch.rand(1, 1, 9, dtype=torch.float64)
    padded = F.pad(image, [3, 0, 5, 0], padding_mode=mode)
    for s in (-3, 0, 2, 7):
        matrix = b.crop(9, s, 7, mode).matrix()[0]
        assert torch.equal(matrix @ image[0, 0], padded[0, 0, s + 3 : s + 10])
    if mode in ("reflect", "symmetric"):
        with pytest.raises(ValueError, match="must be smaller than the image"):
            b.crop(4, -9, 3, mode)


@pytest.mark.parametrize("size", [2, 5, 30])
def test_blur_is_that_of_torchvision(size):
    image = torch.eye(size, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, 5)
    kernel = 3 if size == 2 else 5
    expected = F.gaussian_blur(image, [1, kernel], [0.8, 0.8])[:, 0, :, 0].T
    matrix = b.blur(size, kernel, 0.8, torch.float64).matrix()[0]
    torch.testing.assert_close(matrix, expected, atol=1e-15, rtol=0)
    with pytest.raises(ValueError, match="needs more than"):
        b.blur(size, 2 * size + 1, 0.8)


def test_products_transposes_flips_and_variants():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        n, m, k = torch.randint(2, 40, (3,), generator=generator).tolist()
        first = b.resize(n, m, "bicubic")
        resize = (("resize", k, "bilinear", True, torch.float32, 3, 0),)
        many = Axis(m, k, [(0, m, resize), (m // 2, m - m // 2, resize)])
        product = first.then(many)
        expected = many.matrix() @ first.matrix()
        torch.testing.assert_close(product.matrix(), expected, atol=1e-14, rtol=0)
        padded = product.then(b.crop(k, -2, k + 3))
        assert torch.equal(padded.matrix()[:, 2:-1], product.matrix())
        assert padded.count[:, :2].sum() == 0
        for bands in (first, product, padded, b.stack([first, first.flipped()])):
            assert torch.equal(bands.transposed().matrix(), bands.matrix().mT)
            assert torch.equal(bands.flipped().matrix(), bands.matrix().flip(1))
        assert torch.equal(padded.cut(2, k).matrix(), product.matrix())


def test_gaps_are_found():
    sparse = b.resize(40, 4, antialias=False)  # reads 2 pixels of each 10
    assert sparse.gaps(b.blur(4, 3, 1.0))
    assert not sparse.gaps(b.crop(4, -1, 3))
    assert not sparse.flipped().gaps(b.identity(4))
    assert not b.resize(40, 4).gaps(b.blur(4, 3, 1.0))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_quantized_weights_are_those_of_torchs_uint8(mode):
    generator = torch.Generator().manual_seed(0)
    for size, out in [(32, 28), (50, 97), (97, 50), (300, 7), (6, 3)]:
        image = torch.randint(0, 256, (3, size, 5), dtype=torch.uint8, generator=generator)
        expected = interpolate(image[None], (out, 5), mode=mode, antialias=True)[0]
        bands = b.quantized(b.resize(size, out, mode, dtype=torch.float64), 15)
        actual = (bands.matrix()[0] @ image.double() + 0.5).floor().clamp(0, 255)
        assert torch.equal(actual, expected.double())


@pytest.mark.parametrize("wide", [False, True])
def test_tables_that_are_kept_are_those_of_the_bands(wide, monkeypatch):
    """Of boxes: bit by bit, whether lengths are new, known, or were dropped for lack of room."""
    monkeypatch.setattr(_layout, "_kept", {})
    monkeypatch.setattr(_layout, "_places", {})
    generator = torch.Generator().manual_seed(0)
    resize = "resize", 20, "bicubic", True, torch.float64 if wide else torch.float32, 3, 0
    chains = (resize,), (resize, FLIP), (resize, ("crop", 2, 20, "edge"), FLIP)
    for longest, room in ((30, 2**24), (100, 2**24), (60, 2**24), (60, 2**13), (30, 2**24)):
        monkeypatch.setattr(_layout, "KEPT_BYTES", room)
        monkeypatch.setattr(_layout, "_memory", _layout._Memory())
        lengths = torch.randint(1, longest, (12,), generator=generator).tolist()
        starts = torch.randint(0, 100, (12,), generator=generator).tolist()
        items = list(zip(starts, lengths, 4 * chains, strict=True))
        for variants in (items, items[:1], [(0, *items[1][1:])]):
            axis = Axis(200, 20, variants)
            plain = b.Bands(axis.first, axis.count, axis.weight, axis.size)
            table, expected = (_layout.packed(bands, wide, b.CPU) for bands in (axis, plain))
            rows = min(expected.shape[2], table.shape[2])
            assert torch.equal(table[:, :, :rows], expected[:, :, :rows])
            assert not any(each[:, :, rows:].any() for each in (table, expected))
