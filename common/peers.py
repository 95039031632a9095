"""How other libraries would do the chain's work, each as its users write it. All are optional:
`pip install -r requirements-peers.txt` brings those that this machine can have."""

from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from common.timing import reason

SIZE = (28, 28)


class Peer(NamedTuple):
    """make: see below. package: its distribution. single: one image at a time. chains: of the
    photographs; draws_itself: it cannot be given the random crops."""

    make: Callable
    package: str
    dtype: str = "uint8"
    devices: tuple[str, ...] = ("cpu",)
    single: bool = True
    chains: tuple[str, ...] = ("eval", "train")
    draws_itself: bool = False

    def version(self) -> str:
        return f"{self.package} {version(self.package)}"


# A peer takes uint8 images (N, 3, H, W), a batch size and a device, raises ImportError where it
# is not installed, and returns what one pass is made of: the items of a pass and the step that
# turns an item into a result, (B, 1, 28, 28) or (28, 28), float in [0, 1] or uint8. Those for
# single images do as much of the work as they can on one channel: the chain is linear.
Pass = tuple[list, Callable]


def passes(name: str, peer: Peer, absent: list[str], *arguments) -> Pass | None:
    """What `peer.make` returns for the arguments, of which the device is the last; None where it
    fails, with its name in `absent`, and with the reason unless it is not installed."""
    label = f"{name} ({arguments[-1].type})"
    try:
        return peer.make(*arguments)
    except ImportError:
        absent.append(label)
    except Exception as error:  # a foreign library may raise anything
        absent.append(f"{label}: {reason(error)}")
    return None


def arrays(images: Tensor) -> list[np.ndarray]:
    """The images as decoders return them: (H, W, 3)."""
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())


def opencv(images: Tensor, batch: int, device: torch.device) -> Pass:
    """cv2 on uint8 images, one by one; INTER_AREA is its antialiased filter, a box."""
    import cv2

    def step(image):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.flip(cv2.resize(gray, SIZE, interpolation=cv2.INTER_AREA), -1)

    return arrays(images), step


def pillow(images: Tensor, batch: int, device: torch.device) -> Pass:
    """Pillow on uint8 images, one by one; its bilinear filter is antialiased, and rounds."""
    from PIL import Image

    def step(image):
        gray = Image.fromarray(image).convert("L").resize(SIZE, Image.Resampling.BILINEAR)
        return np.asarray(gray.transpose(Image.Transpose.ROTATE_180))

    return arrays(images), step


def kornia_rs(images: Tensor, batch: int, device: torch.device) -> Pass:
    """kornia-rs on uint8 images, one by one; its bilinear filter is not antialiased."""
    from kornia_rs import imgproc

    def step(image):
        small = imgproc.resize(image, SIZE, "bilinear")
        return imgproc.gray_from_rgb(imgproc.vertical_flip(imgproc.horizontal_flip(small)))

    return arrays(images), step


def albumentations(images: Tensor, batch: int, device: torch.device) -> Pass:
    """AlbumentationsX on uint8 images, one by one, with OpenCV's INTER_AREA."""
    import albumentations as A
    import cv2

    chain = A.Compose(
        [
            A.ToGray(num_output_channels=1, p=1),
            A.Resize(*SIZE, interpolation=cv2.INTER_AREA),
            A.HorizontalFlip(p=1),
            A.VerticalFlip(p=1),
        ]
    )
    return arrays(images), lambda image: chain(image=image)["image"]


def kornia(images: Tensor, batch: int, device: torch.device) -> Pass:
    """kornia in batches; its antialias is a Gaussian blur before the bilinear resize."""
    from kornia.color import rgb_to_grayscale
    from kornia.geometry.transform import hflip, resize, vflip

    def step(x):
        return vflip(hflip(resize(rgb_to_grayscale(x), SIZE, antialias=True)))

    return list((images.to(device).float() / 255).split(batch)), step


def jax(images: Tensor, batch: int, device: torch.device) -> Pass:
    """JAX under jit in batches, on JAX's own default device."""
    import jax
    import jax.numpy as jnp

    weights = jnp.array([0.2989, 0.587, 0.114])

    @jax.jit
    def chain(x):
        gray = jnp.einsum("nchw,c->nhw", x, weights)
        small = jax.image.resize(gray, (len(x), *SIZE), "linear", antialias=True)
        return small[:, None, ::-1, ::-1]

    parts = (images.float() / 255).split(batch)
    return [jnp.asarray(part.numpy()) for part in parts], lambda x: chain(x).block_until_ready()


def dali(images: Tensor, batch: int, device: torch.device) -> Pass:
    """DALI's pipeline on uint8 batches, on all cores or on the GPU."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=batch,
        num_threads=torch.get_num_threads(),
        device_id=0 if device.type == "cuda" else None,
    )
    def chain():
        x = fn.external_source(name="images", layout="HWC")
        x = x.gpu() if device.type == "cuda" else x
        x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
        x = fn.resize(x, size=SIZE, interp_type=types.INTERP_LINEAR, dtype=types.FLOAT)
        return fn.flip(x, horizontal=1, vertical=1) / 255

    pipeline = chain(prefetch_queue_depth=1)
    pipeline.build()

    def step(part):
        pipeline.feed_input("images", part)
        (result,) = pipeline.run()
        result = result.as_cpu() if device.type == "cuda" else result
        return result.as_array()[..., 0]

    return [part.numpy() for part in images.permute(0, 2, 3, 1).contiguous().split(batch)], step


def cvcuda(images: Tensor, batch: int, device: torch.device) -> Pass:
    """CV-CUDA's counterparts of torchvision's functions, in batches on the GPU."""
    from cvcuda import tv

    def step(x):
        x = tv.resize(tv.rgb_to_grayscale(x), list(SIZE), antialias=True)
        return tv.vertical_flip(tv.horizontal_flip(x))

    return list((images.to(device).float() / 255).split(batch)), step


# Pillow-SIMD has Pillow's name and place. It may also be installed as "pillow".
PILLOW = "pillow-simd" if ".post" in PIL.__version__ else "pillow"
BOTH = ("cpu", "cuda")

PEERS = {
    "opencv": Peer(opencv, "opencv-python-headless"),
    PILLOW: Peer(pillow, PILLOW),
    "kornia-rs": Peer(kornia_rs, "kornia-rs"),
    "albumentationsx": Peer(albumentations, "albumentationsx"),
    "kornia": Peer(kornia, "kornia", "float32", BOTH, single=False),
    "jax": Peer(jax, "jax", "float32", single=False),
    "dali": Peer(dali, "nvidia-dali-cuda130", devices=BOTH, single=False),
    "cvcuda": Peer(cvcuda, "cvcuda-cu13", "float32", ("cuda",), single=False),
}
