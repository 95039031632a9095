"""README.md and results/README.md: their tables match results/, the results match the scripts, and
pictures, flags and commands exist."""

import importlib
import json
import re
import shlex
import sys

import pytest

from results import claims, tables
from tests.runs import ROOT

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
