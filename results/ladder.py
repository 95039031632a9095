"""The ladder: from a constant image to the chain itself, what each model costs and how near it
comes. `python -m results.ladder FOLDER` takes the trained nets from the runs in FOLDER (their names
are in `RUNS`), fits the closed forms of Separable, scores all of them on the CIFAR-10 test set,
times them in turns, and writes ladder.json and ladder.png there.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import UserError, checkpoints, cli, data, metrics, report
from common.cases import against
from common.figures import plt, save
from common.glibc import keep_memory
from common.models import ConvNet, FullyConnected, Linear, Separable, separable_closed_form_
from common.timing import Case, check, measure
from common.transforms import _resize_matrix, matmul_transform, reference_transform

RUNS = {  # row -> the run's folder and its net
    "CNN, learned flips": ("cnn", ConvNet("learned")),
    "CNN behind a fixed flip": ("cnn-fixed", ConvNet("fixed")),
    "FC, trained": ("fc", FullyConnected()),
    "FC, closed form": ("fc-closed-form", FullyConnected()),
    "Linear, trained": ("fc-linear", Linear()),
    "Linear, closed form": ("fc-linear-closed-form", Linear()),
    "Separable, trained": ("fc-separable", Separable()),
}
PHOTOGRAPHS = (12, 14, 16)  # that Separable's closed form is fitted to
TAPS = int((_resize_matrix(32, 28, True, torch.float64, torch.device("cpu")) != 0).sum())
MULTIPLICATIONS = {  # for one image
    ConvNet: 16 * 64 * (31**2 * 3 + 30**2 * 64 + 29**2 * 64 + 28**2),
    FullyConnected: 3072 * 128 + 128 * 784,
    Linear: 3072 * 784,
    Separable: 3 * 1024 + 28 * 32 * 32 + 28 * 32 * 28,
}
CHAIN_MULTIPLICATIONS = 3 * 1024 + TAPS * 32 + TAPS * 28
BATCH = {ConvNet: 100}  # 1,000 for the others
SLOW_RUNS, BUDGET_S = 9, 2


def scored(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Any]:
    """The score on the test set, and what the architecture alone says."""
    with torch.inference_mode():
        outputs = torch.cat([model(data.to_float(part)) for part in images.split(500)])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiplications": MULTIPLICATIONS[type(model)],
        **metrics.score(outputs, targets),
    }


def fitted(images: Tensor) -> tuple[Separable, float]:
    """Separable from its closed form on all of `images`, and the seconds that took."""
    model, start = Separable(), time.perf_counter()
    separable_closed_form_(model, images, reference_transform(images))
    return model, time.perf_counter() - start


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """The ladder without times; the test images and their targets. Raises UserError."""
    for name, _ in RUNS.values():
        for path in (folder / name / "metrics.json", folder / name / "best.pt"):
            if not path.exists():
                raise UserError(f"there is no {path}: name a folder of results/reproduce.sh")
    run = json.loads((folder / "fc" / "metrics.json").read_text())
    source = run["data"]["test_name"], run["args"]["data_dir"]
    test = data.images(*source, False, run["data"]["test"], seed=0)
    train = data.images(*source, True, PHOTOGRAPHS[-1], seed=0)
    targets = torch.cat([reference_transform(part) for part in test.split(1000)])
    exact = torch.cat([reference_transform(part.double() / 255) for part in test.split(1000)])
    rows = [{"name": "constant gray image", "parameters": 1, "multiplications": 0, **run["floor"]}]
    for name, (run_folder, model) in RUNS.items():
        run = json.loads((folder / run_folder / "metrics.json").read_text())
        checkpoints.load_checkpoint(folder / run_folder / "best.pt", model)
        seen = run["data"]["train"] if run["epochs"] else 0
        if run_folder == "fc-closed-form":  # it takes the targets' principal directions
            seen = run["data"]["train"]
        facts = {"images_seen": seen, "seconds": run["seconds"], "epochs": run["epochs"]}
        rows.append({"name": name, "net": type(model).__name__, **facts})
        rows[-1] |= scored(model.eval(), test, targets)
    noise = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    sources = [(f"{n} photographs", train[:n]) for n in PHOTOGRAPHS]
    for source, images in [*sources, ("16 images of noise", noise)]:
        model, seconds = fitted(images)
        rows.append({"name": f"Separable from {source}", "net": "Separable"})
        rows[-1] |= {"images_seen": len(images), "seconds": seconds, "epochs": 0}
        rows[-1] |= scored(model, test, targets)
    chain = {"name": "the chain", "net": "chain", "multiplications": CHAIN_MULTIPLICATIONS}
    rows.append(chain | metrics.score(targets, exact.float()))
    rows[-1]["max_abs_error"] = (targets - exact).abs().max().item()
    return rows, test, targets


def times(images: Tensor, targets: Tensor) -> dict[str, dict[str, float | None]]:
    """Microseconds for an image of each architecture, eager and compiled: medians of passes in
    turns over batches of 1,000 (CNN: 100, 1,000 images)."""
    x = data.to_float(images)
    nets = {type(net): net.eval() for _, net in RUNS.values()}
    steps = {kind.__name__: (net, net, BATCH.get(kind, 1000)) for kind, net in nets.items()}
    steps["chain"] = (reference_transform, matmul_transform, 1000)
    cases = []
    for name, (eager, compiled, batch) in steps.items():
        part = x[: 10 * batch]
        fast = torch.compile(compiled, dynamic=False)
        for kind, step in (("eager", eager), ("compiled", fast)):

            def run(step=step, part=part, batch=batch):
                return map(step, part.split(batch))

            cases.append(Case(name, "cpu", "tensor", kind, batch, len(part), run, kind="net"))
    timings = [check(case, against(targets)) for case in cases]
    measure([each for each in timings if not each.failed], SLOW_RUNS, BUDGET_S)
    found: dict[str, dict] = {}
    for each in timings:
        median = sorted(each.times)[len(each.times) // 2] if each.times else None
        micros = 1e6 * median / each.case.images if median else None
        found.setdefault(each.case.name, {})[f"us_{each.case.dtype}"] = micros
    return found


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """RMS error against the number of weights, both logarithmic, with a line up to the largest
    error. The dotted line is the chain in float32 against float64."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    learned = [row for row in rows if row.get("net") != "chain"]
    for index, row in enumerate(learned):
        low, high = row["mse"] ** 0.5, row["max_abs_error"]
        # closed forms and trained nets of one architecture stand beside each other
        x = row["parameters"] * 1.12 ** (index % 5 - 2)
        color = plt.cm.tab20(index)
        axes.plot([x, x], [low, high], color=color, lw=1.5)
        axes.plot(x, low, "o", color=color, label=row["name"])
        axes.plot(x, high, "_", color=color, ms=9)
    chain = rows[-1]["max_abs_error"]
    axes.axhline(chain, color="gray", ls=":", label="the chain in float32")
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="error of a pixel in [0, 1]")
    axes.set_title("RMS error (dot) and largest error (bar) on the CIFAR-10 test set")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    keep_memory()
    torch.manual_seed(0)
    rows, *test = rows_of(folder)
    found = times(*test)
    rows = [row | found.get(row.get("net"), {}) for row in rows]
    document = {"environment": report.environment(), "rows": rows}
    checkpoints.write_text(folder / "ladder.json", json.dumps(document, indent=1) + "\n")
    draw(folder / "ladder.png", rows)


if __name__ == "__main__":
    cli.run(main)
