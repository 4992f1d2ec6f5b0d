"""Every command of the README runs."""

from __future__ import annotations

import os
import re
import shlex
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from unittest import mock

import flagscale_serve


def readme() -> str:
    beside = Path(__file__).parent.parent / "README.md"
    if beside.is_file():
        return beside.read_text()
    try:
        return metadata("flagscale-serve").get_payload()  # of the installed wheel
    except PackageNotFoundError:
        raise AssertionError("neither the README nor the installed package is here") from None


def test_the_commands_run_in_order(shell, model_dir):
    (shell.home / "tiny-qwen3").symlink_to(model_dir)
    (shell.home / "prompts.jsonl").write_text('{"prompt": "one"}\n' * 3)
    commands = re.findall(r"^\$ flagscale-serve (.*)$", readme(), re.MULTILINE)
    assert len(commands) >= 9
    for command in commands:
        done = shell(*shlex.split(command))
        if command.startswith(("run qwen3", "status qwen3")) and "no such model directory" in done.stderr:
            # Recipes are found through entry points, which a source tree on the path does not have.
            continue
        if command == "stop" and "no service is running" in done.stderr:
            continue
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_python_runs(shell, model_dir, capsys, monkeypatch):
    (shell.home / "tiny-qwen3").symlink_to(model_dir)
    monkeypatch.chdir(shell.home)
    (code,) = re.findall(r"```python\n(.*?)```", readme(), re.DOTALL)
    with mock.patch.dict(os.environ, shell.env):
        exec(code, {})
    assert capsys.readouterr().out.startswith("user=Hello t=0 n=512 m=tiny-qwen3")
    assert flagscale_serve.plan is not None


def test_the_application_is_planned(shell):
    (text,) = re.findall(r"```yaml\n(.*?)```", readme(), re.DOTALL)
    (shell.home / "application.yaml").write_text(text)
    classes = [
        f"class {name}:\n    def forward(self, text):\n        return text\n" for name in ("Clean", "Tell")
    ]
    (shell.home / "mine.py").write_text("\n\n".join(classes))
    done = shell("plan", "application.yaml")
    assert done.returncode == 0, done.stderr
    assert "tell <- clean" in done.stdout
