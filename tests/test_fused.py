"""The fused operator against torchvision: values, gradients, layouts, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from common.fused import _ops, affine, bands, separable_map
from common.fused._layout import chain_plan
from common.transforms import FusedTransform, fused_transform, matmul_transform, reference_transform
from tests import test_fused_map
from tests.runs import ROOT

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# half precision is compared with float64: one rounding of the result, which is at most 1
TOLERANCE = {
    torch.uint8: 1e-6,
    torch.float16: 2.5e-4 + 1e-6,
    torch.bfloat16: 2e-3 + 1e-6,
    torch.float32: 1e-6,
    torch.float64: 1e-12,
}
SIZES = [  # (H, W) -> size
    ((32, 32), (28, 28)),
    ((28, 28), (28, 28)),
    ((32, 28), (28, 28)),
    ((28, 32), (28, 28)),
    ((1, 1), (28, 28)),
    ((32, 32), (1, 1)),
    ((941, 7), (10, 13)),
    ((7, 941), (13, 10)),
    ((5, 300), (64, 31)),
    ((33, 47), (56, 90)),
    ((100, 100), (99, 101)),
    ((3, 2000), (2, 3)),
    ((224, 224), (32, 448)),
    ((2, 2), (1, 300)),
    ((40, 9), (11, 1)),
    ((461, 384), (256, 256)),  # of CUDA: all of the shared memory
    ((400, 300), (224, 224)),
]
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
        ),
    ],
)


def chain(images, size, hflip=True, vflip=True):
    """torchvision's chain on the CPU. The images are laid out channels_last: on the default layout
    torch's antialiased resize to a width of 1 returns one row for all of them."""
    if images.dtype == torch.uint8:
        images = F.to_dtype(images, torch.float32, scale=True)
    images = images.contiguous(memory_format=torch.channels_last)
    out = F.rgb_to_grayscale(F.resize(images, list(size), antialias=True))
    out = F.horizontal_flip(out) if hflip else out
    return (F.vertical_flip(out) if vflip else out).contiguous()


def random_images(*shape, dtype=torch.float32, seed=0):
    images = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (images * 256).to(dtype) if dtype == torch.uint8 else images.to(dtype)


def check(images, size, device="cpu", **flips):
    wide = images.double() if images.dtype in (torch.float16, torch.bfloat16) else images
    expected = chain(wide, size, **flips)
    actual = fused_transform(images.to(device), size, **flips)
    assert actual.dtype == (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    assert actual.device.type == device
    torch.testing.assert_close(
        actual.cpu().to(expected.dtype), expected, atol=TOLERANCE[images.dtype], rtol=0
    )


@devices
@pytest.mark.parametrize(("shape", "size"), SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_torchvision(shape, size, dtype, device):
    check(random_images(2, 3, *shape, dtype=dtype), size, device)


@devices
@pytest.mark.parametrize("seed", range(60))
def test_equals_torchvision_at_random_sizes(seed, device):
    generator = torch.Generator().manual_seed(seed)
    n, h, w, oh, ow = torch.randint(1, 140, (5,), generator=generator).tolist()
    hflip, vflip = torch.randint(0, 2, (2,), generator=generator).bool().tolist()
    dtype = list(TOLERANCE)[seed % 5]
    images = random_images(n % 4 + 1, 3, h, w, dtype=dtype, seed=seed)
    check(images, (oh, ow), device, hflip=hflip, vflip=vflip)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(40))
def test_nan_and_infinity_spread_as_in_torchvision(seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    h, w, oh, ow = torch.randint(1, 70, (4,), generator=generator).tolist()
    if seed % 4 == 0:
        oh, ow = max(1, h // 2), w  # weights that are exactly 0, and an axis that is left alone
    images = random_images(2, 3, h, w, dtype=dtype, seed=seed)
    flat = images.view(-1)
    for value in (float("nan"), float("inf"), -float("inf")):
        flat[torch.randint(0, flat.numel(), (2,), generator=generator)] = value
    expected = chain(images, (oh, ow))
    actual = fused_transform(images.to(device), (oh, ow)).cpu()
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0, equal_nan=True)


@devices
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(9, 13), (4, 5)])  # at most 3 taps, and more
def test_pixels_beyond_the_image_see_no_nan(size, channels, device):
    """Random crops that reach beyond the image, resized: which pixels have no taps differs from
    image to image."""
    items = 9
    if device == "cuda":  # enough for the kernel of small images
        items = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    generator = torch.Generator().manual_seed(0)
    images = random_images(items, 3, 12, 16)
    if channels == 3:
        images = images.contiguous(memory_format=torch.channels_last)
    images[::3, :, 5, 4], images[1::3, 0, 0, 0] = float("nan"), float("inf")
    starts = torch.randint(-4, 5, (2, items), generator=generator)
    rows, columns = (
        bands.stack([bands.crop(before, at, before - 1) for at in range(-4, 5)]).then(
            bands.resize(before - 1, after)
        )
        for before, after in zip((12, 16), size, strict=True)
    )
    mix = torch.ones(1, 3) if channels == 1 else torch.eye(3)
    row_index, column_index = (starts + 4).to(device)
    actual = separable_map(
        images.to(device), rows, columns, mix, row_index=row_index, column_index=column_index
    )
    crops = [F.crop(x, *at, 11, 15) for x, at in zip(images, starts.T.tolist(), strict=True)]
    expected = F.resize(torch.stack(crops), list(size), antialias=True)
    expected = expected.sum(1, keepdim=True) if channels == 1 else expected
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-6, rtol=0, equal_nan=True)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nhwc view": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "transposed": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: x.repeat(2, 2, 2, 2)[: x.shape[0], :3, : x.shape[2], : x.shape[3]],
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "bgr storage": lambda x: x.flip(1).contiguous()[:, [2, 1, 0]],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@devices
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, device):
    images = random_images(3, 3, 37, 32, dtype=dtype)
    laid_out = LAYOUTS[layout](images)
    assert torch.equal(laid_out, images)
    expected = fused_transform(images.to(device), (28, 30))
    assert torch.equal(fused_transform(laid_out.to(device), (28, 30)), expected)
    # and without the copy that .to() may have made
    if device == "cpu":
        assert torch.equal(fused_transform(laid_out[1], (28, 30)), expected[1])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (1, 1, 1)])
