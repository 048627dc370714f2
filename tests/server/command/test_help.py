"""`--help` of every command of the repository teaches: what each argument is, and an example."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from server.command import COMMANDS
from tests.support import ROOT

Told = dict[str, list[dict[str, Any]]]

# What is said of a default alone does not say what the argument is.
_DEFAULT = re.compile(r"\(?default:? [^()]*\)?")


@pytest.fixture(scope="module")
def told() -> Told:
    """What each module's commands say, by the module; the module's own command comes first."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.commands"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "client", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Told = json.loads(done.stdout)
    return found


def test_all_commands_are_there(told: Told) -> None:
    of_slsnet = {command.module for command in COMMANDS.values()}
    assert of_slsnet < set(told)
    assert {"benchmarks.load", "slsnet_client.label_studio", "trt_build.calibrate"} < set(told)


def test_every_argument_says_what_it_is(told: Told) -> None:
    silent = [
        f"{command['program']} {argument['name']}"
        for commands in told.values()
        for command in commands
        for argument in command["arguments"]
        if not re.search(r"\w", _DEFAULT.sub("", argument["help"] or ""))
    ]
    assert not silent


def test_defaults_are_shown_as_they_are_given(told: Told) -> None:
    """Neither an empty one, nor Python's way to write a list."""
    wrong = [
        (command["program"], found)
        for commands in told.values()
        for command in commands
        for found in re.findall(
            r"\(default:?\s*[,)\[(].*|default:?\s+(?:None|inf)\b", command["text"]
        )
    ]
    assert not wrong


def test_help_fits_on_a_screen(told: Told) -> None:
    """A backslash that a docstring takes for its own makes one long line of two."""
    long = [
        (command["program"], line)
        for commands in told.values()
        for command in commands
        for line in command["text"].splitlines()
        if len(line) > 100
    ]
    assert not long


def test_every_command_shows_how_it_is_called(told: Told) -> None:
    names = {command.module: f"slsnet {name}" for name, command in COMMANDS.items()}
    for module, commands in told.items():
        own = module.removesuffix(".__main__")
        called = [f"python -m {own}", names.get(module, f"python -m {own}")]
        if module == "photos.native.wheels":
            called = ["python photos/native/wheels.py"]
        if module == "server.command":
            continue
        whole, *below = commands
        said = {command["program"]: _after_usage(command["text"]) for command in commands}
        assert any(f"{name} " in said[whole["program"]] for name in called), module
        for command in below:
            end = command["program"].rpartition(" ")[2]
            text = said[whole["program"]] + said[command["program"]]
            assert any(f"{name} {end} " in text for name in called), command["program"]


def test_every_subcommand_has_a_summary(told: Told) -> None:
    below = [(c["program"], b) for cs in told.values() for c in cs for b in c["below"]]
    assert [name for name, entry in below if not entry["summary"]] == []


def _after_usage(text: str) -> str:
    """In one line, as a command may go on in the next."""
    return " ".join(text.partition("\n\n")[2].replace("\\\n", " ").split()).replace("`", " ")
