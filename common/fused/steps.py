"""The steps of a chain of torchvision transforms, those that are linear."""

from inspect import isfunction

from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as F

from . import geometry, values
from .operator import FusedTransform
from .step import NotFusable, Step


def steps_of(chain) -> list[Step]:
    """The steps of a transform, or of a container of them. Raises NotFusable."""
    return [_step(i, transform) for i, transform in enumerate(flat(chain))]


def flat(chain) -> list:
    if _runs_as(chain, v2.Compose) or _runs_as(chain, v1.Compose):
        chain = chain.transforms
    elif _runs_as(chain, nn.Sequential):
        chain = list(chain)
    elif hasattr(chain, "fused_chain"):
        return flat(chain.fused_chain)
    if isinstance(chain, (list, tuple)):
        return [transform for part in chain for transform in flat(part)]
    return [chain]


def _runs_as(chain, container: type) -> bool:
    """Whether it is such a container, or of a subclass that does not change what it does."""
    names = "__call__", "forward"
    same = (getattr(type(chain), n, None) is getattr(container, n, None) for n in names)
    return isinstance(chain, container) and all(same)


def _step(i: int, transform) -> Step:
    name = getattr(transform, "__name__", None) or " ".join(repr(transform).split())
    name = f"step {i}, {name}"
    make = FUNCTIONS.get(transform) if isfunction(transform) else TRANSFORMS.get(type(transform))
    if make is None:
        known = ", ".join(sorted({kind.__name__ for kind in TRANSFORMS}))
        reason = REASONS.get(type(transform).__name__, "it is not one of the linear transforms")
        if type(transform).__module__.startswith("torchvision.transforms.transforms"):
            reason = "it is of torchvision's v1: use torchvision.transforms.v2"
        raise NotFusable(f"{name}: {reason} (fuse takes {known}, hflip, vflip)")
    try:
        step = make(transform)
    except ValueError as error:
        raise NotFusable(f"{name}: {error}") from None
    step.name = name
    return step


REASONS = {
    **dict.fromkeys(("ColorJitter", "RandomAutocontrast"), "contrast and hue are not linear"),
    **dict.fromkeys(("RandomApply", "RandomChoice", "RandomOrder"), "it chooses between chains"),
    **dict.fromkeys(
        ("RandomRotation", "RandomAffine", "RandomPerspective", "ElasticTransform"),
        "it is not separable: rows and columns depend on each other",
    ),
    "Lambda": "nothing is known of its function",
}


TRANSFORMS = {
    v2.Identity: values.identity,
    nn.Identity: values.identity,
    v2.ToImage: values.to_image,
    v2.PILToTensor: values.pil_to_tensor,
    v2.ToPureTensor: values.to_pure_tensor,
    v2.ToDtype: values.to_dtype,
    v2.ConvertImageDtype: values.to_dtype,
    v2.Resize: geometry.resize,
    v2.CenterCrop: geometry.center_crop,
    v2.RandomCrop: geometry.random_crop,
    v2.RandomResizedCrop: geometry.random_resized_crop,
    v2.RandomHorizontalFlip: geometry.random_flip(1),
    v2.RandomVerticalFlip: geometry.random_flip(0),
    v2.Grayscale: values.grayscale,
    v2.GaussianBlur: geometry.gaussian_blur,
    v2.Normalize: values.normalize,
    FusedTransform: values.fused_transform,
    ImageClassification: values.preset,
}
FUNCTIONS = {F.horizontal_flip: geometry.flip(1), F.vertical_flip: geometry.flip(0)}
