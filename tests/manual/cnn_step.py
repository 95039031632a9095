"""Training steps per second of the CNN and of its perceptual loss on the CPU, plain against fast,
in turns within one run: python -m tests.measure_cnn_step [--weights PATH]

"Plain" is what one writes first, with nothing but torch and torchvision, in channels_last under
autocast; the tests compare the same two functions by value.
"""

import argparse
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg

from common.models import ConvNet
from common.perceptual import PerceptualLoss, load_vgg16

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)


def plain_net() -> nn.Sequential:
    """The report's section 2.1, for (N, 3, 32, 32) images in channels_last."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 4, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 4, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(64, 64, 4, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        nn.Conv2d(64, 1, 4, padding=1),
    ).to(memory_format=torch.channels_last)


def plain_features(weights: str) -> nn.Sequential:
    """torchvision's vgg16().features up to layer 28, frozen, its ReLUs not in place."""
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    state = load_vgg16(weights)
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    for module in features:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    features = features[:29].eval().requires_grad_(False)
    return features.to(memory_format=torch.channels_last)


def plain_perceptual(features: nn.Module, output: Tensor, target: Tensor, size: int) -> list:
    """The six terms of the report's section 2.2."""

    def maps(images: Tensor) -> list[Tensor]:
        x = F.interpolate(images, size=size, mode="bilinear").expand(-1, 3, -1, -1)
        x = (x - MEAN.to(x.dtype)) / STD.to(x.dtype)
        taps = []
        for i, layer in enumerate(features):
            x = layer(x)
            if i in (2, 7, 14, 21, 28):
                taps.append(x)
        return taps

    with torch.no_grad():
        wanted = maps(target)
    terms = [F.mse_loss(a, b) for a, b in zip(maps(output), wanted, strict=True)]
    return [F.mse_loss(output, target), *terms]


def rounds(title: str, steps: dict, images: int, repeats: int) -> None:
    """Runs the steps in turns, once to warm up; prints medians and the first's over each."""
    seconds = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i:
                seconds[name].append(time.perf_counter() - start)
    base = median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle, least = median(values), min(values)
        print(
            f"{title} {name:12} median_ms:{1e3 * middle:.0f} min_ms:{1e3 * least:.0f} "
            f"images/s:{images / middle:.1f} ratio:{base / middle:.2f} n:{repeats}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="random", help="of the VGG: random, imagenet or PATH")
    parser.add_argument("--batch-size", type=int, default=128, help="of the CNN alone")
    parser.add_argument("--vgg-batch-size", type=int, default=16, help="0: leave the VGG out")
    parser.add_argument("--repeats", type=int, default=9, help="of the CNN's step")
    parser.add_argument("--vgg-repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    torch.manual_seed(0)

    def training_step(net: nn.Module, loss_fn, batch: int, bf16: bool):
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        images, target = torch.rand(batch, 3, 32, 32), torch.rand(batch, 1, 28, 28)
        images = images.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_fn(net(images), target)
            loss.backward()
            optimizer.step()

        return step

    n = args.batch_size
    steps = {
        "plain bf16": training_step(plain_net(), F.mse_loss, n, True),
        "fast bf16": training_step(ConvNet(), F.mse_loss, n, True),
        "fast fp32": training_step(ConvNet(), F.mse_loss, n, False),
    }
    rounds("cnn", steps, n, args.repeats)

    n = args.vgg_batch_size
    if n:
        features, loss_fn = plain_features(args.weights), PerceptualLoss(args.weights)

        def plain(output: Tensor, target: Tensor) -> Tensor:
            return sum(plain_perceptual(features, output, target, 224))

        steps = {
            "plain bf16": training_step(plain_net(), plain, n, True),
            "fast bf16": training_step(ConvNet(), loss_fn, n, True),
            "fast fp32": training_step(ConvNet(), loss_fn, n, False),
        }
        rounds("perceptual", steps, n, args.vgg_repeats)


if __name__ == "__main__":
    main()
