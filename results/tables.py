"""Writes the tables of README.md and results/README.md from the JSON files of one machine.

    python -m results.tables             from results/MACHINE/
    python -m results.tables FOLDER      first copies what reproduce.sh left in FOLDER there

The function NAME of this file or of results/claims.py returns the text between `<!-- NAME: ... -->`
and `<!-- end -->`. All files of a machine must come from the same code.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from common import UserError, cli, report, tables
from common.timing import BATCHED, SEQUENTIAL

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
MACHINE = "intel-xeon-avx512-bf16"  # the folders that the READMEs show
GPU = "nvidia-h200"
CODE = ("common", "csrc", "train_fc.py", "train_cnn.py", "bench.py")
BLOCK = re.compile(r"(?s)(<!-- (\w+): drawn by python -m results.tables -->\n).*?(<!--)")
SPEED = ("fused uint8", "fused", "matmul compiled", "separable compiled", "fc", BATCHED, SEQUENTIAL,
         "cnn")  # fmt: skip
SEEDS = ("fc", *(f"fc-seed{n}" for n in range(1, 5)))
PICTURES = {"fc": ("loss", "samples"), "cnn": ("samples",), "cnn-fixed-perceptual": ("samples",)}


# --- the files ---------------------------------------------------------------------------------


def collect(folder: Path) -> None:
    """Copies the results of one run of reproduce.sh to results/MACHINE/ of the machine they name.
    Raises UserError for uncommitted code, and where a file of results/MACHINE/ is missing."""
    if not (path := next((folder / "bench").glob("bench-*.json"), None)):
        raise UserError(f"{folder} lacks bench/bench-*.json: name a folder of reproduce.sh")
    environment = json.loads(path.read_text())["environment"]
    place = RESULTS / report.machine_name(environment, gpu=environment["gpu"] is not None)
    runs = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*/metrics.json"))}
    if not_clean := [path for path, run in runs.items() if not run["environment"]["clean"]]:
        raise UserError(f"{not_clean[0]} comes from code that was not committed")
    with tempfile.TemporaryDirectory(dir=RESULTS) as temporary:
        aside = Path(temporary, place.name)
        aside.mkdir()
        copy(folder, runs, aside)
        new, old = ({each.name for each in path.glob("*")} for path in (aside, place))
        if old - new:
            raise UserError(f"{folder} lacks {min(old - new)}: finish it with results/reproduce.sh")
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)


def copy(folder: Path, runs: dict[Path, dict], place: Path) -> None:
    """Writes the files of results/MACHINE/ to `place`, without paths of this machine."""
    for path, result in runs.items():
        for key in ("data_dir", "vgg_weights"):  # paths of this machine say nothing to others
            if str(result["args"].get(key)).startswith(("/", "~")):
                result["args"][key] = f"${'DATA_DIR' if key == 'data_dir' else 'VGG16_WEIGHTS'}"
        (place / f"train-{path.parent.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, pictures in PICTURES.items():
        for picture in pictures:
            if (path := folder / name / f"{picture}.png").exists():
                shutil.copy(path, place / f"train-{name}-{picture}.png")
    for path in [*folder.glob("ladder.*"), *(folder / "bench").glob("bench-*")]:
        shutil.copy(path, place)
        if path.suffix == ".json":
            text = re.sub(r'("data_dir": )"[/~].*?"', r'\1"$DATA_DIR"', path.read_text())
            (place / path.name).write_text(text)


@cache
def load(name: str, machine: str = MACHINE) -> dict:
    """The JSON of this name, or of the only one that fits, in a machine's folder."""
    (path,) = (RESULTS / machine).glob(f"{name}.json")
    return json.loads(path.read_text())


def run(name: str, machine: str = MACHINE) -> dict:
    """The metrics.json of a training run."""
    return load(f"train-{name}", machine)


def bench(machine: str = MACHINE) -> dict:
    return load("bench-*", machine)


def commit(machine: str = MACHINE) -> str:
    """The commits of a machine's files. Raises UserError where their code differs."""
    files = [json.loads(path.read_text()) for path in (RESULTS / machine).glob("*.json")]
    commits = sorted({each["environment"]["commit"] for each in files})
    for other in commits[1:]:
        diff = ["git", "diff", "--quiet", commits[0], other, "--", *CODE]
        if subprocess.run(diff, cwd=RESULTS.parent, capture_output=True).returncode == 1:
            raise UserError(f"results/{machine} mixes different code: run results/reproduce.sh")
    return ", ".join(each[:7] for each in commits)


def row(name: str, protocol: str, machine: str = MACHINE, waits: bool = True) -> dict:
    """The benchmark's timed row with this name and protocol, at its fastest batch size."""
    wanted = name, protocol, waits
    rows = bench(machine)["rows"]
    rows = [r for r in rows if (r["name"], r["protocol"], r["synchronised"]) == wanted]
    return min((r for r in rows if r["median_s"]), key=lambda r: r["us_per_image"])


# --- text --------------------------------------------------------------------------------------


def share(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def seconds(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 0}f} s"


def micros(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def command(result: dict) -> str:
    """The command of a run as a user gives it: without what reproduce.sh adds."""
    text = result["environment"]["command"]
    return re.sub(r" --(data cifar10|out \S+|resume auto|compare \S+|fc \S+|cnn \S+)", "", text)


def lines(*rows: list[str]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *body))


def place(machine: str = MACHINE) -> str:
    """Machine, versions and commit, for the line below a table."""
    e = bench(machine)["environment"]
    name = e["gpu"] or f"{e['processor']} ({e['instruction_sets'][-1]})"
    return f"{name}, {e['threads']} threads, torch {e['torch']}, commit {commit(machine)}"


