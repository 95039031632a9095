"""README.md and results/README.md: their tables match results/, the results match the scripts, and
pictures, flags and commands exist."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from results import claims, ladder, tables
from tests.runs import ROOT, refused, run_script

READMES = [tables.README, tables.RESULTS / "README.md"]
RESULTS = sorted(tables.RESULTS.glob("*/*.json"))
SCRIPTS = ["train_fc.py", "train_cnn.py", "bench.py"]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_tables_match_the_results(path):
    text = path.read_text()
    names = {name for _, name, _ in tables.BLOCK.findall(text)}
    assert names
    assert all(hasattr(tables, name) or hasattr(claims, name) for name in names)
    assert text == tables.drawn(text), "run: python -m results.tables"


def test_results_come_from_one_code_without_changes():
    assert all(json.loads(path.read_text())["environment"]["clean"] for path in RESULTS)
    assert all(tables.commit(machine) for machine in (tables.MACHINE, tables.GPU))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_results_have_the_defaults_of_todays_scripts(path, monkeypatch):
    result = json.loads(path.read_text())
    script, *flags = shlex.split(result["environment"]["command"])
    if script not in SCRIPTS:
        pytest.skip("the ladder has no flags")
    named = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    today = parsed(script, flags, monkeypatch)
    machine = {"data_dir", "vgg_weights", "wandb", "device", "out"}
    for key in today.keys() - machine - named:
        recorded = result["args"][key]
        expected = str(today[key]) if script == "bench.py" else today[key]
        assert recorded == expected, key
    if script != "bench.py":
        assert f"`{tables.command(result)}`" in READMES[1].read_text()


def parsed(script: str, flags: list[str], monkeypatch) -> dict:
    """The flags as today's script reads them."""
    from common import cli

    class Parsed(Exception):
        pass

    def stop(parser, *names):
        raise Parsed(parser.parse_args())

    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    if script == "bench.py":
        return vars(module.flags())
    monkeypatch.setattr(cli, "parse", stop)
    with pytest.raises(Parsed) as found:
        module.main()
    return vars(found.value.args[0])


def test_pictures_exist():
    for path in READMES:
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", path.read_text())
        assert pictures
        assert all((path.parent / picture).is_file() for picture in pictures)


def test_two_complete_commands():
    commands = [
        x for x in tables.README.read_text().splitlines() if x.startswith("python3 -m venv")
    ]
    assert len(commands) == 2
    assert "train_fc.py" in commands[0]
    assert "pytest" in commands[1]
    assert all(".venv/bin/pip install -r" in command for command in commands)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_exist(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main()
    known = capsys.readouterr().out
    used = {
        flag
        for text in [path.read_text() for path in (*READMES, ROOT / "results" / "reproduce.sh")]
        for line in re.findall(
            rf"(?:python|nproc_per_node=\S+|\d|`) *\S* {script}([^\n`#|]*)", text
        )
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert used
    assert all(flag in known for flag in used)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder of reproduce.sh that is complete, and results/MACHINE/ of the same run."""
    environment = {"processor": "Some CPU", "instruction_sets": [], "gpu": None, "clean": True}
    content = json.dumps({"environment": environment, "args": {}})
    for path in ("bench/bench-some-cpu.json", "fc/metrics.json", "fc/loss.png", "fc/samples.png"):
        (tmp_path / "new" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / path).write_text(content)
    place = tmp_path / "results" / "some-cpu"
    place.mkdir(parents=True)
    for name in ("bench-some-cpu.json", "train-fc.json", "train-fc-loss.png"):
        (place / name).write_text("old")
    for name in ("README", "RESULTS"):
        monkeypatch.setattr(tables, name, tmp_path / ("new.md" if name == "README" else "results"))
    for path in (tables.README, tables.RESULTS / "README.md"):
        path.touch()
    return tmp_path / "new", place


def test_an_accuracy_is_that_of_the_most_images(monkeypatch):
    scored = [(600, 1.0), (10_000, 0.9991), (100, None)]
    rows = [
        {"name": "cnn", "images": images, "accuracy_0.95": share, "note": "weights of x"}
        for images, share in scored
    ]
    monkeypatch.setattr(tables, "bench", lambda machine: {"rows": rows})
    assert tables.right("cnn", "here") == "99.91 %"


def test_results_are_replaced(machine):
    folder, place = machine
    run_script(tables, folder)
    names = {"bench-some-cpu.json", "train-fc.json", "train-fc-loss.png", "train-fc-samples.png"}
    assert {path.name for path in place.iterdir()} == names
    assert (place / "train-fc.json").read_text() != "old"
    assert sorted(path.name for path in tables.RESULTS.iterdir()) == ["README.md", "some-cpu"]


@pytest.mark.parametrize("lost", ["bench", "fc", "fc/loss.png", ""])
def test_results_stay_where_the_new_ones_are_incomplete(machine, capsys, lost):
    folder, place = machine
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    assert "lacks" in refused(capsys, tables, folder)
    assert {path.read_text() for path in place.iterdir()} == {"old"}
    assert len(list(place.iterdir())) == 3


def test_ladder_needs_the_runs(capsys, tmp_path):
    assert "cnn/metrics.json" in refused(capsys, ladder, tmp_path)
    assert "folder" in refused(capsys, ladder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quik"], "--help"),
        (["--quick", "--gpu"], "--help"),
        (["--gpu"], "git checkout"),
        (["--quick"], "PYTHON="),
        (["--help"], ""),
    ],
)
def test_reproduce_says_what_it_needs_before_it_starts(tmp_path, flags, words):
    script = tmp_path / "results" / "reproduce.sh"  # outside of git, and without .venv
    script.parent.mkdir()
    shutil.copy(ROOT / "results" / "reproduce.sh", script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    environment |= {"PYTHON": "" if words == "PYTHON=" else sys.executable}
    done = subprocess.run(["bash", script, *flags], env=environment, capture_output=True, text=True)
    if words:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert "bash results/reproduce.sh --gpu" in done.stdout
        assert "set -euo" not in done.stdout
