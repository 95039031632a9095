"""fuse(chain): what it takes and gives, against torchvision."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import models, tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from common.fused import _layout, draws, fuse
from common.fused.draws import Numbers
from common.fused.steps import steps_of
from tests.chains import (
    MEAN,
    STD,
    channels_last,
    close,
    evaluation,
    images,
    pil,
    step_by_step,
    training,
)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["BILINEAR", "BICUBIC"])
def test_pil_images(mode, interpolation):
    image, n = pil(mode=mode), len(mode)
    chain = [
        v2.Resize(20, interpolation=InterpolationMode[interpolation]),
        v2.RandomCrop(24, pad_if_needed=True),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN[:n], STD[:n]),
    ]
    torch.manual_seed(0)
    expected = v2.Compose(chain)(image)
    torch.manual_seed(0)
    actual = fuse(chain)(image)
    assert type(actual) is tv_tensors.Image
    close(actual, expected)
    # a chain that leaves a PIL image: Pillow's gray is not that of tensors
    chain = v2.Compose([v2.Resize(20), v2.Grayscale(), F.hflip])
    actual, expected = fuse(chain)(image), chain(image)
    assert (actual.mode, actual.size) == (expected.mode, expected.size)
    close(F.pil_to_tensor(actual).short(), F.pil_to_tensor(expected).short(), 1)
    # exact where nothing is resized
    chain = v2.Compose([v2.Grayscale(3), F.vflip, v2.PILToTensor()])
    actual = fuse(chain)(image)
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, chain(image))


@pytest.mark.parametrize("size", [(20, 60), (9, 38), (61, 70), (40, 30), (70, 20)], ids=str)
@pytest.mark.parametrize("interpolation", ["BILINEAR", "BICUBIC"])
def test_pillow_resizes_first_what_shrinks_most(size, interpolation):
    """It rounds after each axis, and since version 13 the order depends on the sizes."""
    image = pil(58, 54)
    chain = v2.Resize(size, interpolation=InterpolationMode[interpolation])
    expected, actual = (F.pil_to_tensor(each(image)).short() for each in (chain, fuse(chain)))
    close(actual, expected, 1)


def test_arrays_where_to_image_comes_first():
    chain = [v2.ToImage(), v2.Resize(9), v2.ToDtype(torch.float32, scale=True)]
    array = images(12, 17, 3).numpy()
    for x in (array, array[..., 0]):
        actual, expected = fuse(chain)(x), v2.Compose(chain)(x)
        assert type(actual) is type(expected)
        close(actual, expected)
    image, label = fuse(chain)((array, 3))
    assert (label, image.shape) == (3, (3, 9, 12))
    assert fuse(v2.Resize(9))((images(3, 12, 12), array))[1] is array
    with pytest.raises(TypeError, match="plain tensor"):
        fuse(chain)((array, images(12, 17)))


def test_types_and_samples():
    chain = v2.Compose([v2.Resize(9), v2.RandomHorizontalFlip()])
    fused = fuse(chain)

    def both(sample, f=fused, g=chain):
        torch.manual_seed(1)
        actual = f(sample)
        torch.manual_seed(1)
        return actual, g(sample)

    x = images(3, 12, 15)
    for kind in (tv_tensors.Image, tv_tensors.Video):
        actual, expected = both(kind(x[None]))
        assert type(actual) is type(expected) is kind
    label, mask = torch.tensor(3), images(1, 12, 15)
    actual, _ = both((x, label, mask, "name"))
    assert actual[1] is label
    assert actual[2] is mask
    assert actual[3] == "name"
    assert actual[0].shape == (3, 9, 11)
    sample = {"image": tv_tensors.Image(x), "more": [tv_tensors.Image(x), label]}
    actual, expected = both(sample)
    assert torch.equal(actual["image"], actual["more"][0])
    assert actual["more"][1] is label
    close(actual["image"].short(), expected["image"].short(), 1)
    out = fused(x, label)
    assert isinstance(out, tuple)
    assert out[1] is label
    to = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    assert type(fuse(to)(x)) is torch.Tensor
    assert type(fuse(v2.ToImage())(x)) is tv_tensors.Image
    assert fuse(v2.Identity())(x) is x


def test_an_item_draws_its_own_parameters():
    chain = training()
    fused = fuse(chain)
    batch = images(5, 3, 30, 40)
    torch.manual_seed(7)
    expected = torch.stack([chain(x) for x in batch])
    torch.manual_seed(7)
    close(fused(batch), expected)
    # a video draws once, a batch of videos once for each, as the loop does
    clips = images(2, 4, 3, 30, 40)
    torch.manual_seed(7)
    expected = torch.stack([chain(tv_tensors.Video(clip)) for clip in clips])
    torch.manual_seed(7)
    close(fused(tv_tensors.Video(clips)), expected)
    torch.manual_seed(7)
    close(torch.stack([fused(tv_tensors.Video(clip)) for clip in clips]), expected)
    assert fused(batch[:0]).shape == (0, 3, 16, 16)


def test_the_box_of_a_crop_is_that_of_torchvision():
    rng = random.Random(0)
    for seed in range(500):
        low = rng.uniform(0.01, 1)
        ratio = rng.choice([(3 / 4, 4 / 3), (0.1, 0.2), (5.0, 9.0), (1.0, 1.0)])
        transform = v2.RandomResizedCrop(7, (low, rng.uniform(low, 1.2)), ratio)
        size = rng.randint(1, 500), rng.randint(1, 500)
        torch.manual_seed(seed)
        expected = transform.make_params([torch.empty(1, *size)])
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert steps_of(transform)[0].draw(Numbers(), *size) == expected
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(32, 32), (32, 40), (40, 50)])
@pytest.mark.parametrize(
    "chain",
    [
        [v2.RandomResizedCrop(32, interpolation=InterpolationMode.BICUBIC)],
        [v2.RandomResizedCrop(32), v2.Grayscale(3)],
        [v2.Resize((32, 32)), v2.RandomResizedCrop(32)],
        [v2.RandomHorizontalFlip(), v2.RandomResizedCrop(32)],
        [v2.RandomHorizontalFlip(), v2.RandomCrop(30), v2.RandomVerticalFlip()],
        [v2.RandomCrop(70, padding=31, padding_mode="reflect", pad_if_needed=True)],
    ],
)
def test_random_crops_of_edges_and_of_the_images_own_size(chain, size):
    """Edges of 0 and 255, where torch clamps between the axes of a bicubic resize."""
    batch = images(5, 3, *size).where(images(5, 3, *size, seed=1) > 80, 0)
    batch = channels_last(batch.where(batch < 160, 255))
    torch.manual_seed(1)
    expected = torch.stack([v2.Compose(chain)(x) for x in batch])
    torch.manual_seed(1)
    close(fuse(chain)(batch).float(), expected.float(), 1)
    torch.manual_seed(1)
    close(torch.stack([fuse(chain)(x) for x in batch]).float(), expected.float(), 1)


@pytest.mark.parametrize(
    ("chain", "first"),
    [
        ([v2.Resize((36, 40), InterpolationMode.BICUBIC), F.horizontal_flip], "50->50 (1"),
        ([v2.RandomResizedCrop((36, 40)), v2.Grayscale(3)], None),  # a row index for each image
    ],
)
def test_what_a_later_crop_leaves_out_is_not_computed(chain, first):
    chain = [*chain, v2.CenterCrop((30, 19))]
    batch, fused = channels_last(images(4, 3, 50, 60)), fuse(chain)
    torch.manual_seed(1)
    expected = torch.stack([v2.Compose(chain)(x) for x in batch])
    torch.manual_seed(1)
    close(fused(batch).float(), expected.float(), 1)
    if first:
        assert f"{first} taps) x 60->19 (" in repr(fused)


def test_numbers_of_another_default_dtype():
    batch = images(5, 3, 30, 40)
    chain = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])
    fuse(chain)(batch)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        expected = torch.stack([chain(x) for x in batch])
        state = torch.get_rng_state()
        torch.manual_seed(0)
        close(fuse(chain)(batch).float(), expected.float(), 1)
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [(32, 32), (20, 40)])
@pytest.mark.parametrize("padding", [None, 4, [1, 2, 3, 4]])
def test_the_place_of_a_crop_is_that_of_torchvision(padding, size):
    transform = v2.RandomCrop((32, 24), padding, pad_if_needed=True)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = transform.make_params([torch.empty(1, *size)])
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        actual = steps_of(transform)[0].draw(Numbers(), *size)
        assert torch.equal(torch.get_rng_state(), state)
        assert (actual["top"], actual["left"]) == (expected["top"], expected["left"])
        assert actual["padding"] == expected["padding"][:2]


@pytest.mark.parametrize("items", [4, 5, 64, 1000])
def test_many_numbers_are_those_drawn_one_by_one(items, monkeypatch):
    assert draws._agree()  # else they would not be drawn here
    chain = (
        v2.RandomCrop(30, 4),
        v2.RandomResizedCrop(9),
        v2.GaussianBlur(3, 1.0),
        v2.RandomVerticalFlip(),
    )
    steps = [(step, size, size) for step, size in zip(steps_of(chain), (32, 30, 9, 9), strict=True)]
    torch.manual_seed(items)
    many = draws.draw_each(steps, items)
    state = torch.get_rng_state()
    torch.manual_seed(items)
    monkeypatch.setattr(draws, "_agree", lambda: False)
    assert draws.draw_each(steps, items) == many
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_several_threads_draw_no_number_twice():
    steps = [(step, 99, 99) for step in steps_of([v2.RandomResizedCrop(9)])]
    torch.manual_seed(0)
    expected = [draws.draw_each(steps, 64) for _ in range(40)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda _: draws.draw_each(steps, 64), range(40)))
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(map(repr, actual)) == sorted(map(repr, expected))


@pytest.mark.parametrize(
    "weights",
    [
        models.ResNet50_Weights.IMAGENET1K_V1,
        models.ResNet50_Weights.IMAGENET1K_V2,
        models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1,
        models.EfficientNet_B0_Weights.IMAGENET1K_V1,
        models.Swin_T_Weights.IMAGENET1K_V1,
        models.Inception_V3_Weights.IMAGENET1K_V1,
    ],
    ids=str,
)
def test_presets(weights):
    preset = weights.transforms()
    fused = fuse(preset)
    for image in (pil(75, 100), images(3, 75, 100), images(2, 3, 64, 50).float() / 255):
        expected = preset(channels_last(image) if isinstance(image, torch.Tensor) else image)
        close(fused(image), expected)


def test_a_nan_spreads_as_far_as_in_torchvision():
    for antialias in (True, False):
        chain = [
            v2.Resize((7, 40), antialias=antialias),
            v2.CenterCrop((9, 38)),
            v2.GaussianBlur(3, 1.0),
            v2.Normalize(MEAN, STD),
        ]
        x = images(4, 3, 60, 30, dtype=torch.float32)
        for i in range(4):
            x[i, i % 3, 13 * i, 7 * i] = torch.nan
        expected, _ = step_by_step(chain, x)
        assert torch.equal(fuse(chain)(x).isnan(), expected.isnan())


def test_fill_after_normalize():
    chain = v2.Compose([v2.Normalize(MEAN, STD), v2.RandomCrop(14, padding=3, fill=(1, 2, 3))])
    x = images(2, 3, 9, 10, dtype=torch.float32)
    torch.manual_seed(0)
    expected = torch.stack([chain(one) for one in x])
    torch.manual_seed(0)
    torch.testing.assert_close(fuse(chain)(x), expected, atol=1e-5, rtol=0)


def test_gradient_is_that_of_torchvision():
    chain = v2.Compose([v2.Resize((7, 9)), F.hflip, v2.Normalize(MEAN, STD)])
    x = images(2, 3, 12, 10, dtype=torch.float64).requires_grad_()
    out = chain(channels_last(x))
    weight = torch.rand_like(out)
    (expected,) = torch.autograd.grad((out * weight).sum(), x)
    (actual,) = torch.autograd.grad((fuse(chain)(x) * weight).sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=0)


def test_a_crop_beyond_the_image_is_padded():
    x = images(3, 9, 12)
    chain = v2.CenterCrop((14, 7))
    assert torch.equal(fuse(chain)(x), chain(x))


def test_images_of_several_sizes():
    chain = evaluation()
    sample = [tv_tensors.Image(images(3, 30, 40)), tv_tensors.Image(images(3, 50, 31)), 1]
    actual, expected = fuse(chain)(sample), chain(sample)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        close(a, e)


def test_module():
    x = images(4, 3, 30, 40)
    fused = fuse(evaluation())
    assert "Resize" in repr(fused)
    expected = fused(x)
    assert "30->18 (" in repr(fused)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse([fused])):
        assert torch.equal(other(x), expected)
    with torch.inference_mode():
        assert torch.equal(fuse(evaluation())(x), expected)
    floats = fuse(v2.Resize(9))
    with torch.inference_mode():
        floats(torch.rand(3, 12, 12))
    y = torch.rand(3, 12, 12, requires_grad=True)
    floats(y).sum().backward()
    assert y.grad.abs().max() > 0
    many = fuse(v2.Resize((3, 3)))
    for width in range(1, 300):
        many(images(1, 2, width))
    assert len(many._recipes) <= 256


def test_a_chain_that_is_changed_later_stays_as_it_was_fused():
    resize, x = v2.Resize((9, 9)), torch.rand(3, 12, 12)
    chain = [resize]
    fused = fuse(chain)
    resize.size = [5, 5]
    chain.append(v2.CenterCrop(3))
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert each(x).shape == (3, 9, 9)
    assert fuse(chain)(x).shape == (3, 3, 3)


def test_gradient_after_crops_of_other_lengths():
    """The bands that a graph holds stay as they are when more are kept."""
    chain = v2.RandomResizedCrop(24)
    torch.manual_seed(0)
    x = images(3, 61, 73, dtype=torch.float32)
    grads = []
    for each in (chain, fuse(chain)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        result = each(leaf).square().sum()
        fuse(chain)(images(9, 3, 67, 79))
        result.backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=0, atol=1e-5)


class Samples(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.transform(images(3, 20, 24, seed=i)), i


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(start):
    data = Samples(fuse(evaluation(10, 8)))
    expected, _ = default_collate([data[i] for i in range(4)])
    loader = DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context=start)
    ((actual, labels),) = loader
    assert torch.equal(actual, expected)
    assert labels.tolist() == [0, 1, 2, 3]


def test_export_and_compile(tmp_path):
    x = images(2, 3, 30, 40)
    fused = fuse(evaluation())
    program = torch.export.export(fused, (x,))
    assert torch.equal(program.module()(x), fused(x))
    torch.export.save(program, tmp_path / "saved.pt2")
    assert (tmp_path / "saved.pt2").stat().st_size < _layout.KEPT_BYTES / 8, "all that is kept"
    compiled = torch.compile(fuse([v2.Resize(9), F.vflip]), fullgraph=True, backend="aot_eager")
    for size in (12, 14, 17):
        y = torch.rand(2, 3, size, size, requires_grad=True)
        compiled(y).sum().backward()
        y, grad = y.detach().requires_grad_(), y.grad
        fuse([v2.Resize(9), F.vflip])(y).sum().backward()
        assert torch.equal(grad, y.grad)


def test_compile_of_chains_that_draw_or_make_images():
    x = torch.rand(4, 3, 20, 30)
    chain = fuse([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip()])
    with pytest.raises(RuntimeError, match="fuse runs chains that draw"):
        torch.compile(chain, fullgraph=True, backend="aot_eager")(x)
    results = []
    for each in (chain, torch.compile(chain, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(each(x))
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="no chain that draws"):
        torch.export.export(chain, (x,))
    chain = fuse([v2.ToImage(), v2.Resize(8)])
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert type(compiled(x)) is tv_tensors.Image
    assert torch.equal(compiled(x), chain(x))
    for kind in (tv_tensors.Image, tv_tensors.Video):
        assert type(torch.compile(chain, backend="aot_eager")(kind(x))) is kind
    assert type(torch.export.export(chain, (x,)).module()(x)) is torch.Tensor


def test_fakes_and_traces_of_a_chain_with_a_bias():
    chain, x = fuse(evaluation()), images(2, 3, 30, 40)
    expected = chain(x)
    assert torch.equal(make_fx(chain)(x)(x), expected)
    with FakeTensorMode() as mode:
        assert chain(mode.from_tensor(x)).shape == expected.shape
