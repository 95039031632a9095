"""README.md: its tables match results/; its pictures, flags and commands exist."""

import importlib
import re
import sys

import pytest

from results import tables
from tests.runs import ROOT

README = ROOT / "README.md"


def test_tables_match_the_results():
    readme = README.read_text()
    assert {name for _, name, _ in tables.BLOCK.findall(readme)} == {"speed", "accuracy", "claims"}
    assert readme == tables.drawn(readme), "run: python -m results.tables"


def test_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text())
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_two_complete_commands():
    commands = [x for x in README.read_text().splitlines() if x.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "train_fc.py" in commands[0]
    assert "pytest" in commands[1]
    assert all(".venv/bin/pip install -r" in command for command in commands)


@pytest.mark.parametrize("script", ["train_fc.py", "train_cnn.py", "bench.py"])
def test_flags_exist(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main()
    known = capsys.readouterr().out
    used = {
        flag
        for line in re.findall(
            rf"(?:python|nproc_per_node=\S+) {script}([^\n`#|]*)", README.read_text()
        )
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert used
    assert all(flag in known for flag in used)
