"""How other libraries would do ImageNet's chains on photographs, each as its users write it: resize
to 256 and crop the middle 224 x 224, or crop at random, resize to 224 x 224 and flip; then scale
and normalise to (3, 224, 224) float32."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.peers import BOTH, PILLOW, Pass, Peer, arrays

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, SHORT = 224, 256


class Draw(NamedTuple):
    """A random crop in pixels of the photograph, and whether the result is flipped."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


# A peer takes uint8 photographs (N, 3, H, W), of one size, for each of them a draw or None for the
# chain without random numbers, and a device. It raises ImportError where it is not installed and
# returns the items of a pass and the step that turns an item into a result.


def middle(height: int, width: int) -> tuple[int, int, int, int]:
    """The size of a photograph whose short side is 256, and top and left of its middle crop."""
    short = min(height, width)
    height, width = SHORT * height // short, SHORT * width // short
    return height, width, round((height - SIDE) / 2), round((width - SIDE) / 2)


def normalise(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) float32, contiguous, as a network takes it."""
    mean, std = (np.float32(255) * np.array(each, np.float32) for each in (MEAN, STD))
    return np.ascontiguousarray(((image - mean) * (1 / std)).transpose(2, 0, 1))


def opencv(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """cv2 on uint8, one by one: INTER_AREA where it shrinks, else LINEAR; numpy normalises."""
    import cv2

    height, width, top, left = middle(*images.shape[-2:])

    def step(item):
        image, draw = item
        if draw is None:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            return normalise(image[top : top + SIDE, left : left + SIDE])
        image = image[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]
        shrinks = min(draw.height, draw.width) > SIDE
        kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(image, (SIDE, SIDE), interpolation=kind)
        return normalise(cv2.flip(image, 1) if draw.flip else image)

    return list(zip(arrays(images), draws, strict=True)), step


def pillow(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """Pillow on uint8, one by one: BILINEAR, antialiased; numpy normalises."""
    from PIL import Image

    height, width, top, left = middle(*images.shape[-2:])
    bilinear = Image.Resampling.BILINEAR

    def step(item):
        image, draw = item
        if draw is None:
            image = image.resize((width, height), bilinear)
            return normalise(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
        box = draw.left, draw.top, draw.left + draw.width, draw.top + draw.height
        image = image.crop(box).resize((SIDE, SIDE), bilinear)
        if draw.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalise(np.asarray(image))

    return list(zip(map(Image.fromarray, arrays(images)), draws, strict=True)), step


def kornia_rs(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """kornia-rs: crops, then its one fused pass, which is bilinear without antialias."""
    from kornia_rs import imgproc, pipeline

    scale = min(images.shape[-2:]) / SHORT
    _, _, top, left = middle(*images.shape[-2:])  # of the middle crop, here before it is resized
    side = round(SIDE * scale)
    centre = Draw(round(top * scale), round(left * scale), side, side, False)

    def step(item):
        image, draw = item
        top, left, h, w, flip = draw or centre
        image = imgproc.crop(image, left, top, w, h)
        image = imgproc.horizontal_flip(image) if flip else image
        return pipeline.resize_normalize_to_tensor(image, (SIDE, SIDE), MEAN, STD)

    return list(zip(arrays(images), draws, strict=True)), step


def albumentations(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """AlbumentationsX as it comes: one by one, bilinear without antialias."""
    import albumentations as A
    from albumentations.pytorch import ToTensorV2

    head = [A.SmallestMaxSize(SHORT), A.CenterCrop(SIDE, SIDE)]
    if draws[0]:
        head = [A.RandomResizedCrop((SIDE, SIDE)), A.HorizontalFlip()]
    chain = A.Compose([*head, A.Normalize(MEAN, STD), ToTensorV2()])
    return arrays(images), lambda image: chain(image=image)["image"]


def kornia(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """kornia in one batch of float32; its antialias is a Gaussian blur before the resize."""
    from kornia.enhance import normalize
    from kornia.geometry.transform import resize

    _, _, top, left = middle(*images.shape[-2:])
    mean, std = (torch.tensor(each, device=device) for each in (MEAN, STD))

    def step(x):
        x = resize(x.float() / 255, SHORT, side="short", antialias=True)
        return normalize(x[..., top : top + SIDE, left : left + SIDE], mean, std)

    return [images.to(device)], step


def dali(images: Tensor, draws: list[Draw | None], device: torch.device) -> Pass:
    """DALI's pipeline on uint8 in one batch, on every core or on the GPU; antialiased."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"
    height, width, top, left = middle(*images.shape[-2:])
    # by itself it would round the middle's half pixels up, where torchvision rounds to even
    position = {"crop_pos_y": top / (height - SIDE), "crop_pos_x": left / (width - SIDE)}

    @pipeline_def(
        batch_size=len(images),
        num_threads=torch.get_num_threads(),
        device_id=0 if gpu else None,
    )
    def chain():
        x = fn.external_source(name="images", layout="HWC")
        x = x.gpu() if gpu else x
        size, mirror = {"resize_shorter": SHORT}, 0
        if draws[0]:
            start, end = (fn.external_source(name=name) for name in ("start", "end"))
            size = {"size": (SIDE, SIDE), "roi_start": start, "roi_end": end}
            mirror = fn.external_source(name="mirror")
        x = fn.resize(x, interp_type=types.INTERP_LINEAR, antialias=True, **size)
        mean, std = ([255 * value for value in each] for each in (MEAN, STD))
        options = {"mean": mean, "std": std, "mirror": mirror, "output_layout": "CHW"}
        return fn.crop_mirror_normalize(x, crop=(SIDE, SIDE), **position, **options)

    pipeline = chain(prefetch_queue_depth=1)
    pipeline.build()
    fed = {"images": images.permute(0, 2, 3, 1).contiguous().numpy()}
    if draws[0]:
        start = np.array([[draw.top, draw.left] for draw in draws], np.float32)
        size = np.array([[draw.height, draw.width] for draw in draws], np.float32)
        fed |= {"start": start, "end": start + size}
        fed["mirror"] = np.array([draw.flip for draw in draws], np.int32)

    def step(parts):
        for name, part in parts.items():
            pipeline.feed_input(name, part)
        (result,) = pipeline.run()
        return (result.as_cpu() if gpu else result).as_array()

    return [fed], step


PHOTO_PEERS = {
    "opencv": Peer(opencv, "opencv-python-headless"),
    PILLOW: Peer(pillow, PILLOW),
    "kornia-rs": Peer(kornia_rs, "kornia-rs"),
    "albumentationsx": Peer(albumentations, "albumentationsx", draws_itself=True),
    "kornia": Peer(kornia, "kornia", "float32", BOTH, single=False, chains=("eval",)),
    "dali": Peer(dali, "nvidia-dali-cuda130", devices=BOTH, single=False),
}
