"""separable_map: any bands, mix, types and strides against products of matrices in float64."""

import pytest
import torch

from common.fused import Bands, separable_map
from common.fused._layout import packed

TYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
# the rounding of the result: half a unit in the last place for floats
ROUNDING = {
    torch.uint8: 0.5,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


def random_bands(generator, kind: str) -> Bands:
    """Windows of up to 20 taps, some empty, that move upwards, downwards, or lie anywhere."""

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    size, out = (number(1, 60) if number(0, 3) else number(60, 400) for _ in range(2))
    variants = 1 if kind != "variants" else 3
    taps = number(1, min(size, 20) + 1)
    count = torch.randint(0, taps + 1, (variants, out), generator=generator)
    if kind in ("up", "down"):
        count[:] = taps
    room = size - count + 1
    first = (torch.rand(variants, out, generator=generator) * room).long()
    if kind in ("up", "down"):
        first = torch.arange(out).expand(variants, out) * room // out
    weight = torch.randn(variants, out, taps, generator=generator, dtype=torch.float64) / taps
    weight[torch.arange(taps) >= count[..., None]] = 0
    bands = Bands(first, count, weight, size)
    return bands.flipped() if kind == "down" else bands


@pytest.mark.parametrize("kind", ["up", "down", "anywhere", "variants"])
@pytest.mark.parametrize("seed", range(20))
def test_equals_matrix_products(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = TYPES[seed % 5], TYPES[seed // 4 % 5]
    n, inputs, outputs = 1 + seed % 4, 1 + seed % 3, 1 + seed // 2 % 4
    rows, columns = random_bands(generator, kind), random_bands(generator, kind)
    mix = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    if seed % 2:
        mix[:, 1:] = 0
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    images = torch.rand(n, inputs, rows.size, columns.size, generator=generator).double()
    images = (images * 255).to(torch.uint8) if source == torch.uint8 else images.to(source)
    if source == torch.uint8 and target != torch.uint8:
        mix = mix / 255
    if source != torch.uint8 and target == torch.uint8:
        mix, bias = mix * 255, bias * 100
    if seed % 3 == 1:
        images = images.contiguous(memory_format=torch.channels_last)
    if seed % 3 == 2:
        images = images.repeat_interleave(2, 3)[..., ::2]
    index = [None, None]
    if kind == "variants":
        index = torch.randint(0, 3, (2, n), generator=generator)
    limits = dict(low=-0.1, high=0.2) if seed % 4 == 0 else {}

    def apply(**more):
        return separable_map(
            images, rows, columns, mix, bias,
            row_index=index[0], column_index=index[1], dtype=target, **limits, **more,
        )  # fmt: skip

    actual = apply()
    assert actual.dtype == target
    r, c = (
        bands.matrix()[torch.zeros(n).long() if i is None else i][:, None]
        for bands, i in zip((rows, columns), index, strict=True)
    )

    def product(r, c, mix):
        return torch.einsum("kc,nchw->nkhw", mix, r @ images.double() @ c.mT)

    expected = product(r, c, mix) + bias[:, None, None]
    if limits:
        expected = expected.clamp(-0.1, 0.2)
    if target == torch.uint8:
        expected = expected.clamp(0, 255)
    # float32 rounds each of at most 20 + 20 + 4 sums and their terms
    largest = float(product(r.abs(), c.abs(), mix.abs()).max()) + float(bias.abs().max())
    sums = 2 * 44 * (2.0**-53 if torch.float64 in (source, target) else 2.0**-24) * largest
    scale = 1 if target == torch.uint8 else largest
    error = float((actual.double() - expected).abs().max())
    assert error <= ROUNDING[target] * scale + sums
    wide = torch.full((*actual.shape[:3], 2 * actual.shape[3]), 7, dtype=target)
    assert torch.equal(apply(out=wide[..., ::2]), actual)
    assert bool((wide[..., 1::2] == 7).all())


def identity(size: int) -> Bands:
    first = torch.arange(size)[None]
    return Bands(first, torch.ones_like(first), torch.ones(1, size, 1).double(), size)


def test_uint8_rounds_to_nearest_even_and_saturates():
    values = torch.tensor([-3.0, 0.5, 1.5, 2.5, 254.5, 255.4, 300, float("nan")])
    result = separable_map(
        values.view(1, 1, 8), identity(1), identity(8), torch.eye(1), dtype=torch.uint8
    )
    assert result.flatten().tolist() == [0, 0, 2, 2, 254, 255, 255, 0]


def unchanged(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    channels, height, width = images.shape[1:]
    return separable_map(
        images, identity(height), identity(width), torch.eye(channels), dtype=dtype
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_float16_is_read_and_every_rounding_to_it_is_torchs(layout):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    images = torch.stack([halves, halves.roll(1), halves.roll(2)]).view(3, 32, 32, 64)
    images = images.transpose(0, 1).contiguous(memory_format=layout)
    exact = dict(atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(unchanged(images, torch.float32), images.float(), **exact)

    finite = halves[halves.isfinite()].float().sort().values
    between = (finite[1:] + finite[:-1]) / 2  # ties, and what is next to them
    inf = torch.tensor(float("inf"))
    extremes = torch.tensor([65519.9, 65520, 1e30, -65520, -1e30, inf, -inf, 1e-8, -1e-30])
    floats = torch.cat([extremes, between, between.nextafter(inf), between.nextafter(-inf)])
    floats = floats[: len(floats) // 9 * 9].view(1, 1, 9, -1)
    torch.testing.assert_close(unchanged(floats, torch.float16), floats.half(), **exact)


@pytest.mark.parametrize("out", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 24, 28])
@pytest.mark.parametrize("flip", [False, True])
def test_a_nan_spreads_to_its_own_taps_alone(out, flip):
    """Seven taps, side by side but for one step of two, as a kernel takes without picking pixels;
    the other way round; and as many rows."""
    first = torch.arange(out) + (torch.arange(out) > out // 2)
    size = out + 7
    weight = torch.rand(
        1, out, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(out)
    )
    bands = Bands(first[None], torch.full((1, out), 7), weight, size)
    bands = bands.flipped() if flip else bands
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(1))
    images[1, 0, size // 2, size // 3], images[2, 0, -1, -1] = float("inf"), float("nan")
    matrix, touched = torch.zeros(2, out, size, dtype=torch.float64)
    for o in range(out):
        start = int(bands.first[0, o])
        matrix[o, start : start + 7], touched[o, start : start + 7] = bands.weight[0, o], 1
    bad = ~images.isfinite()
    expected = matrix @ images.double().where(~bad, 0) @ matrix.T
    spread = touched @ bad.double() @ touched.T > 0
    actual = separable_map(images, bands, bands, torch.eye(1))
    assert torch.equal(actual.isfinite(), ~spread)
    torch.testing.assert_close(actual[~spread].double(), expected[~spread], atol=0, rtol=1e-5)


def test_rows_and_channels_without_weight_do_not_spread_nan():
    images = torch.full((1, 2, 4, 4), float("nan"))
    images[:, 1] = 1
    empty = Bands(
        torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), torch.zeros(1, 2, 1).double(), 4
    )
    mix = torch.tensor([[0.0, 2.0]])
    assert (separable_map(images, identity(4), identity(4), mix) == 2).all()
    padded = separable_map(images, empty, identity(4), torch.eye(2), torch.tensor([3.0, 4.0]))
    assert padded[0, :, 0, 0].tolist() == [3, 4]


@pytest.mark.parametrize("shape", [(3, 16, 16), (28, 28), (1, 64, 48)])
def test_large_results_are_written_whole(shape):
    """Beyond the size at which the stores pass the caches; rows of whole lines and not."""
    channels = shape[0] if len(shape) == 3 else 1
    height, width = shape[-2:]
    n = 2**23 // (channels * height * width * 2) + 3
    images = torch.rand(n, channels, height, width)
    result = separable_map(images, identity(height), identity(width), torch.eye(channels))
    assert torch.equal(result, images)
    half = separable_map(
        images, identity(height), identity(width), torch.eye(channels), dtype=torch.bfloat16
    )
    assert torch.equal(half, images.bfloat16())


REFUSED = {
    "for images of 4 x 4": dict(images=torch.zeros(1, 1, 4, 5)),
    "images must be (..., 1, H, W)": dict(images=torch.zeros(1, 3, 4, 4)),
    "at most 16 channels": dict(images=torch.zeros(1, 17, 4, 4), mix=torch.zeros(1, 17)),
    "dtype must be": dict(dtype=torch.int32),
    "must hold one entry for each image": dict(row_index=torch.zeros(3).long()),
    "must be int64, or bool where there are two": dict(row_index=torch.zeros(1).bool()),
    "holds 1, of 1 variants": dict(column_index=torch.ones(1).long()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    arguments = dict(
        images=torch.zeros(1, 1, 4, 4), rows=identity(4), columns=identity(4), mix=torch.eye(1)
    )
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        separable_map(**{**arguments, **REFUSED[message]})
    assert message in str(caught.value)


def test_bands_beyond_the_image_are_refused():
    beyond = Bands(torch.tensor([[3]]), torch.tensor([[2]]), torch.ones(1, 1, 2).double(), 4)
    with pytest.raises(RuntimeError, match="reach beyond the 4 pixels"):
        separable_map(torch.zeros(1, 1, 4, 4), beyond, identity(4), torch.eye(1))
    with pytest.raises(RuntimeError, match="reach beyond the 4 pixels"):  # not even on the way
        packed(beyond, False, torch.device("cuda"))
