"""Chains of torchvision transforms, random ones too, and what torchvision makes of an image."""

import random

import PIL.Image
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# older torchvisions take no names
MODES = [v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVEL = 1.05  # of uint8, unrounded: torchvision's weights have 14 bits and more, 0.05 of a level


def images(*shape, dtype=torch.uint8, seed=0):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 256).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def channels_last(x):
    """On the default layout torch's antialiased resize to a width of 1 returns one row for all."""
    if x.dim() == 3:
        return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return x.contiguous(memory_format=torch.channels_last)


def step_by_step(chain, x):
    """torchvision, each step on the layout on which torch resizes to a width of 1 without a fault.
    Returns the result and the largest value on the way."""
    largest = 1.0
    for transform in chain:
        single = x.shape[-3] == 1  # has no layout of its own: resized as three channels
        wide = x.repeat_interleave(3, -3) if single else x
        if isinstance(transform, v2.RandomResizedCrop):
            wide = F.crop(wide, **transform.make_params([x]))
        if isinstance(transform, (v2.Resize, v2.RandomResizedCrop)):
            mode, antialias = transform.interpolation, transform.antialias
            x = F.resize(channels_last(wide), transform.size, mode, antialias=antialias)
            x = x[..., :1, :, :] if single else x
        else:
            x = transform(channels_last(x))
        largest = max(largest, x.abs().max().item())
    return x, largest


def random_chain(rng, shape, dtype):
    """A chain that torchvision accepts for these images. Returns (chain, level): one level of
    uint8 in the result, or 0 where torchvision rounds no uint8 on the way."""
    channels, h, w = shape

    def size():  # now and then that of the image, which torch does not resize
        return rng.choice([rng.randint(1, 40), rng.randint(1, 12), rng.randint(1, 120), h, w])

    chain, rounded, scale = [], False, 1.0
    if rng.random() < 0.5:
        chain.append(v2.ToImage())
    for _ in range(rng.randint(0, 4)):
        kind = rng.randrange(9)
        if kind == 0:
            mode, antialias = rng.choice(MODES), rng.random() < 0.7
            if rng.random() < 0.5:
                new = (size(), size())
                chain.append(v2.Resize(new, interpolation=mode, antialias=antialias))
            else:
                short = rng.randint(1, 60)
                chain.append(v2.Resize(short, interpolation=mode, antialias=antialias))
                new = tuple(F.resize(torch.zeros(1, h, w), [short]).shape[-2:])
                if max(new) > 1500:
                    chain.pop()
                    continue
            rounded |= dtype == torch.uint8 and new != (h, w)
            h, w = new
        elif kind == 1:
            h, w = size(), size()
            chain.append(v2.CenterCrop((h, w)))
        elif kind == 2:
            new = size(), size()
            padding = rng.choice([None, 2, (1, 0, 3, 2)])
            mode = rng.choice(["constant", "constant", "edge", "reflect", "symmetric"])
            fill = rng.choice([0, 0, 7]) if dtype == torch.uint8 else rng.choice([0, 0, 0.3])
            if mode != "constant":
                padding, needed = 1, False
                if min(h, w) < 2 or new[0] > h + 2 or new[1] > w + 2:
                    continue
            else:
                needed = True
            chain.append(v2.RandomCrop(new, padding, needed, fill, mode))
            h, w = new
        elif kind == 3:
            h, w = size(), size()
            mode, antialias = rng.choice(MODES), rng.random() < 0.8
            chain.append(v2.RandomResizedCrop((h, w), interpolation=mode, antialias=antialias))
            rounded |= dtype == torch.uint8
        elif kind == 4:
            chain.append(
                rng.choice([v2.RandomHorizontalFlip(), F.hflip, v2.RandomHorizontalFlip(0.9)])
            )
        elif kind == 5:
            chain.append(rng.choice([v2.RandomVerticalFlip(), F.vflip]))
        elif kind == 6:
            chain.append(v2.Grayscale(rng.choice([1, 3])))
            rounded |= dtype == torch.uint8 and channels == 3
            channels = chain[-1].num_output_channels
        elif kind == 7:
            kernel = rng.choice([1, 3, 5]), rng.choice([1, 3, 5])
            if kernel[0] // 2 < w and kernel[1] // 2 < h:
                chain.append(v2.GaussianBlur(kernel, rng.uniform(0.3, 2)))
                rounded |= dtype == torch.uint8
        elif dtype == torch.uint8:
            scaled = rng.random() < 0.8
            dtype, scale = torch.float32, 1 / 255 if scaled else 1.0
            chain.append(v2.ToDtype(dtype, scale=scaled))
        else:
            mean = [rng.random() for _ in range(channels)]
            std = [rng.uniform(0.2, 1) for _ in range(channels)]
            chain.append(v2.Normalize(mean, std))
            scale /= min(std)
    return chain or [v2.Identity()], scale * rounded


def draw(i):
    rng = random.Random(i)

    def side():
        return rng.choice([rng.randint(1, 20), rng.randint(1, 60), rng.randint(1, 150)])

    shape = rng.choice([1, 3]), side(), side()
    if i % 100 == 0:
        shape = rng.choice([1, 3]), rng.randint(200, 500), rng.randint(200, 500)
    dtype = rng.choice([torch.uint8, torch.uint8, torch.float32, torch.float32, torch.float64])
    batch = rng.choice([(), (1,), (5,)])
    chain, level = random_chain(rng, shape, dtype)
    return chain, level, images(*batch, *shape, dtype=dtype, seed=i)


def evaluation(size=20, crop=18, **options):
    return v2.Compose(
        [
            v2.Resize(size, **options),
            v2.CenterCrop(crop),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def training(size=16):
    return v2.Compose(
        [
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


ONE_LEVEL = LEVEL / 255 / min(STD)  # of a normalised image


def close(actual, expected, level=ONE_LEVEL):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= level


def pil(height=30, width=40, mode="RGB"):
    x = images(height, width, 3).numpy()
    return PIL.Image.fromarray(x if mode == "RGB" else x[..., 0])