def test_leading_dimensions(shape):
    images = random_images(*shape, 3, 32, 32)
    expected = chain(images.reshape(-1, 3, 32, 32), (28, 28)).view(*shape, 1, 28, 28)
    torch.testing.assert_close(fused_transform(images), expected, atol=1e-6, rtol=0)
    if len(shape) > 1:  # dimensions that cannot be merged
        other = images.transpose(0, 1)
        assert torch.equal(fused_transform(other), fused_transform(other.contiguous()))
    expanded = images.expand(3, *images.shape)
    assert torch.equal(fused_transform(expanded)[2], fused_transform(images))


@devices
@pytest.mark.parametrize("seed", range(4))
def test_flip_masks(seed, device):
    generator = torch.Generator().manual_seed(seed)
    images = random_images(9, 3, 20, 33, seed=seed).to(device)
    hflip, vflip = torch.randint(0, 2, (2, 9), generator=generator).bool().to(device)
    each = [
        fused_transform(x, (17, 40), hflip=bool(h), vflip=bool(v))
        for x, h, v in zip(images, hflip, vflip, strict=True)
    ]
    assert torch.equal(
        fused_transform(images, (17, 40), hflip=hflip, vflip=vflip), torch.stack(each)
    )
    half = fused_transform(images, (17, 40), hflip=hflip, vflip=True)
    assert torch.equal(half[vflip], torch.stack(each)[vflip])
    strided = hflip.repeat_interleave(3)[::3]
    assert torch.equal(fused_transform(images, hflip=strided), fused_transform(images, hflip=hflip))


@devices
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_out(dtype, device):
    images = random_images(5, 3, 32, 40, dtype=dtype).to(device)
    expected = fused_transform(images)
    out = torch.full_like(expected, float("nan"))
    assert fused_transform(images, out=out) is out
    assert torch.equal(out, expected)
    wide = torch.full((5, 3, 60, 90), -1.0, dtype=expected.dtype, device=device)
    part = wide[:, 1:2, 3:59:2, 5:89:3]
    assert fused_transform(images, out=part) is part
    assert torch.equal(part, expected)
    part.fill_(-1)
    assert (wide == -1).all()  # nothing beside it was written


@devices
def test_empty(device):
    images = torch.empty(0, 3, 32, 32, device=device)
    assert fused_transform(images).shape == (0, 1, 28, 28)
    assert fused_transform(images, out=torch.empty(0, 1, 28, 28, device=device)).numel() == 0
    mask = torch.empty(0, dtype=torch.bool, device=device)
    assert fused_transform(images, hflip=mask).shape == (0, 1, 28, 28)
    nested = torch.empty(2, 0, 3, 8, 8, device=device, requires_grad=True)
    fused_transform(nested, (3, 4)).sum().backward()
    assert nested.grad.shape == nested.shape


