"""fuse(chain): a chain of torchvision transforms as one pass over the images."""

import copy
import itertools
import weakref
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from . import _ops as ops
from ._layout import Plan, aside, modes
from .bands import CPU
from .colour import unclamped
from .draws import draw_each
from .passes import Pass, Passes
from .samples import apply, check, images_of, items_of, show, spec_of, with_arrays, wrap
from .step import NotFusable, Step
from .steps import flat, steps_of

__all__ = ["NotFusable", "fuse"]
KEPT = 256  # image sizes whose passes a module keeps


def fuse(chain) -> nn.Module:
    """A module that gives what the chain gives, in one pass over the images.

    chain: a v2.Compose, nn.Sequential or list of transforms, or one transform: ToImage,
    PILToTensor, ToPureTensor, ToDtype, Resize (bilinear, bicubic), CenterCrop, RandomCrop,
    RandomResizedCrop, RandomHorizontalFlip, RandomVerticalFlip, v2.functional.hflip and vflip,
    Grayscale, GaussianBlur with a fixed sigma, Normalize, Identity, FusedTransform, and
    `weights.transforms()` of torchvision's classification models. Raises NotFusable (a ValueError)
    for anything else, naming the step and the reason.

    The module takes what the chain takes: (..., C, H, W) tensors, tv_tensors.Image and Video, PIL
    images (RGB, L), uint8 or float; (H, W, C) numpy arrays where ToImage comes first; or a sample
    such as (image, label) or a dict, whose other parts pass through. Of several PIL images all are
    transformed by every step (by torchvision, after PILToTensor, only the first). Types and dtypes
    are the chain's, results are contiguous. Boxes, masks and keypoints are refused.

    Random transforms: each item along the first dimension of a batch draws its own parameters (of
    images beyond (C, H, W), of videos beyond (T, C, H, W)), from torch's generator in the order of
    a loop: with one seed, fuse(chain)(batch) equals stack([chain(x) for x in batch]). Images of one
    sample share them.

    Float images: equal to the chain's result within 1e-6 times its largest value (half precision:
    torchvision rounds between the steps, this does not). uint8 images: exact where torchvision does
    not round between the steps, within one level where it does. Where it rounds more than once
    (Resize and Grayscale before ToDtype, or a bicubic Resize, which it also clamps between the
    axes), each rounding is a pass of its own: with ToDtype before them the chain is one pass.
    """
    return Fused(chain)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """What the chain does to images of one kind, dtype and size."""

    draws: list[tuple[int, int, int]]  # the steps that draw, and the size of their image
    passes: list[Pass] | None  # None: they depend on what is drawn
    exact: bool
    result: type | None  # None: as the input
    pil: bool  # the result is a PIL image
    flipped: dict | None  # of chains that draw flips alone: by those of a single image, the passes


