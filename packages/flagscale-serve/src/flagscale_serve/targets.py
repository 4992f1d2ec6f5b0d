"""What a target means: a serve file, a recipe's name, a model directory, a run directory or a run's id.

What does not live here: how a run stands (`state.py`), starting what a target means (`runs.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flagscale_hw as hw
from flagscale_serve.engines import default_engine, engine_named
from flagscale_serve.errors import InvalidService, NotServing
from flagscale_serve.hosts import find_nodes, promised_nodes
from flagscale_serve.service import Service, absolute, is_composed, of_experiment, of_model, served_name
from flagscale_serve.state import list_runs

__all__ = ["Target", "file_of", "file_words", "find_run", "read_target", "state_dir"]

_TASK = "serve"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PLAIN = Path(__file__).parent / "plain_model.yaml"
"""The serve file that a plain model with options stands for."""


def find_run(target: str | None, overrides: Sequence[str] = (), *, alive: bool = False) -> hw.Run:
    """Find the run that a target means.

    Args:
        target: run directory, run id, serve file, recipe or model directory; None: the only one alive.
        overrides: Hydra overrides of the file.
        alive: with no target, do not fall back on the latest one that has ended.

    Raises:
        NotServing: there is none, or several could be meant.
    """
    if target is None:
        return _only_run(alive=alive)
    path = Path(target)
    if (path / "plan.json").is_file():
        return hw.open_run(path.absolute())
    for known in reversed(list_runs()):
        if Path(known.run_dir).name == target:
            return hw.open_run(Path(known.run_dir))
    if path.is_dir() or path.suffix == ".gguf":
        return _run_of_model(path.resolve())
    experiment = _load(target, overrides)
    latest = Path(experiment.exp_dir) / "runs" / "latest"
    if not (latest / "plan.json").is_file():
        raise NotServing(
            f"{target}: no run yet in {latest.parent}: start one with `flagscale-serve run {target}`"
        )
    return hw.open_run(latest.resolve())


def _only_run(*, alive: bool) -> hw.Run:
    known = list_runs()
    living = [one for one in known if not one.is_over]
    if len(living) > 1:
        ids = ", ".join(Path(one.run_dir).name for one in living)
        raise NotServing(f"{len(living)} services are running ({ids}): say which one")
    chosen = living or ([] if alive else list(known[-1:]))
    if not chosen:
        raise NotServing("no service is running: start one with `flagscale-serve run FILE_OR_MODEL_DIR`")
    return hw.open_run(Path(chosen[0].run_dir))


def _run_of_model(path: Path) -> hw.Run:
    of_it = [one for one in list_runs() if any(Path(i.model_dir).resolve() == path for i in one.instances)]
    if not of_it:
        raise NotServing(
            f"{path}: no run of this model is known: start one with `flagscale-serve run {path}`"
        )
    living = [one for one in of_it if not one.is_over]
    return hw.open_run(Path((living or of_it)[-1].run_dir))


@dataclass(frozen=True)
class Target:
    """What a target means: a serve file, or a model by its path."""

    path: str
    experiment: Any
    """The loaded file; None for a model."""
    given_python: str | None
    engine: str | None
    """Wins over the file's."""
    is_model: bool = False
    """A plain model; with options, `experiment` is the file that they stand for."""

    @property
    def python(self) -> str:
        """The engine's interpreter; after the user's own shell text it is the `python` on the path."""
        chosen = self.given_python or os.environ.get("FLAGSCALE_SERVE_PYTHON")
        has_shell = self.experiment is not None and bool((self.experiment.cmds.before_start or "").strip())
        if chosen is None:
            if self.experiment is not None and self.experiment.runner.docker:
                return "python3"  # of the container, whose paths are its own
            return "python" if has_shell else sys.executable
        if "/" in chosen:
            # Not resolved: the link in a virtual environment is what makes it one.
            return str(Path(chosen).absolute())
        return chosen if has_shell else shutil.which(chosen) or chosen

    @property
    def is_gguf(self) -> bool:
        """Tell whether it is one file of llama.cpp's."""
        return self.is_model and self.path.endswith(".gguf")

    @property
    def is_composed(self) -> bool:
        """Tell whether it is an application of the user's own classes."""
        return self.experiment is not None and is_composed(self.experiment)

    @property
    def is_cloud(self) -> bool:
        """Tell whether a cluster chooses the hosts."""
        return self.experiment is not None and self.experiment.runner.type == "cloud"

    def nodes(self, machine: hw.Machine) -> tuple[hw.Node, ...]:
        """Look at the hosts; none where everything runs here."""
        if self.experiment is None:
            return ()
        if self.is_cloud:
            return promised_nodes(self.experiment, machine)
        task = self.experiment.task.backend
        names = {self.engine or item.engine or task or "vllm" for item in self.experiment.serve}
        packages = [word for name in sorted(names) for word in engine_named(name).distributions]
        return find_nodes(self.experiment, python=self.python, packages=packages)

    @property
    def home(self) -> Path:
        """The directory in which its runs live."""
        if self.is_model:
            return state_dir() / served_name(str(absolute(self.path, str(Path.cwd()))))
        return Path(self.experiment.exp_dir) / "runs"

    def service(self, machine: hw.Machine) -> Service:
        """Return the service that is asked for."""
        default = "llama_cpp" if self.is_gguf else default_engine(machine.chip).name
        if self.experiment is None:
            return of_model(self.path, cwd=str(Path.cwd()), engine=self.engine or default)
        return of_experiment(self.experiment, default_engine=default, engine=self.engine)