# --- the blocks --------------------------------------------------------------------------------


def speed(machine: str = MACHINE, pipeline: str = "CPU pipeline") -> str:
    """Time per image in batches on the device, the fastest first; one denominator."""
    body = []
    rows = [row(name, "tensor", machine) for name in SPEED]
    for r in sorted(rows, key=lambda r: r["us_per_image"]):
        spread = f"{100 * r['iqr_s'] / r['median_s']:.0f} %"
        time = micros(r["us_per_image"])
        name = r["name"] + " (fixed flip)" * r["note"].endswith("flip fixed")
        ratio = f"{r['speedup']:.3g}"
        body.append([name, str(r["batch"]), time, spread, ratio, right(r["name"], machine)])
    head = [pipeline, "batch", "us per image", "IQR", f"times as fast as {BATCHED}",
            "cosine >= 0.95"]  # fmt: skip
    floor = share(run("fc")["floor"]["accuracy_0.95"])
    note = "Medians, each at its fastest batch size. A constant gray image gets"
    return f"{lines(head, *body)}\n{note} {floor}. {place(machine)}.\n"


def right(name: str, machine: str) -> str:
    """A method's share at cosine 0.95, of the most images on which the benchmark has scored it."""
    rows = (r for r in bench(machine)["rows"] if r["name"] == name)
    most = max(rows, key=lambda r: (r["accuracy_0.95"] is not None, r["images"]))
    return "untrained" if most["note"].startswith("untrained") else share(most["accuracy_0.95"])


def accuracy(machine: str = MACHINE) -> str:
    """One row for each training run, between the floor and the ceiling."""

    def cells(name: str, score: dict, *rest: str) -> list[str]:
        shares = (share(score[key]) for key in ("accuracy_0.95", "accuracy_0.99"))
        psnr = "" if score["psnr"] is None else f"{score['psnr']:.2f} dB"
        return [name, *shares, psnr, f"{score['max_abs_error']:.2g}", *(rest or ("", "", ""))]

    paths = sorted((RESULTS / machine).glob("train-*.json"))
    runs = sorted((load(path.stem, machine) for path in paths), key=lambda r: -r["test"]["mse"])
    body = [cells("floor: one constant gray image", run("fc")["floor"])]
    for each in runs:
        images = f"{each['data']['train']:,}"
        took = (str(each["epochs"]), images, seconds(each["seconds"])) if each["epochs"] else ()
        body.append(cells(f"`{command(each)}`", each["test"], *took))
    body.append(cells("ceiling: rank-128 PCA of the training targets", run("fc")["ceiling"]))
    head = ["", "cosine >= 0.95", ">= 0.99", "PSNR", "largest error", "epochs", "images",
            "training"]  # fmt: skip
    tested = run("fc", machine)["data"]["test"]
    return f"{lines(head, *body)}\n{tested:,} test images. {place(machine)}.\n"


def seeds() -> str:
    """The FC net over five seeds."""
    runs = [run(name) for name in SEEDS]
    body = []
    for label, value, form in (
        ("cosine >= 0.95", lambda r: 100 * r["test"]["accuracy_0.95"], "{:.2f} %"),
        ("cosine >= 0.99", lambda r: 100 * r["test"]["accuracy_0.99"], "{:.2f} %"),
        ("epochs", lambda r: r["epochs"], "{:.1f}"),
        ("seconds to 98 % of the validation images", lambda r: r["seconds_to_98"], "{:.2f} s"),
        ("seconds", lambda r: r["seconds"], "{:.0f} s"),
    ):
        values = [value(r) for r in runs]
        if None in values:  # a run may not reach 98 %
            continue
        spread = statistics.mean(values), statistics.stdev(values), min(values), max(values)
        body.append([label, *(form.format(each) for each in spread)])
    return lines(["FC net, five seeds", "mean", "standard deviation", "minimum", "maximum"], *body)


def ladder() -> str:
    """What each model costs and how near it comes."""
    head = ["", "weights", "multiplications", "images seen", "seconds", ">= 0.95", ">= 0.99", "MSE",
            "largest error", "us eager", "us compiled"]  # fmt: skip
    body = []
    for r in load("ladder")["rows"]:
        counts = [r.get(key) for key in ("parameters", "multiplications", "images_seen")]
        cells = ["" if n is None else f"{n:,}" for n in counts]
        cells.append(micros(r.get("seconds")))
        cells += [share(r["accuracy_0.95"]), share(r["accuracy_0.99"])]
        cells += [f"{r['mse']:.2g}", f"{r['max_abs_error']:.2g}"]
        cells += [micros(r.get("us_eager")), micros(r.get("us_compiled"))]
        body.append([r["name"], *cells])
    return lines(head, *body)


def crossovers() -> str:
    return bench_tables(lambda heading: heading.startswith("from which batch size"))


def chains() -> str:
    return bench_tables(lambda heading: "375 x 500" in heading)


def bench_tables(wanted, machine: str = MACHINE) -> str:
    sections = [s for s in tables.sections_of(bench(machine)) if wanted(s[0])]
    return "\n".join(f"{heading}:\n\n{lines(head, *rows)}" for heading, head, rows in sections)


def drawn(text: str) -> str:
    from results import claims  # which uses this module

    blocks = globals() | vars(claims)
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]]() + m[3], text)


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    if folder := parser.parse_args().folder:
        collect(folder)
    for path in (README, RESULTS / "README.md"):
        path.write_text(drawn(path.read_text()))


if __name__ == "__main__":
    cli.run(main)
