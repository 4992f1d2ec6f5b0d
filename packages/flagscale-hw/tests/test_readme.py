"""What the README shows is what happens: commands on faked hosts, and programs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is not beside these tests")


def shell(line, **options):
    """Run a line with our own command in PATH, whatever else is there."""
    folder = str(Path(sys.executable).parent)
    environ = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])}
    return subprocess.run(
        line, shell=True, capture_output=True, text=True, env=environ, timeout=120, check=False, **options
    )


def sessions():
    """Yield the commands on faked hosts, each with the output that is shown."""
    if not README.is_file():
        return
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", README.read_text(), re.MULTILINE):
        text = "\n".join(line[4:] for line in block.splitlines())
        for command, shown in re.findall(
            r"^\$ (flagscale-hw fake .*)\n((?:(?!\$ ).*\n?)*)", text, re.MULTILINE
        ):
            yield command, shown.strip()


@pytest.mark.parametrize(("command", "shown"), list(sessions()))
def test_commands_print_what_is_shown(command, shown):
    said = shell(command).stdout
    lines = [line.rstrip() for line in said.strip().splitlines()]
    expected = [line.rstrip() for line in shown.splitlines()]
    if expected[-1] == "...":
        assert [line for line in lines if line in expected] == expected[:-1]
    else:
        assert lines == expected


def test_there_are_commands_to_check():
    assert len(list(sessions())) >= 5


def programs():
    if not README.is_file():
        return []
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [text for text in found if "launch" not in text]  # runs are shown by tests of their own


@pytest.mark.parametrize("text", programs())
def test_programs_run(text, tmp_path):
    (tmp_path / "program.py").write_text(text)
    done = shell(f'"{sys.executable}" program.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
