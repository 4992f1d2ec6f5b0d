"""Write the documents of flagscale-config whose content is what its command prints.

    python scripts/config_pages.py            write docs/config/errors/, the recorded terminal, and the output
                                              of the commands in docs/config/index.md and the package's README
    python scripts/config_pages.py --check    compare instead; exit code 1 when something differs

Every command is run on a terminal of its own, in a directory that holds the files shown before it. Needs the
package installed; rich only to write the recorded terminal, not to check it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import html
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping
from pathlib import Path

import flagscale_config.loader  # noqa: F401  once, for all commands
from flagscale_config.cli import main
from flagscale_config.codes import codes

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/config"
PAGES = (FOLDER / "index.md", ROOT / "packages/flagscale-config/README.md")
RECORDING = FOLDER / "errors.svg"
HOME = "/home/me/project"
"""Stands for the directory in which the commands ran."""
_COLUMNS = 132
_BLOCK = re.compile(r"^```(?P<kind>yaml|console)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"\A# (?P<name>\S+\.yaml)\n")
_THREE_ERRORS = {
    "conf/tiny.yaml": """\
defaults: [_self_, {train: tiny}]
experiment:
  exp_name: tiny
  exp_dir: outputs/tiny
  task: {type: train}
  runner: {nnodes: 1, nproc_per_node: 8}
""",
    "conf/train/tiny.yaml": """\
system:
  tensor_model_paralel_size: 2
  micro_batch_size: 2
model:
  num_layers: 4
  hidden_size: 256
  num_attention_heads: 4
  seq_length: 512
  max_position_embeddings: 512
  global_batch_size: 18
  train_iters: 100
data:
  mock_data: true
lr: 3e-4
""",
}


def on_terminal(command: str, folder: Path, **settings: str) -> str:
    """Run a command line in a terminal and return what the terminal shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, _COLUMNS, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {
        **kept,
        "PATH": path,
        "TERM": "xterm-256color",
        "COLUMNS": str(_COLUMNS),
        "LC_ALL": "C.UTF-8",
        **settings,
    }
    child = os.fork()  # starting Python for each of many commands would take most of the time
    if child == 0:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
        for stream in (0, 1, 2):
            os.dup2(slave, stream)
        os._exit(_run(command))
    os.close(slave)
    parts = []
    with contextlib.suppress(OSError):  # Linux ends a terminal by an error
        while part := os.read(master, 65536):
            parts.append(part)
    os.close(master)
    os.waitpid(child, 0)
    return b"".join(parts).decode().replace("\r\n", "\n").replace(str(folder.resolve()), HOME)


def _run(command: str) -> int:
    """Run a command line in this process where it is ours alone, else by a shell."""
    words = shlex.split(command)
    if words[0] != "flagscale-config" or set(words) & {"|", ">"}:
        return subprocess.run(["sh", "-c", command], check=False).returncode
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    code = main(words[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def ran(text: str) -> str:
    """Return a document with the output of its commands as they print it now.

    A block of YAML that starts with `# some/file.yaml` is that file; a block `console` holds commands after
    `$ ` and their output. Commands of other programs are left alone.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def replace(block: re.Match[str]) -> str:
            if block["kind"] == "yaml":
                file = _FILE.match(block["body"])
                if file:
                    write_files(folder, {file["name"]: block["body"]})
                return block[0]
            commands = re.findall(r"^\$ (.*(?:\\\n.*)*)$", block["body"], re.MULTILINE)
            if not all(command.startswith(("flagscale-config ", "sed ")) for command in commands):
                return block[0]
            shown = "".join(f"$ {line}\n{on_terminal(line, folder, NO_COLOR='1')}" for line in commands)
            return f"```console\n{shown}```"

        return _BLOCK.sub(replace, text)


def error_pages() -> dict[Path, str]:
    """Return the page of every error code, and their index."""
    pages = {}
    rows = []
    for code in codes().values():
        name = code.code.removeprefix("config/")
        rows.append(f"| [`{code.code}`]({name}.md) | {code.title} |\n")
        text = f"# {code.title}\n\n`{code.code}`\n\n{code.meaning}\n\n## What to do\n\n{code.cure}\n"
        if code.words:
            text += "\n## Example\n"
            for file, content in code.files.items():
                shown = re.sub(r"[^\n\x20-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", content)
                kind = "yaml" if file.endswith(".yaml") else "json"
                text += f"\n`{file}`\n\n```{kind}\n{shown}```\n"
            with tempfile.TemporaryDirectory() as folder:
                write_files(Path(folder), code.files)
                command = f"flagscale-config {code.words}"
                output = on_terminal(command, Path(folder), NO_COLOR="1")
            text += f"\n```console\n$ {command}\n{output}```\n"
        pages[FOLDER / f"errors/{name}.md"] = text
    about = (
        "# Error codes\n\nEvery problem that flagscale-config reports has a code that never changes its "
        "meaning. These pages are\nwritten by `scripts/config_pages.py`; each example was run. "
        "`flagscale-config explain CODE` prints\nthe same text.\n\n| code | title |\n|---|---|\n"
    )
    pages[FOLDER / "errors/index.md"] = about + "".join(rows)
    return pages


def three_errors() -> tuple[str, str]:
    """Return a command and what a terminal shows of it, in colour."""
    command = "flagscale-config check conf/tiny.yaml"
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), _THREE_ERRORS)
        return command, on_terminal(command, Path(name))


def recorded(command: str, output: str) -> str:
    """Return a recorded terminal as SVG."""
    from rich.console import Console
    from rich.text import Text

    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=_COLUMNS, file=nowhere, color_system="truecolor")
        console.print(Text.from_ansi(f"$ {command}\n{output}"))
    svg = console.export_svg(title="flagscale-config", unique_id="flagscale-config")
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def text_of(svg: str) -> str:
    """Return the words that a recorded terminal shows, one blank between them."""
    body = svg[svg.index("-matrix") :]
    found = re.findall(
        r"<text[^>]*-matrix[^>]*>(.*?)</text>|<text class=\"[^\"]*-r\d+\"[^>]*>(.*?)</text>", body
    )
    return " ".join(html.unescape(one or two).replace("\N{NO-BREAK SPACE}", " ") for one, two in found)


def plain(text: str) -> str:
    """Return text without colours and without blanks, for comparison."""
    return "".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def write_or_check() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    wanted = {**error_pages(), **{page: ran(page.read_text()) for page in PAGES}}
    stale = [path for path in sorted((FOLDER / "errors").glob("*.md")) if path not in wanted]
    command, output = three_errors()
    if options.check:
        wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
        if plain(text_of(RECORDING.read_text())) != plain(f"$ {command}\n{output}"):
            wrong.append(RECORDING)
        for path in [*wrong, *stale]:
            print(f"{path.relative_to(ROOT)}: differs; write it anew: python scripts/config_pages.py")
        return 1 if wrong or stale else 0
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in stale:
        path.unlink()
    RECORDING.write_text(recorded(command, output))
    return 0


if __name__ == "__main__":
    raise SystemExit(write_or_check())
