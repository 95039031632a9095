"""Writes the tables of README.md from the JSON files in results/: `python -m results.tables`. The
function NAME returns the text between `<!-- NAME: ... -->` and `<!-- end -->`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "results"
BLOCK = re.compile(r"(?s)(<!-- (\w+): drawn by python -m results.tables -->\n).*?(<!--)")
CHAIN, BATCHED = "torchvision sequential", "torchvision batched"
SPEED = ("fused uint8", "fused", "matmul compiled", "separable", "fc", BATCHED, "cnn")


def run(name: str) -> dict:
    """The metrics.json of a training run."""
    return json.loads((RESULTS / f"train-{name}.json").read_text())


def bench() -> dict:
    """The benchmark; results/ holds that of one machine."""
    (path,) = RESULTS.glob("bench-*.json")
    return json.loads(path.read_text())


def row(name: str, protocol: str) -> dict:
    """The benchmark's timed row with this name and protocol, at its fastest batch size."""
    rows = [r for r in bench()["rows"] if (r["name"], r["protocol"]) == (name, protocol)]
    rows = [r for r in rows if r["median_s"]]
    return min(rows, key=lambda r: r["us_per_image"])


def share(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def seconds(value: float) -> str:
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 0}f} s"


def machine(result: dict) -> str:
    e = result["environment"]
    sets = e.get("instruction_sets") or (["AMX"] if e.get("amx") else [])
    name = " with ".join([e["processor"], *sets[-1:]])
    return f"{name}, {e['threads']} threads, torch {e['torch']}"


def commits(*results: dict) -> str:
    return "commit " + ", ".join(sorted({r["environment"]["commit"][:7] for r in results}))


def lines(*rows: list[str]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *body))


# --- the blocks --------------------------------------------------------------------------------


def speed() -> str:
    """Time per image in batches on the device, the fastest first; one denominator."""
    names = (*SPEED, CHAIN)
    best = sorted((row(name, "tensor") for name in names), key=lambda r: r["us_per_image"])
    body = []
    for r in best:
        spread = f"{100 * r['iqr_s'] / r['median_s']:.0f} %"
        known = r["accuracy_0.95"] is not None and r["note"] != "untrained"
        right = share(r["accuracy_0.95"]) if known else ""
        micros = r["us_per_image"]
        time = f"{micros:,.0f}" if micros >= 100 else f"{micros:.3g}"
        times = f"{r['speedup']:.3g}"
        body.append([r["name"], str(r["batch"]), time, spread, times, right])
    head = ["CPU pipeline", "batch", "us per image", "IQR", f"times as fast as {BATCHED}",
            "cosine >= 0.95"]  # fmt: skip
    floor = run("fc")["floor"]["accuracy_0.95"]
    return (
        lines(head, *body)
        + f"\nMedians, each at its fastest batch size. A constant image gets {share(floor)}. "
        + f"{machine(bench())}, {commits(bench())}.\n"
    )