def test_offsets_beyond_2_31():
    # pages that nobody writes take no memory
    flat = torch.empty(3 * 2**30, dtype=torch.uint8)
    images = flat[: 2**31 // 3072 * 3072].view(-1, 3, 32, 32)
    last = random_images(3, 32, 32, dtype=torch.uint8)
    images[-1] = last
    apart = flat.as_strided((2, 3, 32, 32), (images[:-1].numel(), 1024, 32, 1))
    assert torch.equal(fused_transform(apart)[1], fused_transform(last))
    far = flat.as_strided((3, 2, 2), (2**30, 2**29, 2**28))
    torch.testing.assert_close(
        fused_transform(far, (3, 3)), chain(far[None], (3, 3))[0], atol=1e-6, rtol=0
    )


def test_more_than_2_31_elements():
    images = random_images(3, 32, 32).expand(2**31 // 3072 + 1, 3, 32, 32)
    result = fused_transform(images, (1, 1))
    assert images.numel() > 2**31
    assert (result == fused_transform(images[0], (1, 1))).all()


@devices
@pytest.mark.parametrize(("shape", "size"), [*SIZES[:6], *SIZES[8:10], *SIZES[12:]])
@pytest.mark.parametrize("flips", [(True, True), (False, True), (True, False)])
def test_gradient_equals_torchvision(shape, size, flips, device):
    images = random_images(2, 3, *shape, dtype=torch.float64).requires_grad_()
    weight = random_images(2, 1, *size, dtype=torch.float64, seed=1)
    (chain(images, size, *flips) * weight).sum().backward()
    ours = images.detach().to(device).requires_grad_()
    out = fused_transform(ours, size, hflip=flips[0], vflip=flips[1])
    (out * weight.to(device)).sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), images.grad, atol=1e-12, rtol=0)


@devices
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_gradient_dtypes(dtype, device):
    images = random_images(2, 3, 32, 32, dtype=dtype)
    wide = images.double().requires_grad_()
    chain(wide, (28, 28)).sum().backward()
    ours = images.to(device).requires_grad_()
    first, second = (
        torch.autograd.grad(fused_transform(ours).float().sum(), ours)[0] for _ in range(2)
    )
    assert first.dtype == dtype
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu().double(), wide.grad, atol=TOLERANCE[dtype] * 2, rtol=0)


@devices
@pytest.mark.parametrize(("shape", "size"), [((5, 6), (3, 4)), ((3, 4), (5, 7)), ((4, 4), (4, 3))])
def test_gradcheck(shape, size, device):
    images = random_images(2, 3, *shape, dtype=torch.float64).to(device).requires_grad_()
    mask = torch.tensor([True, False], device=device)

    def function(x):
        return fused_transform(x, size, hflip=mask, vflip=~mask)

    assert torch.autograd.gradcheck(function, images)
    assert torch.autograd.gradgradcheck(function, images)


@devices
def test_gradient_of_strided_images(device):
    images = random_images(3, 3, 9, 8, dtype=torch.float64).to(device)
    last = images.clone(memory_format=torch.channels_last).requires_grad_()
    images.requires_grad_()
    weight = random_images(3, 1, 5, 6, dtype=torch.float64, seed=1).to(device)
    for x in (images, last):
        # the gradient that arrives has strides of its own
        (fused_transform(x, (5, 6)).mT.contiguous() * weight.mT).sum().backward()
    assert torch.equal(images.grad, last.grad)


def operator_arguments(device):
    device = torch.device(device)
    images = random_images(2, 3, 9, 8).to(device)
    mask = torch.tensor([True, False], device=device)
    plan = chain_plan(9, 8, 5, 7, None, True, False, device)
    mix, out = torch.rand(2, 3).double(), torch.empty(2, 2, 5, 7, device=device)
    shared = mix, plan.sizes, affine(2, low=0.1), None, mask, None
    options = affine(2, bias=[1, 2]), None, mask, 9, 8, 5, 7, torch.float32
    tables = *plan.tables, *plan.transposed()
    return {
        "separable_map": (images, *plan.tables, *shared),
        "separable_map_out": (images, *plan.tables, *shared, out),
        "differentiable": (images.clone().requires_grad_(), *tables, mix, *options),
    }


