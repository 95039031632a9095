"""Checks fused_transform's speed targets on this CPU: `python -m tests.manual.fused`

Prints ratios of medians from interleaved runs, each with its target and "ok" or "MISSED".
`ATEN_CPU_CAPABILITY=avx2` or `=default` lowers the instruction set. Takes CIFAR-10 in $DATA_DIR (or
data/) as torchvision keeps it, else random images. tests/manual/fuse.py times chains on larger
images.
"""

import os
import statistics
import time

import torch
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as F

from common.transforms import fused_transform, matmul_transform, reference_transform


def medians(functions, runs, before=None):
    """{name: function} -> {name: median seconds}, in turns, each call behind one of `before`, or
    behind an untimed one of its own: the steady state of a pipeline."""
    times = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            (before or function)()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def show(what, value, target, at_least=False):
    verdict = "ok" if (value >= target if at_least else value <= target) else "MISSED"
    print(f"{what:58s} {value:8.2f}  ({'>=' if at_least else '<='} {target})  {verdict}")


def chain(images, size):
    out = F.rgb_to_grayscale(F.resize(images, size, antialias=True))
    return F.vertical_flip(F.horizontal_flip(out))


@torch.inference_mode()
def main():
    try:
        data = CIFAR10(os.environ.get("DATA_DIR", "data"), train=False).data
        uint8 = torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()
    except RuntimeError:
        print("random images: no CIFAR-10 in $DATA_DIR")
        uint8 = torch.randint(0, 256, (10000, 3, 32, 32), dtype=torch.uint8)
    x = uint8.float() / 255
    z, out, one = torch.empty_like(x), torch.empty(len(x), 1, 28, 28), x[:1].clone()
    # Inductor of torch 2.14 writes code for AVX2 and cannot compile it where torch may not use it
    default = os.environ.get("ATEN_CPU_CAPABILITY") == "default"
    compiled = matmul_transform if default else torch.compile(matmul_transform)
    level = os.environ.get("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {level}")

    batches, outs = x.split(100), out.split(100)
    t = medians(
        {
            "copy": lambda: z.copy_(x),
            "fused": lambda: fused_transform(x, out=out),
            "uint8": lambda: fused_transform(uint8, out=out),
            "batches": lambda: [
                fused_transform(b, out=o) for b, o in zip(batches, outs, strict=True)
            ],
            "matmul": lambda: [compiled(b) for b in x.split(1000)],
            "batched": lambda: [reference_transform(b) for b in batches],
        },
        30,
    )
    # of the bytes that each reads and writes: 3 x 32 x 32 + 28 x 28 floats, and twice the input
    share = (x.nbytes + out.nbytes) / (2 * x.nbytes) * t["copy"] / t["fused"]
    show("fused with out=: bytes a second, of those of copy_", share, 0.9, True)
    share = (uint8.nbytes + out.nbytes) / (2 * x.nbytes) * t["copy"] / t["uint8"]
    show("fused uint8: bytes a second, of those of copy_", share, 0.7, True)
    show("matmul compiled (batches of 1000) / fused", t["matmul"] / t["fused"], 2, True)
    show("torchvision (batches of 100) / fused", t["batched"] / t["fused"], 15, True)
    show("torchvision / fused, both in batches of 100", t["batched"] / t["batches"], 15, True)
    show("fused uint8 / fused float32", t["uint8"] / t["fused"], 0.5)

    other = torch.rand(2**28)
    t = medians(
        {
            "copy": lambda: z.copy_(x),
            "fused": lambda: fused_transform(x, out=out),
            "read": lambda: x.sum(),
        },
        10,
        other.sum,
    )
    fused, read = (t[name] / t["copy"] for name in ("fused", "read"))
    print(f"behind a gigabyte of other reads: fused / copy_ {fused:.2f}, x.sum() {read:.2f}")
    del other

    t = medians(
        {
            "sequential": lambda: [reference_transform(image) for image in x[:2000]],
            "fused": lambda: fused_transform(x, out=out),
            "one reference": lambda: [reference_transform(one) for _ in range(200)],
            "one": lambda: [fused_transform(one) for _ in range(200)],
        },
        10,
    )
    show(
        "torchvision image by image / fused",
        t["sequential"] * len(x) / 2000 / t["fused"],
        120,
        True,
    )
    show("one image: torchvision / fused", t["one reference"] / t["one"], 12, True)
    print(f"one image: {t['one reference'] * 5e3:.1f} us and {t['one'] * 5e3:.1f} us")

    for shape in ((1, 3, 1080, 1920), (64, 3, 256, 256)):
        images = torch.rand(shape)

        t = medians(
            {
                "torchvision": lambda images=images: chain(images, [224, 224]),
                "matmul": lambda images=images: compiled(images, (224, 224)),
                "fused": lambda images=images: fused_transform(images, (224, 224)),
            },
            20,
        )
        best = min(t["torchvision"], t["matmul"])
        show(f"{shape} -> 224: fused / the best of both", t["fused"] / best, 1)


if __name__ == "__main__":
    main()
