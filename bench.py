"""Times the transform chain, the fused operator and the trained nets against each other, on the CPU
and on the GPU where there is one, with the error of each.

    python bench.py --runs 30                  nets: the newest under runs/, else untrained
    python bench.py --runs 30 --peers          other libraries too (requirements-peers.txt)
    python bench.py --fc runs/fc/best.pt --cnn runs/cnn/best.pt --device cpu
    python -m tests.manual.compare_bench A.json B.json     what changed between two runs

Protocol `report` is the report's: the chain image by image, the nets through a DataLoader in
batches of 100, copies to the device included; its figure is the mean. Protocol `tensor` takes
batches of a tensor that is on the device: of --batch-size, of 1,000 and of all images. Beside them:
the batch size from which on each net is faster than the chain ("crossover"), and fuse(chain) on
photographs for the chains of ImageNet ("chains").

How it times (common/timing.py): a row is bounded before it starts, by the time of a few images; its
result is compared with torchvision's; the rows run interleaved; a run is the mean of two passes at
different times (on a GPU: one pass); the table has the runs' median and interquartile range. A row
that takes long makes fewer passes, or takes fewer images; one that would take minutes is skipped,
and so is bfloat16 where the processor emulates it. On Linux the script starts Python anew, with a
setting of glibc (`glibc.restart`).

Leaves bench-MACHINE.json, the tables as Markdown, and three charts in --out. Fewer runs or images
than the defaults are marked. On two CPU cores with AVX-512 10 minutes, with --peers 14.
"""

if __name__ == "__main__":  # Ctrl-C during the imports ends the script without a traceback
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import UserError, checkpoints, cli, data, distributed, glibc, photos, report, tables
from common.cases import Method, against, assess, peer_cases, report_cases, sweep, tensor_cases
from common.models import ConvNet, FullyConnected, Linear, Separable, chain_matrix
from common.timing import BATCHED, SEQUENTIAL, add_ratios, check, measure, summary
from common.transforms import fused_transform, matmul_transform, reference_transform

STANDARD = {"runs": 30, "images": 10_000, "batch_size": 100}
BUDGET_S = 10  # for one row; beyond it a row makes fewer passes
NETS = {"fc": FullyConnected, "linear": Linear, "separable": Separable, "cnn": ConvNet}
PIXELS, OUTPUTS = 3 * 32 * 32, 28 * 28  # of an image and of its result


def main() -> None:
    args = flags()
    checkpoints.lock(args.out)
    devices = [torch.device(name) for name in distributed.devices(args.device)]
    warnings.filterwarnings("ignore", module="torch._dynamo")
    glibc.keep_memory()

    # --- images, ground truth, nets --------------------------------------------------------------
    data_name = data.choose(args.data, args.data_dir)
    images = data.images(data_name, args.data_dir, False, args.images, seed=0)
    reference = torch.cat([reference_transform(part) for part in images.split(1000)])
    nets = {name: trained(make, getattr(args, name, None)) for name, make in NETS.items()}
    environment = report.environment() | report.hardware()

    # --- what is timed: one case for each row of the table ---------------------------------------
    table = [method for device in devices for method in methods(images, device, nets)]
    for method in tqdm(table, "first calls", leave=False, disable=None):
        assess(method, table, args)
    cases = [case for device in devices for case in report_cases(images, device, table)]
    cases += [case for method in table for case in tensor_cases(method, args)]
    peers, absent = peer_cases(images, devices, args.batch_size) if args.peers else ([], [])

    # --- results first, then the clock -----------------------------------------------------------
    judge = against(reference)
    timings = [check(case, judge) for case in tqdm(cases + peers, "checking", disable=None)]
    photo_timings, lacking = photos.timings(devices, args)
    gc.collect()
    gc.freeze()  # else each collection before a pass takes 0.4 s, for what torch.compile has left
    # all together: a machine that is shared may be slow for a minute, and then for all rows
    measure([each for each in timings + photo_timings if not each.failed], args.runs, BUDGET_S)
    rows, chains = ([summary(each) for each in some] for some in (timings, photo_timings))
    add_ratios(rows)
    add_ratios(chains, photos.BASE, photos.PIL_BASE)
    growth = sweep(table, args)

    # --- JSON, tables, charts --------------------------------------------------------------------
    document = {
        "environment": environment,
        "args": {key: str(value) for key, value in vars(args).items()},
        "data": data_name,
        "standard": all(getattr(args, key) >= value for key, value in STANDARD.items()),
        "rows": sorted(rows, key=tables.order),
        "crossover": tables.crossovers(growth, list(NETS)),
        "chains": sorted(chains, key=tables.order),
        "growth": growth,
        "not_installed": absent + lacking,
    }
    machine = report.machine_name(environment, gpu=devices[-1].type == "cuda")
    tables.write(args.out / f"bench-{machine}", document)


