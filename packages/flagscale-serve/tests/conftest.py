"""What the tests share: models without weights, an engine without a model, and a way to see leftovers."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import dedent, indent
from typing import NamedTuple
from unittest import mock

import pytest

from flagscale_serve.cli import main

DEADLINE_S = 60.0
"""For everything that ends by itself: generous, because a loaded machine is slow and no test is timed."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_safetensors(path: Path, names: tuple[str, ...] = ("a", "b")) -> None:
    """Write tensors of one float each."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * place, 4 * place + 4]}
        for place, name in enumerate(names)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4 * len(names))


@pytest.fixture
def safetensors() -> Callable[..., None]:
    return write_safetensors


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory that looks whole to everybody who reads headers only."""
    path = tmp_path / "models" / "tiny-qwen3"
    path.mkdir(parents=True)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write_safetensors(path / "model.safetensors")
    return path


def write_serve_file(folder: Path, items: str, *, experiment: str = "", name: str = "demo") -> Path:
    """Write a FlagScale serve file of two levels and return its path."""
    conf = folder / "conf"
    (conf / "serve").mkdir(parents=True, exist_ok=True)
    lines = [
        "defaults:",
        "  - _self_",
        f"  - serve: {name}",
        "experiment:",
        f"  exp_name: {name}",
        f"  exp_dir: {folder / 'outputs'}",
        "  task:",
        "    type: serve",
        indent(dedent(experiment).strip("\n"), "  "),
        "action: run",
    ]
    (conf / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    (conf / "serve" / f"{name}.yaml").write_text(dedent(items))
    return conf / f"{name}.yaml"


@pytest.fixture
def serve_file(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_serve_file, tmp_path)


class Done(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Shell:
    """Runs the command line on a state directory and an engine of its own."""

    home: Path
    patience_s: float = DEADLINE_S
    env: dict[str, str] = field(default_factory=dict)

    def popen(self, *words: object) -> subprocess.Popen[str]:
        """Run a command as a user does, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "flagscale_serve.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.env},
            cwd=self.home,
        )

    def __call__(self, *words: object, stdin: str = "") -> Done:
        """Run a command inside this process, which spares half a second of start for each."""
        out, errors = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        with ExitStack() as during:
            during.enter_context(mock.patch.dict(os.environ, self.env))
            during.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
            during.enter_context(chdir(self.home))
            during.enter_context(redirect_stdout(out))
            during.enter_context(redirect_stderr(errors))
            try:
                code = main([str(word) for word in words])
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Done(code, out.getvalue(), errors.getvalue())

    def mode(self, mode: str) -> None:
        self.env["FAKE_MODE"] = mode

    def engine_pids(self) -> list[int]:
        path = Path(self.env["FAKE_PIDS"])
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def engine_argv(self) -> list[str]:
        argv: list[str] = json.loads(Path(self.env["FAKE_PIDS"] + ".argv").read_text())
        return argv

    def the_status(self, *target: object) -> dict[str, object]:
        status: dict[str, object] = json.loads(self("status", *target, "--json").stdout)
        return status


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie that nobody has collected yet does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def until(what: Callable[[], object], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition, with a deadline instead of a guess."""
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, f"not within {deadline_s} s"
        time.sleep(0.05)


@pytest.fixture
def eventually() -> Callable[..., None]:
    return until


@pytest.fixture
def alive() -> Callable[[int], bool]:
    return is_alive


def run_block(shell: Shell, *command: str, path: str) -> str:
    """Run a block of a page as a reader would, `path` in front of the programs; return what it printed."""
    done = subprocess.run(
        command,
        cwd=shell.home,
        env={**os.environ, **shell.env, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session", name="run_block")
def _run_block() -> Callable[..., str]:
    return run_block


def descendants(pid: int) -> set[int]:
    """Return every process below one, as the kernel tells it now."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def everybody_of(status: dict[str, object]) -> set[int]:
    """Return every process of a run, its guardian and supervisor included."""
    recorded = json.loads((Path(str(status["run_dir"])) / "supervisor.json").read_text())
    return descendants(recorded["guardian"]["pid"])


@pytest.fixture
def everybody() -> Callable[[dict[str, object]], set[int]]:
    return everybody_of


@contextmanager
def shell_in(folder: Path) -> Iterator[Shell]:
    """The command line with a fake engine; nothing that was started outlives it."""
    python = folder / "engine" / "python"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\n" + (Path(__file__).parent / "fake_engine.py").read_text())
    python.chmod(0o755)
    shell = Shell(home=folder)
    shell.env = {
        "FLAGSCALE_STATE_DIR": str(folder / "state"),
        "FLAGSCALE_SERVE_PYTHON": str(python),
        "FAKE_PIDS": str(folder / "pids"),
    }
    yield shell
    import flagscale_hw as hw

    homes = ("state/serve/*", "outputs/runs", "outputs/*/runs", "tune/runs")
    for plan in [path for home in homes for path in folder.glob(f"{home}/2*/plan.json")]:
        hw.open_run(plan.parent).stop(0.0)
    until(lambda: not [pid for pid in shell.engine_pids() if is_alive(pid)])


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with shell_in(tmp_path) as shell:
        yield shell


def write_real_model(
    python: str, folder: Path, prompt: str, num_tokens: int, *others: Path
) -> tuple[Path, dict[str, str]]:
    """Write a small random model with the engine's own Python; return it and what it answers.

    Each of the other folders gets one too, which answers something else.
    """
    script = Path(__file__).parent / "engines" / "tiny_model.py"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    more = [other / "model" for other in others]
    subprocess.run([python, script, folder / "model", prompt, str(num_tokens), *more], check=True, env=env)
    return folder / "model", json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="session")
def real_model() -> Callable[..., tuple[Path, dict[str, str]]]:
    return write_real_model


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("FLAGSCALE_TEST_VLLM_PYTHON")
    if not python:
        pytest.fail("FLAGSCALE_TEST_VLLM_PYTHON is not set: name a Python that has vLLM")
    return python


@pytest.fixture(scope="module")
def module_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Callable[..., Path]]]:
    """A command line and a place for serve files that the tests of a module share."""
    folder = tmp_path_factory.mktemp("shared")
    with shell_in(folder) as shell:
        yield shell, partial(write_serve_file, folder)
