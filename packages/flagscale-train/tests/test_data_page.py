"""The commands of docs/train/data.md, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs/train/data.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the page is in the repository, not in the package")
pytest.importorskip("tokenizers")


def test_the_blocks_of_the_page_run(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(PAGE.read_text(encoding="utf-8").split("\n\n")):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    # The command as it is installed elsewhere, from this interpreter.
    command = tmp_path / "bin" / "flagscale-train"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flagscale_train.cli "$@"\n')
    command.chmod(0o755)
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing remains") == 1
    assert done.stdout.count("both files have the checksums they were written with") == 2