def methods(images: Tensor, device: torch.device, nets: dict) -> list[Method]:
    """Everything that is compared on a device: each takes a batch of its source."""
    uint8 = images.to(device)
    x = data.to_float(uint8)
    copies = {each.dtype: torch.empty_like(each) for each in (x, uint8)}
    out = x.new_empty(len(x), 1, 28, 28)
    matrix = chain_matrix().to(device, torch.float32)

    def copying(batch: Tensor) -> Tensor:
        return copies[batch.dtype][: len(batch)].copy_(batch)

    def fused(batch: Tensor) -> Tensor:
        return fused_transform(batch, out=out[: len(batch)])

    def gemm(batch: Tensor) -> Tensor:
        return (batch.flatten(1) @ matrix).view(-1, 1, 28, 28)

    def sequential(batch: Tensor) -> Tensor:
        return reference_transform(batch[0])

    compiled = torch.compile(matmul_transform, dynamic=False)
    copied_bytes, uint8_bytes = 8 * PIXELS, PIXELS + 4 * OUTPUTS
    # name, source, step, kind, note, dtype, ...
    table = [
        Method("copy", x, copying, "part", "copy_ of the images", bytes_moved=copied_bytes),
        Method("copy uint8", uint8, copying, "part", "copy_ of the images", "uint8", 2 * PIXELS),
        Method("fused", x, fused, note="into out=", sweep=True),
        Method("fused uint8", uint8, fused, "chain", "into out=", "uint8", uint8_bytes),
        Method("matmul", x, matmul_transform, sweep=True),
        Method("matmul compiled", x, compiled, compiles=True),
        Method("gemm", x, gemm, note="one product with the chain's 3072 x 784 matrix"),
        Method(BATCHED, x, reference_transform, sweep=True),
        Method(SEQUENTIAL, x, sequential, largest=1, sweep=True),
    ]
    for name, (net, note) in nets.items():
        net = copy.deepcopy(net).to(device)
        largest = 1000 if name == "cnn" else len(x)  # its maps of 10,000 images take 10 GB
        table.append(Method(name, x, net, "net", note, largest=largest, sweep=True))
        if name == "separable":
            compiled = torch.compile(net, dynamic=False)
            table.append(Method("separable compiled", x, compiled, "net", note, compiles=True))
        if name in ("fc", "cnn"):
            half = in_bfloat16(net)
            name = f"{name} bf16"
            table.append(Method(name, x, half, "net", note, "bfloat16", largest=largest))
    return table


def in_bfloat16(net: nn.Module) -> Callable[[Tensor], Tensor]:
    half = copy.deepcopy(net).bfloat16()
    return lambda batch: half(batch.bfloat16())


def trained(make: Callable[[], nn.Module], path: str | None) -> tuple[nn.Module, str]:
    """The net from the checkpoint at `path`, else from the newest one under runs/ that fits and is
    of no dry run, else untrained; and a note that says which. Raises UserError for a bad `path`."""
    paths = list(Path("runs").rglob("best.pt"))
    paths.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    for each in [Path(path)] if path else paths:
        model = make().eval()
        try:
            state = checkpoints.load_checkpoint(each, model)
        except UserError:
            if path:
                raise
            continue
        flags = state.get("args") or {}
        if flags.get("dry_run") and not path:
            continue
        note = f"weights of {each}"
        if isinstance(model, ConvNet):  # whether it flips its input is no weight
            model.flip = flags.get("flip", "learned")
            note += f", flip {model.flip}"
        return model, note
    return make().eval(), "untrained"


def flags() -> argparse.Namespace:
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, newest = cli.number(int, 1), "(default: the newest under runs/, else untrained)"
    p.add_argument("--runs", type=count, default=30, help="runs of each row (default: %(default)s)")
    p.add_argument("--images", type=count, default=10_000, help="default: %(default)s")
    p.add_argument("--batch-size", type=count, default=100, help="default: %(default)s")
    cli.choice(p, "--device", "auto", "cpu", "cuda", note=", both")
    cli.data_flags(p)
    p.add_argument("--fc", type=cli.path, help=f"checkpoint of train_fc.py {newest}")
    p.add_argument("--cnn", type=cli.path, help=f"checkpoint of train_cnn.py {newest}")
    p.add_argument("--peers", action="store_true", help="time other libraries too")
    p.add_argument("--out", type=cli.path, help="default: runs/bench, or runs/bench-dry-run")
    p.add_argument("--dry-run", action="store_true", help="few images and runs, in seconds")
    args = p.parse_args()
    if args.dry_run:
        args.runs, args.images = min(args.runs, 2), min(args.images, 200)
    args.out = Path(args.out or ("runs/bench-dry-run" if args.dry_run else "runs/bench"))
    args.batch_size = min(args.batch_size, args.images)
    return args


if __name__ == "__main__":
    glibc.restart()
    cli.run(main)