def read_target(
    target: str, overrides: Sequence[str], *, python: str | None = None, engine: str | None = None
) -> Target:
    """Read what should be started.

    Raises:
        ConfigError: the file or an override is wrong.
        InvalidService: there is no such thing.
    """
    path = Path(target)
    if not (path.is_dir() or path.suffix == ".gguf"):
        return Target(target, _load(target, overrides), python, engine)
    experiment = _load(str(_PLAIN), _plain_words(target, overrides)) if overrides else None
    return Target(target, experiment, python, engine, is_model=True)


def _plain_words(model: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides that make the file of any model that of one, with options."""
    path = str(absolute(model, str(Path.cwd())))
    ours = {"experiment.exp_name": served_name(path), "serve.0.engine_args.model": path}
    return (*(f"{key}={json.dumps(value)}" for key, value in ours.items()), *file_words(overrides))


def file_words(options: Sequence[str]) -> tuple[str, ...]:
    """Return a model's options as overrides of a file: `max_model_len=64` is one of `engine_args`."""
    return tuple(_file_word(word) for word in options)


def _file_word(word: str) -> str:
    name, sign, value = word.partition("=")
    if not sign or name.startswith(("+", "~")):
        return word
    if "." not in name:
        name = f"serve.0.engine_args.{name.replace('-', '_')}"
    return f"++{name}={value}"


def file_of(target: str, overrides: Sequence[str] = ()) -> Any:
    """Return the experiment of a serve file or recipe; None where the target is something else.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    from flagscale_config import load, recipes

    is_file = Path(target).is_file() and Path(target).suffix in (".yaml", ".yml")
    return load(target, overrides, task=_TASK) if is_file or target in recipes(_TASK) else None


def _load(target: str, overrides: Sequence[str]) -> Any:
    from flagscale_config import load, recipes

    is_file = Path(target).exists() or Path(target).suffix in (".yaml", ".yml")
    if not is_file and target not in recipes(_TASK):
        fetch = f"; a model of a hub is fetched first: `hf download {target} --local-dir DIR`"
        raise InvalidService(
            f"{target}: no such model directory, serve file, recipe or run: give the path of a directory "
            "with config.json, of a FlagScale serve file (.yaml), or a name that `flagscale-config "
            f"recipes` lists{fetch if _HUB_NAME.fullmatch(target) else ''}"
        )
    return load(target, overrides, task=_TASK)


def state_dir() -> Path:
    """Return where this package keeps what belongs to no file: runs of plain models, lines of chats."""
    own = os.environ.get("FLAGSCALE_STATE_DIR")
    if own:
        return Path(own).absolute() / "serve"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "flagscale" / "serve"