@devices
@pytest.mark.parametrize("op", ["separable_map", "separable_map_out", "differentiable"])
def test_opcheck(op, device):
    arguments = operator_arguments(device)[op]
    _ops.load()
    # the plain operator's result has a size that a fake cannot know, so it stands in no trace
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op != "separable_map":
        checks.append("test_aot_dispatch_dynamic")
    if op == "differentiable":
        checks.remove("test_autograd_registration")  # which knows registrations in C++ alone
    overload = getattr(torch.ops.fused_transform, op).default
    torch.library.opcheck(overload, arguments, test_utils=checks)


@devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic, device):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def function(x, mask):
        return fused_transform(x * 2, (20, 24), hflip=mask, vflip=False) / 2

    mask = torch.tensor([True, False, True], device=device)
    for h in (32, 40):
        images = random_images(3, 3, h, 32).to(device).requires_grad_()
        expected = fused_transform(images, (20, 24), hflip=mask, vflip=False)
        actual = function(images, mask)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
        grads = [torch.autograd.grad(y.square().sum(), images)[0] for y in (actual, expected)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=0)


def test_first_call_under_compile():
    """The library is loaded while tracing; and Inductor takes out= as well."""
    code = (
        "import torch; from common.transforms import fused_transform as f, reference_transform\n"
        "x, out = torch.rand(2, 3, 32, 32), torch.empty(2, 1, 28, 28)\n"
        "torch.compile(lambda x, out: f(x, out=out) + 1, fullgraph=True)(x, out)\n"
        "assert (out - reference_transform(x)).abs().max() < 1e-6\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_in_compose():
    image = F.to_pil_image(random_images(3, 40, 50, dtype=torch.uint8))
    before = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    fused = v2.Compose([*before, FusedTransform()])
    steps = [v2.Resize((28, 28), antialias=True), v2.Grayscale()]
    flips = [v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1)]
    expected = v2.Compose([*before, *steps, *flips])(image)
    torch.testing.assert_close(fused(image), torch.Tensor(expected), atol=1e-6, rtol=0)
    assert "size=(28, 28)" in repr(fused)


class Transformed(TensorDataset):
    def __getitem__(self, index):
        return fused_transform(super().__getitem__(index)[0])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_data_loader_workers(context):
    images = random_images(12, 3, 32, 32)
    if context == "fork":  # its threads have run before
        torch.set_num_threads(2)
        fused_transform(images)
        torch.set_num_threads(1)
    loader = DataLoader(
        Transformed(images), batch_size=3, num_workers=2, multiprocessing_context=context
    )
    torch.testing.assert_close(
        torch.cat(list(loader)), reference_transform(images), atol=1e-6, rtol=0
    )


@devices
def test_modes(device):
    images = random_images(4, 3, 32, 32).to(device).requires_grad_()
    expected = fused_transform(images)
    assert expected.requires_grad
    with torch.no_grad():
        assert not fused_transform(images).requires_grad
        assert torch.equal(fused_transform(images), expected)
        assert torch.equal(fused_transform(images, out=torch.empty_like(expected)), expected)
    with torch.inference_mode():
        assert torch.equal(fused_transform(images), expected)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(fused_transform(images), expected)


