"""fuse(chain) against torchvision's fastest form: `python -m tests.manual.fuse` (a minute).

The chains of an ImageNet evaluation and training, on 64 uint8 images of 3x375x500. torchvision is
fastest one by one on channels_last images. Results are compared before they are timed; the forms
take turns, and each figure is the median of the runs, in ms an image.
"""

import argparse
import statistics
import time

import torch
from torchvision.transforms import v2

from common.fused import fuse
from common.glibc import keep_memory

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def chains() -> dict[str, v2.Compose]:
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return {
        "Resize(256) -> CenterCrop(224)": v2.Compose([v2.Resize(256), v2.CenterCrop(224), *last]),
        "RandomResizedCrop(224) -> flip": v2.Compose(
            [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *last]
        ),
    }


def natural_images(n: int, height: int, width: int) -> torch.Tensor:
    """(n, 3, height, width) uint8: smooth, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, height // 8, width // 8, generator=generator)
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic")
    return (large * 255).clamp(0, 255).to(torch.uint8)


def measure(forms: dict, runs: int) -> dict[str, float]:
    seconds = {name: [] for name in forms}
    for run in range(runs + 2):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if run >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(chain, fused, batch, each) -> float:
    """The largest difference, in levels of uint8."""
    torch.manual_seed(0)
    expected = torch.stack([chain(image) for image in each])
    torch.manual_seed(0)
    return ((fused(batch) - expected).abs().amax((0, 2, 3)) * torch.tensor(STD) * 255).max().item()


def forms_of(chain, fused, batch, each) -> dict:
    return {
        "torchvision": lambda: [chain(image) for image in each],
        "fuse, one by one": lambda: [fused(image) for image in each],
        "fuse, batch": lambda: fused(batch),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    keep_memory()
    batch = natural_images(args.images, 375, 500)
    each = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in batch]
    threads = torch.get_num_threads()
    for name, chain in chains().items():
        fused = fuse(chain)
        difference = compare(chain, fused, batch, each)
        assert difference <= 1.05, f"{name}: {difference} levels"
        for _ in range(2000 // args.images):  # the bands of a crop's sizes are kept
            for image in each[:32]:
                fused(image)
        for count in (threads, 1):
            torch.set_num_threads(count)
            forms = forms_of(chain, fused, batch, each)
            times = measure(forms, args.runs)
            print(f"{name}, {count} threads (largest difference {difference:.2f} levels)")
            for form, seconds in times.items():
                ratio = times["torchvision"] / seconds
                print(f"  {form:18} {seconds / args.images * 1e3:7.3f} ms an image {ratio:6.2f}x")
        torch.set_num_threads(threads)
    tiny = torch.zeros(3, 8, 8, dtype=torch.uint8)
    small = v2.Compose([v2.Resize(4), *chains()["Resize(256) -> CenterCrop(224)"].transforms[2:]])
    fused = fuse(small)
    forms = {"torchvision": lambda: small(tiny), "fuse": lambda: fused(tiny)}
    times = measure(forms, 500)
    print(
        "one 8x8 image, what a call costs at least: "
        + ", ".join(f"{form} {seconds * 1e6:.0f} us" for form, seconds in times.items())
    )


if __name__ == "__main__":
    main()