def accuracy() -> str:
    """One row for each training run in results/, between the floor and the ceiling."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("train-*.json"))]

    def cells(name: str, score: dict, *rest: str) -> list[str]:
        shares = (share(score[key]) for key in ("accuracy_0.95", "accuracy_0.99"))
        return [name, *shares, f"{score['psnr']:.2f} dB", *(rest or ("", ""))]

    runs.sort(key=lambda r: r["test"]["mse"], reverse=True)
    letters = dict(zip(dict.fromkeys(map(machine, runs)), "ABCDEF", strict=False))
    body = [cells("floor: one constant gray image", run("fc")["floor"])]
    for each in runs:
        assert each["data"]["test_name"] == "cifar10", "the table is of CIFAR-10"
        took = f"{each['seconds']:.0f} s, {letters[machine(each)]}" if each["epochs"] else "none"
        command = f"`{each['environment']['command'].replace(' --data cifar10', '')}`"
        body.append(cells(command, each["test"], str(each["epochs"]), took))
    body.append(cells("ceiling: the best rank-128 affine map", run("fc")["ceiling"]))
    where = (
        f"{letter}: {name}, {commits(*(each for each in runs if machine(each) == name))}"
        for name, letter in letters.items()
    )
    return (
        lines(["", "cosine >= 0.95", ">= 0.99", "PSNR", "epochs", "training"], *body)
        + f"\n{run('fc')['data']['test']} test images of CIFAR-10. {'; '.join(where)}.\n"
    )


def claims() -> str:
    """Each claim of the report with the measurement of this project."""
    fc, window, closed = run("fc"), run("fc-window"), run("fc-closed-form")
    learned, fixed = run("cnn-learned"), run("cnn-fixed")
    chain, net, cnn = (row(name, "report") for name in (CHAIN, "fc", "cnn"))
    slower = f"{cnn['mean_s'] / chain['mean_s']:.2g} times the chain's time"
    loader, batched = row("copy", "report"), row(BATCHED, "report")
    fused = row("fused", "report")
    both = run("cnn-fixed-perceptual-bf16")
    mse = both["others"]["CNN, MSE"]
    terms = [f"vgg{layer}" for layer in (2, 7, 14, 21, 28)]
    distance = {
        "perceptual": sum(both["test_terms"][term] for term in terms),
        "mse": sum(mse["terms"][term] for term in terms),
    }
    rate = both["epochs"] * both["data"]["train"] / both["seconds"]
    rows = [
        (
            "1: the FC net is over 98 % right at cosine 0.95",
            "98 %",
            share(fc["test"]["accuracy_0.95"]),
            "`python train_fc.py`",
            f"holds after {seconds(fc['seconds_to_98'])} of training, and says little: a constant "
            f"gray image gets "
            f"{share(fc['floor']['accuracy_0.95'])}, the closed form without training "
            f"{share(closed['test']['accuracy_0.95'])}",
        ),
        (
            "1.3: stop when 10 epochs bring no 0.000001",
            "",
            f"epoch {fc['epochs']}, {fc['seconds']:.0f} s, MSE {fc['test']['mse']:.4g}",
            "`python train_fc.py`",
            f"holds: keeps epoch {fc['best_epoch']}",
        ),
        (
            "1.3: the variant, 10 epochs ago less the largest since",
            "",
            f"epoch {window['epochs']}, {window['seconds']:.0f} s, MSE {window['test']['mse']:.4g}",
            "`python train_fc.py --stop-rule window`",
            f"same run, {window['epochs'] - fc['epochs']:+d} epochs; keeps epoch "
            f"{window['best_epoch']}",
        ),
        (
            "1.4.1: the chain on the CPU",
            "0.754336 s",
            seconds(chain["mean_s"]),
            "`python bench.py`",
            "image by image: mostly Python and dispatch. In batches of 100 the same chain takes "
            f"{seconds(batched['mean_s'])}, the loader included",
        ),
        (
            "1.4.1: the FC net on the CPU",
            "0.13146 s",
            seconds(net["mean_s"]),
            "`python bench.py`",
            f"{chain['mean_s'] / net['mean_s']:.2g} times as fast as the chain image by image, "
            f"{batched['mean_s'] / net['mean_s']:.2g} times as the chain in the loader's batches; "
            f"of it {seconds(loader['mean_s'])} are the "
            f"loader. The fused operator in its place: {seconds(fused['mean_s'])}, and exact",
        ),
        (
            "1.4.1: the FC net on the GPU",
            "0.139562 s",
            "not measured",
            "",
            "no faster than the report's CPU, which points to the loader and not to the net",
        ),
        (
            "2: the CNN's flips come from the network as a whole",
            "",
            f"{share(learned['test']['accuracy_0.95'])}; fixed flip "
            f"{share(fixed['test']['accuracy_0.95'])}",
            "`python train_cnn.py`, `--flip fixed`",
            "cannot hold: an output pixel sees 13 x 13 input pixels. A constant image gets "
            f"{share(learned['floor']['accuracy_0.95'])}",
        ),
        (
            "2.2.1: the CNN on the CPU",
            "2.900498 s; perceptual 2.635234 s",
            seconds(cnn["mean_s"]),
            "`python bench.py`",
            f"{slower}; the loss it was trained with changes nothing",
        ),
        (
            "2.2.1: the CNN on the GPU",
            "0.587102 s; perceptual 0.594008 s",
            "not measured",
            "",
            "",
        ),
        (
            "2: slower than all transforms in sequence on the CPU",
            "with perceptual loss",
            slower,
            "`python bench.py`",
            "holds on a CPU, with either loss"
            if cnn["mean_s"] > chain["mean_s"]
            else "does not hold on this CPU",
        ),
        (
            "2.2.1: 50 minutes an epoch with perceptual loss",
            "RTX 4070, 224 px",
            f"{rate:.0f} images/s at {both['args']['vgg_size']} px on {machine(both)}",
            f"`{both['environment']['command']}`",
            "not measured on a GPU",
        ),
        (
            "2: the perceptual loss is much stronger",
            "",
            f"PSNR {both['test']['psnr']:.2f} dB against {mse['psnr']:.2f} dB with MSE alone; "
            f"VGG distance {distance['perceptual']:.3g} against {distance['mse']:.3g}",
            f"`{both['environment']['command']}`",
            f"cosine 0.95: {share(both['test']['accuracy_0.95'])} against "
            f"{share(mse['accuracy_0.95'])}, both with the fixed flip",
        ),
    ]
    return lines(["claim", "report", "here", "command", "verdict"], *map(list, rows))


def drawn(readme: str) -> str:
    return BLOCK.sub(lambda m: m[1] + globals()[m[2]]() + m[3], readme)


if __name__ == "__main__":
    README.write_text(drawn(README.read_text()))
