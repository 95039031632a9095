"""The chain in other libraries, each in its fastest usual form. All are optional:
`pip install -r requirements-peers.txt` installs those that exist for this machine."""

from collections.abc import Callable

import torch
from torch import Tensor

SIZE = (28, 28)

# A peer takes uint8 images (N, 3, H, W), a batch size and a device, raises ImportError if it is not
# installed, and returns the items of one pass and the step that turns an item into a result,
# (B, 1, 28, 28) or (28, 28), float in [0, 1] or uint8. The chain is linear, so the peers that take
# single images convert to gray first.
Pass = tuple[list, Callable]


def opencv(images: Tensor, batch: int, device: torch.device) -> Pass:
    """cv2 on uint8 images, one by one; INTER_AREA is its antialiased filter, a box."""
    import cv2

    def step(image):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return cv2.flip(cv2.resize(gray, SIZE, interpolation=cv2.INTER_AREA), -1)

    return list(images.permute(0, 2, 3, 1).contiguous().numpy()), step


def pillow(images: Tensor, batch: int, device: torch.device) -> Pass:
    """Pillow on uint8 images, one by one; its bilinear filter is antialiased, and rounds."""
    import numpy as np
    from PIL import Image

    def step(image):
        gray = Image.fromarray(image).convert("L").resize(SIZE, Image.Resampling.BILINEAR)
        return np.asarray(gray.transpose(Image.Transpose.ROTATE_180))

    return list(images.permute(0, 2, 3, 1).contiguous().numpy()), step


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


# name: (peer, devices it runs on, one image at a time, dtype)
PEERS = {
    "opencv": (opencv, ("cpu",), True, "uint8"),
    "pillow": (pillow, ("cpu",), True, "uint8"),
    "kornia": (kornia, ("cpu", "cuda"), False, "float32"),
    "jax": (jax, ("cpu",), False, "float32"),
    "dali": (dali, ("cpu", "cuda"), False, "uint8"),
    "cvcuda": (cvcuda, ("cuda",), False, "float32"),
}
