"""Keeps README.md's table equal to the JSON in results/. `python tests/test_readme.py` draws it."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- table: drawn from results/ by tests/test_readme.py -->\n", "<!-- end -->"


def row(name: str, score: dict, epochs: str = "", seconds: str = "") -> str:
    shares = (f"{100 * score[key]:.2f} %" for key in ("accuracy_0.95", "accuracy_0.99"))
    return f"| {name} | {' | '.join(shares)} | {score['psnr']:.2f} dB | {epochs} | {seconds} |\n"


def table() -> str:
    """One row for each training run in results/, between the floor and the ceiling."""
    runs = [
        json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("train-*.json"))
    ]
    text = "| | cosine >= 0.95 | >= 0.99 | PSNR | epochs | training |\n|---|---|---|---|---|---|\n"
    text += row("floor: one constant gray image", runs[0]["floor"])
    for run in sorted(runs, key=lambda run: run["test"]["mse"], reverse=True):
        test_name = run["data"]["test_name"]
        assert test_name == "cifar10", "the table is of CIFAR-10"
        seconds = f"{run['seconds']:.0f} s" if run["epochs"] else "none"
        text += row(f"`{run['environment']['command']}`", run["test"], run["epochs"], seconds)
    text += row("ceiling: the best rank-128 affine map", runs[0]["ceiling"])
    machine = runs[0]["environment"]
    text += (
        f"\n{runs[0]['data']['test']} test images of CIFAR-10; {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}.\n"
    )
    return text


def with_table(readme: str) -> str:
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={END})", lambda _: table(), readme)


def test_the_table_is_that_of_the_results():
    readme = README.read_text()
    assert BEGIN in readme
    assert readme == with_table(readme), "run: python tests/test_readme.py"


def test_there_are_two_commands_and_each_is_whole():
    lines = [x for x in README.read_text().splitlines() if x.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "train_fc.py" in lines[0]
    assert "pytest" in lines[1]
    assert all(".venv/bin/pip install -r" in line for line in lines)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
