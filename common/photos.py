"""bench.py's chains on photographs: fuse(chain) against torchvision in each form that its users
have, and against other libraries, for the chains that ImageNet models are evaluated and trained
with."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from common import data
from common.fused import fuse
from common.peers import passes
from common.photo_peers import MEAN, PHOTO_PEERS, SIDE, STD, Draw
from common.timing import Case, Timing, check, fidelity

HEIGHT, WIDTH = 375, 500
WARM = 2000  # images before fuse is timed on random crops: it keeps the weights of a crop's size
TOLERANCE = 2.05  # levels: torchvision rounds uint8 after each of two passes, in its own way
# torchvision's fastest form on a CPU, and the reference for the errors
BASE, PIL_BASE = "torchvision uint8 channels_last", "torchvision PIL"
LEVELS = 255 * torch.tensor(STD).view(3, 1, 1)  # in one unit of a normalised value

CHAINS = {
    "eval": [v2.Resize(256), v2.CenterCrop(SIDE)],
    "train": [v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip()],
}


def photographs(count: int) -> Tensor:
    """(count, 3, 375, 500) uint8: images with the statistics of photographs, the same each time."""
    return torch.cat([data.synthetic(1, seed, HEIGHT, WIDTH) for seed in range(count)])


def chain(name: str, pil: bool = False) -> v2.Compose:
    """The chain as torchvision's users write it."""
    to_tensor = [v2.PILToTensor()] if pil else []
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([*CHAINS[name], *to_tensor, *last])


def timings(devices: list[torch.device], args: Any) -> tuple[list[Timing], list[str]]:
    """The section "chains" of the JSON, checked and ready for the clock, and the peers that are not
    installed."""
    images = photographs(4 if args.dry_run else 64)
    results, absent = [], []
    for name in CHAINS:
        torch.manual_seed(0)  # as in `check`
        draws = [draw(image) if name == "train" else None for image in images]
        torch.manual_seed(0)
        reference = torch.stack([chain(name)(image) for image in channels_last(images)])
        cases = [case for device in devices for case in chain_cases(name, images, device)]
        for device in devices if args.peers else []:
            found, missing = peer_cases(name, images, draws, device)
            cases, absent = cases + found, absent + missing
        judge = against(reference)
        results += [check(case, judge) for case in tqdm(cases, name, disable=None, leave=False)]
        if name == "train" and not args.dry_run:
            warm_up([case for case in cases if case.name.startswith("fuse")])
    return results, list(dict.fromkeys(absent))


@torch.inference_mode()
def warm_up(cases: list[Case]) -> None:
    """The first epoch's images: what a training sees from then on is the steady state."""
    for case in cases:
        for _ in range(WARM // case.images):
            deque(case.run(), maxlen=0)


def draw(image: Tensor) -> Draw:
    """The crop and the flip that the chain "train" draws for an image."""
    crop, flip = CHAINS["train"]
    box = crop.make_params([image])
    return Draw(box["top"], box["left"], box["height"], box["width"], bool(torch.rand(1) < flip.p))


def channels_last(images: Tensor) -> list[Tensor]:
    """Each image with its pixels in the order of a decoder: (3, H, W), channels last in memory."""
    return list(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


def chain_cases(name: str, images: Tensor, device: torch.device) -> Iterator[Case]:
    """torchvision and fuse on each kind of input, image by image and in batches. A batch through
    torchvision's random chain would share one crop, so that form is fuse's alone."""
    here = images.to(device)
    ordered = here.contiguous(memory_format=torch.channels_last)
    kinds = {
        "uint8 channels_last": (ordered, "uint8"),
        "uint8 planar": (here, "uint8"),
        "float": (data.to_float(here), "float32"),
    }
    space = torch.empty_like(here)
    head, note = ("copy", device, name, "uint8", len(here)), "copy_ of the images"
    yield case(*head, [here], space.copy_, "part", note)
    libraries = {"torchvision": lambda each: each, "fuse": fuse}
    for library, make in libraries.items():
        for kind, (batch, dtype) in kinds.items():
            head = f"{library} {kind}", device, name, dtype
            yield case(*head, 1, list(batch), make(chain(name)))
            if library == "fuse" or name == "eval":
                yield case(*head, len(batch), [batch], make(chain(name)))
        if device.type == "cpu":
            arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
            items = [PIL.Image.fromarray(array) for array in arrays]
            yield case(f"{library} PIL", device, name, "uint8", 1, items, make(chain(name, True)))


def case(
    label: str, device: torch.device, name: str, dtype: str, batch: int, items: list,
    function: Callable, kind: str = "chain", note: str = "",
) -> Case:  # fmt: skip
    return Case(
        label, device.type, name, dtype, batch, batch * len(items), lambda: map(function, items),
        kind, note, shape=(3, SIDE, SIDE),
    )  # fmt: skip


def peer_cases(
    name: str, images: Tensor, draws: list[Draw | None], device: torch.device
) -> tuple[list[Case], list[str]]:
    """The peers on the same photographs; for "train" they are given the crops that were drawn."""
    cases, absent = [], []
    for label, peer in PHOTO_PEERS.items():
        if device.type not in peer.devices or name not in peer.chains:
            continue
        made = passes(label, peer, absent, images, draws, device)
        if made is None:
            continue
        items, step = made
        batch = 1 if peer.single else len(images)
        note = f"{peer.make.__doc__.splitlines()[0]} ({peer.version()})"
        kind = "peer"
        if name == "train" and peer.draws_itself:
            kind, note = "part", f"{note}; draws its own crops: not compared"
        cases.append(case(label, device, name, peer.dtype, batch, items, step, kind, note))
    return cases, absent


def against(reference: Tensor) -> Callable:
    """A judge that compares with torchvision on uint8 images."""

    def judge(case: Case, result: Tensor) -> tuple[dict[str, float], str]:
        error = (result - reference).abs()
        scores = fidelity(error * LEVELS) | {"max_abs_error": error.max().item()}
        wrong = case.kind == "chain" and not scores["max_levels"] <= TOLERANCE
        return scores, f"wrong: off by {scores['max_levels']:.3g} levels" if wrong else ""

    return judge