def test_same_bits_for_each_number_of_threads():
    cases = [(1, 300, 333, (224, 100)), (5, 128, 200, (61, 300)), (300, 32, 32, (28, 28))]
    images = [random_images(n, 3, h, w) for n, h, w, _ in cases]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append([fused_transform(x, c[3]) for x, c in zip(images, cases, strict=True)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("level", ["default", "avx2"])
def test_avx2_and_baseline_kernels(level):
    """The same where the operator may not use all that this processor has."""
    if torch.backends.cpu.get_cpu_capability() == level.upper():
        pytest.skip(f"this process runs at the level {level}: its own tests show it")
    tests = (
        test_equals_torchvision,
        test_nan_and_infinity_spread_as_in_torchvision,
        test_layouts,
        test_flip_masks,
        test_gradient_equals_torchvision,
        test_fused_map.test_equals_matrix_products,
    )
    names = [f"tests/{test.__module__.split('.')[-1]}.py::{test.__name__}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-qx", *names]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


IMAGES = torch.zeros(2, 3, 8, 8)
REFUSED = {
    "images must be (..., 3, H, W)": [
        dict(images=torch.zeros(2, 1, 8, 8)),
        dict(images=torch.zeros(2, 8, 8, 3)),
        dict(images=torch.zeros(3, 8)),
        dict(images=torch.tensor(1.0)),
    ],
    "images must be uint8": [
        dict(images=IMAGES.int()),
        dict(images=IMAGES.bool()),
        dict(images=IMAGES.to(torch.complex64)),
    ],
    "at least one pixel": [dict(images=torch.zeros(2, 3, 0, 8)), dict(images=torch.zeros(3, 8, 0))],
    "size must be": [
        dict(size=(0, 4)),
        dict(size=(4, -1)),
        dict(size=(2**30, 4)),
        dict(size=4),
        dict(size=(4,)),
        dict(size=(4, 4, 4)),
    ],
    "'height'": [dict(size=(4.5, 4))],
    "hflip must be": [
        dict(hflip=torch.zeros(2)),
        dict(hflip=torch.zeros(2, dtype=torch.uint8)),
        dict(hflip="yes"),
        dict(hflip=1),
    ],
    "vflip must be": [dict(vflip=None)],
    "one flag for each image": [
        dict(hflip=torch.zeros(3, dtype=torch.bool)),
        dict(vflip=torch.zeros(2, 1, dtype=torch.bool)),
        dict(vflip=torch.tensor(True)),
        dict(images=IMAGES[0], vflip=torch.zeros(3, dtype=torch.bool)),
        dict(images=IMAGES[None], vflip=torch.zeros(2, dtype=torch.bool)),
    ],
    "out must be": [dict(out=torch.zeros(2, 1, 28, 28).double())],
    "out is": [dict(out=torch.zeros(2, 1, 28, 27)), dict(out=torch.zeros(2, 28, 28))],
    "elements of out share memory": [dict(out=torch.zeros(1, 1, 28, 28).expand(2, 1, 28, 28))],
    "records no gradient": [
        dict(images=IMAGES.clone().requires_grad_(), out=torch.zeros(2, 1, 28, 28)),
        dict(out=torch.zeros(2, 1, 28, 28).requires_grad_()),
    ],
    "must be tensors": [
        dict(images=None),
        dict(images=[[1.0]]),
        dict(images=IMAGES.numpy()),
        dict(out=3),
    ],
    "no kernel for torch.sparse_coo": [dict(images=IMAGES.to_sparse())],
    "no kernel for nested": [dict(images=torch.nested.nested_tensor([IMAGES[0], IMAGES[1]]))],
    "no kernel for quantized": [
        dict(images=torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8)),
    ],
}


@pytest.mark.parametrize(
    ("message", "arguments"), [(m, a) for m, cases in REFUSED.items() for a in cases]
)
def test_refuses(message, arguments):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        fused_transform(**{"images": IMAGES, **arguments})
    assert message in str(caught.value)


def test_refuses_out_in_the_images():
    memory = torch.zeros(4, 3, 28, 28)
    for out in (memory[:2, :1], memory[2:3, 1:2]):
        with pytest.raises(RuntimeError, match="must not lie in the memory of the images"):
            fused_transform(
                memory[: len(out) + 1][: len(out)] if len(out) == 2 else memory[2:3], out=out
            )
    assert torch.equal(fused_transform(memory[:2], out=memory[2:, :1]), torch.zeros(2, 1, 28, 28))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_refuses_mixed_devices():
    images = IMAGES.cuda()
    for arguments in (dict(hflip=torch.ones(2).bool()), dict(out=torch.zeros(2, 1, 28, 28))):
        with pytest.raises(RuntimeError, match="on the device of the images"):
            fused_transform(images, **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_current_stream_and_device():
    images = random_images(64, 3, 256, 256)
    expected = fused_transform(images, (224, 224))
    for index in range(torch.cuda.device_count()):
        stream = torch.cuda.Stream(index)
        with torch.cuda.stream(stream):
            there = images.pin_memory().to(f"cuda:{index}", non_blocking=True)
            actual = fused_transform(there, (224, 224))
        stream.synchronize()
        assert actual.device.index == index
        torch.testing.assert_close(actual.cpu(), expected, atol=1e-6, rtol=0)
    graph, static = torch.cuda.CUDAGraph(), images.cuda()
    with torch.cuda.graph(graph):
        captured = fused_transform(static, (224, 224))
    static.zero_()
    graph.replay()
    assert not captured.any()


def test_agrees_with_matmul_twin_where_torchvision_does():
    images = random_images(3, 3, 50, 20)
    torch.testing.assert_close(
        fused_transform(images, (30, 1)), matmul_transform(images, (30, 1)), atol=1e-6, rtol=0
    )
