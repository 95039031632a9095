"""Training steps per second of the CNN, with MSE and with the perceptual loss, on this CPU: the
plain modules, the same under torch.compile, and the fast path of common/fast_cpu.py.

    python -m tests.manual.cnn_step                     bfloat16 where the processor has it
    python -m tests.manual.cnn_step --dtype float32 --vgg-size 64 --compile

The rows run in turns within one run; the gradients of plain and fast are compared first.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from common import fast_cpu
from common.models import ConvNet
from common.perceptual import PerceptualLoss


def training_step(net, loss_fn, images, target, dtype, fast) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)

    def step() -> None:
        fast_cpu.enable(fast)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_fn(net(images), target)
        loss.backward()
        optimizer.step()

    return step


def rounds(title: str, steps: dict[str, Callable], images: int, seconds: float) -> None:
    """Runs the steps in turns for `seconds` after one warm-up each and prints medians."""
    taken = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["plain"]) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    plain = median(taken["plain"])
    for name, values in taken.items():
        middle = median(values)
        print(
            f"{title:12} {name:8} median_ms:{1e3 * middle:.0f} min_ms:{1e3 * min(values):.0f} "
            f"images_per_s:{images / middle:.1f} speedup:{plain / middle:.2f} n:{len(values)}",
            flush=True,
        )


def compare(title: str, net, loss_fn, images, target, dtype) -> None:
    """Prints how far the fast gradient is from the plain one, dropout aside."""
    grads, net = [], copy.deepcopy(net).eval()
    for fast in (False, True):
        net.zero_grad()
        fast_cpu.enable(fast)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_fn(net(images), target)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    print(f"{title:12} gradients differ by {error:.1e} of their norm; {fast_cpu.status()}")


def main() -> None:
    native = "bfloat16" if fast_cpu._native_bf16() else "float32"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=native)
    parser.add_argument("--weights", default="random", help="of the VGG: random, imagenet or PATH")
    parser.add_argument("--batch-size", type=int, default=64, help="of the CNN with MSE")
    parser.add_argument("--vgg-batch-size", type=int, default=8, help="0: without the VGG")
    parser.add_argument("--vgg-size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=30, help="for each of the two losses")
    parser.add_argument("--compile", action="store_true", help="a row with torch.compile")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}")
    torch.manual_seed(0)
    cases = {"mse": (F.mse_loss, args.batch_size)}
    if args.vgg_batch_size:
        perceptual = PerceptualLoss(args.weights, args.vgg_size)
        cases["perceptual"] = perceptual, args.vgg_batch_size
    for title, (loss_fn, n) in cases.items():
        batch = torch.rand(n, 3, 32, 32), torch.rand(n, 1, 28, 28), dtype
        compare(title, ConvNet(), loss_fn, *batch)
        steps = {
            "plain": training_step(ConvNet(), loss_fn, *batch, False),
            "fast": training_step(ConvNet(), loss_fn, *batch, True),
        }
        if args.compile:
            compiled = torch.compile(ConvNet()), torch.compile(loss_fn)
            steps["compiled"] = training_step(*compiled, *batch, False)
        rounds(title, steps, n, args.seconds)


if __name__ == "__main__":
    main()
