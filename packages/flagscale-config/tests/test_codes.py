"""Every code is in the registry, every example produces its code, and the pages show what is printed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flagscale_config
from flagscale_config import cli
from flagscale_config.codes import code_named, codes
from flagscale_config.errors import ConfigError

SOURCES = Path(flagscale_config.__file__).parent
ROOT = Path(__file__).resolve().parents[3]
CODES = codes()
SHOWN = [code for code in CODES.values() if code.words]


def codes_in(path: Path) -> set[str]:
    """Return every text of a module that has the form of a code."""
    texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return {
        text
        for text in texts
        if isinstance(text, str) and text.startswith("config/") and text.count(" ") == 0
    }


def test_every_code_in_the_sources_is_in_the_registry():
    used = set().union(*(codes_in(path) for path in SOURCES.rglob("*.py") if path.name != "codes.py"))
    assert used - {"config/"} - set(CODES) == set(), "add them to data/codes.toml, with an example"
    assert set(CODES) - used == set(), "nothing reports these codes any more"


def test_only_what_no_command_prints_lacks_an_example():
    assert [code.code for code in CODES.values() if not code.words] == ["config/migrate", "config/model"]


@pytest.mark.parametrize("code", SHOWN, ids=lambda code: code.code)
def test_the_example_of_a_code_produces_it(code, project, capsys):
    project(code.files or {"demo.yaml": ""})
    assert cli.main(code.words.split()) in {0, 2}
    captured = capsys.readouterr()
    assert f"[{code.code}]" in captured.out + captured.err


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.code)
def test_codes_are_explained_in_words(code, capsys):
    assert cli.main(["explain", code.code]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{code.code}: {code.title}\n")
    assert "What to do: " in out
    for text in (code.meaning, code.cure):
        assert text.endswith(".")


def test_a_code_may_be_misspelt():
    assert code_named("unknown-key") is code_named("config/unknown-key")
    with pytest.raises(ConfigError, match="did you mean config/unknown-key") as caught:
        code_named("unkown-key")
    assert caught.value.problems[0].suggestion == "config/unknown-key"


@pytest.mark.skipif(
    not (ROOT / "scripts/config_pages.py").is_file(), reason="not in a clone of the repository"
)
def test_the_documents_show_what_the_command_prints():
    script = ROOT / "scripts/config_pages.py"
    done = subprocess.run(
        [sys.executable, script, "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "FLAGSCALE_DEBUG": ""},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
