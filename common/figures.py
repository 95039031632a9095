"""The figures of a training run: the loss over the epochs, a grid of samples."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoints import write
from common.data import Split
from common.metrics import cosine

# The agg backend needs no display. A script started from a notebook inherits MPLBACKEND, and
# matplotlib's import fails if that backend is not installed.
os.environ["MPLBACKEND"] = "agg"
from matplotlib import pyplot as plt


def save(figure: Any, path: Path) -> None:
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)


def loss_curve(
    path: Path, history: list[dict[str, Any]], best_epoch: int, stopped: bool, title: str
) -> None:
    """Training and validation loss over the epochs, log scale, with the best epoch and the early
    stop: the report's figure 1. `history`: the lines of history.jsonl."""
    epochs = [line["epoch"] for line in history]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(epochs, [line["train_loss"] for line in history], label="training", marker=".")
    axes.plot(epochs, [line["val_loss"] for line in history], label="validation", marker=".")
    best = history[best_epoch - 1]["val_loss"]
    axes.plot(
        best_epoch, best, "o", ms=11, mfc="none", c="black", label=f"kept: epoch {best_epoch}"
    )
    if stopped:
        axes.axvline(epochs[-1], c="gray", ls="--", label=f"early stop: epoch {epochs[-1]}")
    axes.set(yscale="log", xlabel="epoch", ylabel="loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, path)


def samples(path: Path, test: Split, outputs: dict[str, Tensor], title: str) -> None:
    """Input, ground truth, and each model's output and difference, for the best, the median and
    the worst images by the cosine of the first model: the report's figures 2 and 4.

    outputs: model name -> (N, 1, 28, 28) in the order of `test`.
    """
    cosines = {name: cosine(output, test.targets) for name, output in outputs.items()}
    order = next(iter(cosines.values())).argsort(descending=True).tolist()
    middle = len(order) // 2
    chosen = {"best": order[:3], "median": order[middle - 1 : middle + 2], "worst": order[-3:]}
    chosen = [(name, index) for name, group in chosen.items() for index in group]
    columns = 2 + 2 * len(outputs)
    figure, axes = plt.subplots(
        len(chosen), columns, figsize=(1.5 * columns + 0.4, 1.62 * len(chosen) + 0.6),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for row, (rank, index) in zip(axes, chosen, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
        row[0].imshow(test.images[index].permute(1, 2, 0).numpy(force=True))
        row[0].set_ylabel(rank)
        target = test.targets[index, 0].numpy(force=True)
        gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
        row[1].imshow(target, **gray)
        for i, (name, output) in enumerate(outputs.items()):
            image = output[index, 0].numpy(force=True)
            row[2 + 2 * i].imshow(image, **gray)
            row[2 + 2 * i].set_xlabel(f"cosine {cosines[name][index]:.4f}", fontsize=8)
            row[3 + 2 * i].imshow(image - target, cmap="RdBu", vmin=-0.3, vmax=0.3)
            worst = abs(image - target).max()
            row[3 + 2 * i].set_xlabel(f"at most {worst:.3f}", fontsize=8)
    titles = ["input", "ground truth"]
    for name in outputs:
        titles += [name, "difference (±0.3)"]
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