class Fused(nn.Module):
    """See `fuse`."""

    def __init__(self, chain) -> None:
        super().__init__()
        steps_of(chain)  # its error comes here
        # a copy, as passes are kept: who changes the chain afterwards fuses it again
        self.__setstate__({**self.__dict__, "fused_chain": copy.deepcopy(flat(chain))})

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_steps", "_recipes", "_key")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._steps: list[Step] = steps_of(self.fused_chain)
        self._random = any(step.draw and not step.fixed for step in self._steps)
        self._recipes: dict[tuple, _Recipe] = {}
        self._key = next(_keys)
        _modules[self._key] = self

    def extra_repr(self) -> str:
        lines = [step.name for step in self._steps]
        for (kind, dtype, shape), recipe in list(self._recipes.items())[-3:]:
            what = "PIL" if kind is PIL.Image.Image else str(dtype).removeprefix("torch.")
            passes = recipe.passes
            how = (
                "bands drawn for each call"
                if passes is None
                else " -> ".join(aside(show, each) for each in passes)
            )
            lines.append(f"{what} {'x'.join(map(str, shape))}: {how or 'unchanged'}")
        return "\n".join(lines)

    def forward(self, *inputs):
        sample = inputs if len(inputs) > 1 else inputs[0]
        if torch.compiler.is_compiling():
            plain = isinstance(sample, Tensor) and not isinstance(sample, tv_tensors.TVTensor)
            traced = plain and (not self._random or _exporting())
            return self._traced(sample) if traced else _eager(self, *inputs)
        if isinstance(sample, (Tensor, PIL.Image.Image)):
            return self._images([sample])[0]
        leaves, spec = tree_flatten(sample)
        if self._steps and self._steps[0].arrays:
            leaves = with_arrays(leaves)
        chosen = images_of(leaves)
        plain = [x for x in leaves if isinstance(x, Tensor) and x.dim() > 2]
        if isinstance(sample, list) and len(chosen) == 1 and len(leaves) == len(plain) > 1:
            raise TypeError(
                "fuse: torchvision transforms only the first of several plain tensors: stack them, "
                "or make each a tv_tensors.Image"
            )
        results = self._images([leaves[i] for i in chosen])
        for i, result in zip(chosen, results, strict=True):
            leaves[i] = result
        return tree_unflatten(leaves, spec)

    def _traced(self, x: Tensor) -> Tensor:
        """For torch.compile and torch.export: of tensors, where nothing is drawn. The sizes are
        constants of the graph."""
        shape = [len(range(n)) for n in x.shape[-3:]]  # a range has no symbolic length
        image, passes = _constants(self._key, x.dtype, *shape)
        for box, clamp, tables, arguments in passes:
            if box is not None:
                x = x[..., box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
            tables = [table.to(x.device) for table in tables]
            x = torch.ops.fused_transform.differentiable.default(x, *tables, *arguments)
            if clamp is not None:
                x = x.clamp(*clamp.to(x.device, x.dtype))
        return x.as_subclass(tv_tensors.Image) if image else x

    def _images(self, images: list) -> list:
        """All images of one sample, with the same random parameters."""
        recipes = [self._recipe(spec_of(image)) for image in images]
        params = None
        if recipes[0].draws:
            params, items = self._draw(images, recipes)
        results = []
        for image, recipe in zip(images, recipes, strict=True):
            passes = recipe.passes
            if passes is None:
                passes = self._drawn(spec_of(image), recipe, params)
            x = image
            if isinstance(x, PIL.Image.Image):
                x = F.pil_to_tensor(x)
            elif type(x) is not Tensor:
                x = x.as_subclass(Tensor)
            for each in passes:
                x = apply(each, x, items if params else 1)
            results.append(wrap(x, image, recipe.result, recipe.pil))
        return results

    def _draw(self, images: list, recipes: list[_Recipe]) -> tuple[list[list], int]:
        """The parameters of each step that draws, one for each item; and the number of items."""
        items, draws = items_of(images[0]), recipes[0].draws
        for image, recipe in zip(images[1:], recipes[1:], strict=True):
            pairs = zip(draws, recipe.draws, strict=True)
            sizes = all(a == b for a, b in pairs if self._steps[a[0]].sized)
            if items_of(image) != items or not sizes:
                raise ValueError(
                    "fuse: the images of a sample share their random parameters, so they must "
                    "agree in number and size: " + ", ".join(str(spec_of(x)[2]) for x in images)
                )
        steps = [(self._steps[i], *size) for i, *size in draws]
        return draw_each(steps, items), items

    def _recipe(self, spec: tuple) -> _Recipe:
        recipe = self._recipes.get(spec)
        if recipe is None:
            recipe = aside(self._trace, spec)
            if len(self._recipes) >= KEPT:
                self._recipes.pop(next(iter(self._recipes)), None)
            self._recipes[spec] = recipe
        return recipe

    def _trace(self, spec: tuple) -> _Recipe:
        check(spec)
        draws: list[tuple[int, int, int]] = []
        passes = self._run(spec, None, False, draws)
        exact = passes.roundings > 1
        fixed = all(self._steps[i].fixed for i, _, _ in draws)
        if fixed and exact:
            passes = self._run(spec, None, True)
        flips = all(self._steps[i].flips or self._steps[i].fixed for i, _, _ in draws)
        done = passes.done if fixed else None
        return _Recipe(draws, done, exact, passes.result, passes.pil, {} if flips else None)

    def _drawn(self, spec: tuple, recipe: _Recipe, params: list[list]) -> list[Pass]:
        run = spec, params, recipe.exact
        if recipe.flipped is None or len(params[0]) != 1:
            return (aside(self._run, *run) if modes() else self._run(*run)).done
        drawn = tuple(param for (param,) in params)
        if drawn not in recipe.flipped:
            recipe.flipped[drawn] = aside(self._run, *run).done
        return recipe.flipped[drawn]

    def _run(self, spec: tuple, params, exact: bool, draws: list | None = None) -> Passes:
        """The passes of images of this spec, with these parameters of the steps that draw; notes
        in `draws` which do."""
        passes = Passes(*spec, exact)
        drawn = iter(params or [])
        for i, step in enumerate(self._steps):
            if step.draw is not None and draws is not None:
                draws.append((i, passes.height, passes.width))
            try:
                step.apply(passes, next(drawn, None) if step.draw is not None else None)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{step.name}: {error}") from None
        passes.finish(passes.dtype)
        return passes


_keys = itertools.count()
_modules: "weakref.WeakValueDictionary[int, Fused]" = weakref.WeakValueDictionary()


@torch.compiler.disable(reason="fuse runs chains that draw, and all but plain tensors, eagerly")
def _eager(module: Fused, *inputs):
    """torch.compile is not to compile how bands are computed, which would round otherwise."""
    return module.forward(*inputs)


@torch.compiler.assume_constant_result
def _exporting() -> bool:  # torch.compile of torch 2.11 takes the answer for True
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _constants(key: int, dtype: torch.dtype, *shape: int) -> tuple[bool, list[tuple]]:
    """Of plain tensors, whether they become a tv_tensors.Image, and the passes of a module as
    tables and sizes; torch.compile runs this when it traces a call."""
    recipe = _modules[key]._recipe((Tensor, dtype, shape))
    if recipe.passes is None:
        raise RuntimeError("fuse: torch.export takes no chain that draws")
    ops.load()
    image = recipe.result is tv_tensors.Image and not _exporting()
    return image, aside(_constants_of, recipe.passes, dtype)


def _constants_of(passes: list[Pass], dtype: torch.dtype) -> list[tuple]:
    constants = []
    for each in passes:
        wide = torch.float64 in (dtype, each.dtype)
        plan = Plan(each.rows, each.columns, wide, CPU)
        sizes = each.rows.size, each.columns.size, each.rows.out, each.columns.out
        dtype, table, clamp = each.dtype, each.table, None
        if table is not None and dtype.is_floating_point:  # the operator itself is linear
            table, clamp = unclamped(table)
        arguments = each.mix, table, None, None, *sizes, dtype
        constants.append((each.box, clamp, (*plan.tables, *plan.transposed()), arguments))
    return constants
