"""VGG16 weight files, checked before use, and the VGG16 layers of the perceptual loss."""

import os
import socket
import stat
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg

from common import UserError

# torchvision's vgg16().features up to layer 28: index of each convolution -> output channels.
CONVS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
CONVS |= {17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


def vgg16_features(weights: str | Path) -> nn.Sequential:
    """Layers 0 to 28 of torchvision's vgg16().features, float32, in eval mode. The weights are
    non-persistent buffers: the net is frozen and not part of a checkpoint.

    weights: see `load_vgg16`. Draws no random number from torch's generator.
    """
    state = load_vgg16(weights)
    with torch.device("meta"):  # no initialisation
        layers = vgg_layers()
    for place in CONVS:
        layers[place].weight = state[f"features.{place}.weight"]
        layers[place].bias = state[f"features.{place}.bias"]
    return layers.eval().to(memory_format=torch.channels_last)


def vgg_layers() -> nn.Sequential:
    """The layers of `vgg16_features` without their weight values."""
    layers = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)[:29]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # in place it would overwrite the compared feature maps
        for name, value in list(layer.named_parameters()):
            delattr(layer, name)
            layer.register_buffer(name, value.detach(), persistent=False)
    return layers


def load_vgg16(weights: str | Path) -> dict[str, Tensor]:
    """The convolutions of a VGG16: 26 float32 tensors under torchvision's keys.

    weights: "imagenet" (torchvision's, downloaded once), "random" (always the same He
    initialisation, as torchvision's), or the path of a torchvision VGG16 state dict, whole or
    `features.*` only, of any float dtype. Raises UserError for any other file.
    """
    shapes = _shapes()
    if weights == "random":
        generator = torch.Generator().manual_seed(0)
        return {
            key: torch.randn(shape, generator=generator) * (2 / (9 * shape[0])) ** 0.5
            if len(shape) == 4
            else torch.zeros(shape)
            for key, shape in shapes.items()
        }
    path = _download() if weights == "imagenet" else Path(weights).expanduser()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(0, "not a file")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # its content is not to blame
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"VGG16 weights {path} cannot be read: {reason}") from error
    except Exception as error:  # damaged files raise many types
        raise UserError(
            f"VGG16 weights {path}: not a whole PyTorch file of tensors only "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"VGG16 weights {path}: not a state dict (names to tensors)")
    classifier = {f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")}
    found = state.keys() - classifier if classifier <= state.keys() else state.keys()
    for verb, keys in (("lacks", shapes.keys() - found), ("has the extra", found - shapes.keys())):
        if keys:
            raise UserError(
                f"VGG16 weights {path}: {verb} key {min(map(str, keys))} "
                f"({len(keys)} such), so not a torchvision VGG16 state dict"
            )
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape or not state[key].is_floating_point():
            raise UserError(
                f"VGG16 weights {path}: {key} is {tuple(state[key].shape)} {state[key].dtype}, "
                f"not {shape} of a float dtype"
            )
    state = {key: state[key].float() for key in shapes}
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"VGG16 weights {path}: {key} is not finite")
    return state


def _shapes() -> dict[str, tuple[int, ...]]:
    """The 26 keys of the convolutions in a torchvision VGG16 state dict, with their shapes."""
    shapes, inputs = {}, 3
    for place, outputs in CONVS.items():
        shapes[f"features.{place}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"features.{place}.bias"] = (outputs,)
        inputs = outputs
    return shapes


def _download() -> Path:
    """torchvision's ImageNet weights in torch's cache folder, downloaded if they are missing."""
    url = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not os.path.exists(path):  # Path.exists raises PermissionError
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.split("-")[1], progress=False)
        except (OSError, RuntimeError) as error:  # network, disk or hash errors
            raise UserError(
                f"cannot download {path.name} (528 MB) from {url}: {error}; put it into "
                f"{path.parent}, or name a file with --vgg-weights PATH (or random)"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    return path
