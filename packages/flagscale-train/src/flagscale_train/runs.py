"""Runs of an experiment: start one, find it again, follow it, stop it.

Each run has a directory of its own below the experiment's: `<exp_dir>/runs/<time>`; `runs/latest` points at
the newest. Checkpoints belong to the experiment, not to a run, so that the next run resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flagscale_hw as hw
from flagscale_config import load
from flagscale_train.causes import Cause, abort, explain
from flagscale_train.checkpoints import choose
from flagscale_train.errors import InvalidInput, NotFound
from flagscale_train.events import FILE_NAME, Progress, read
from flagscale_train.findings import examine
from flagscale_train.hosts import find_nodes, promised_nodes
from flagscale_train.plan import checkpoint_dir, plan

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = [
    "Slurm",
    "TrainStatus",
    "events_of",
    "find",
    "finished",
    "list_runs",
    "logs",
    "make_plan",
    "run",
    "status",
    "stop",
]

_RUNS, _LATEST = "runs", "latest"
_OWN_FAILURE = re.compile(r"(?:(?P<host>\S+): )?train(?:-\d+)?: ")
"""How the reason begins where the training itself failed, on one host or on one of several."""


@dataclass(frozen=True)
class TrainStatus:
    """How a training run stands: its processes and its progress."""

    run_dir: Path
    name: str
    run: hw.RunStatus
    progress: Progress
    killed: str = ""
    """The rank that a signal ended, as a sentence; empty if none was."""
    aborted: str = ""
    """What a process said that ended itself without an exception; empty if none did."""

    @property
    def what_happened(self) -> str:
        """The first cause of a failure, the reason of a stop, or empty."""
        error = self.progress.error
        if self.run.state != "failed" or not _OWN_FAILURE.match(self.run.reason):
            return self.run.reason  # ended from outside: what the ranks said then are consequences
        if self.killed:
            return f"{self.killed}: {self.aborted}" if self.aborted else self.killed
        if error is not None:
            return f"rank {error.get('rank')}: {error.get('type')}: {error.get('text')}"
        return self.run.reason

    @property
    def cause(self) -> Cause | None:
        """What is likely behind a failure; None where nothing failed, or the error is not a known one."""
        return explain(self.what_happened) if self.run.state == "failed" else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        progress = self.progress.to_dict()
        return {
            "run_dir": str(self.run_dir),
            "name": self.name,
            "what_happened": self.what_happened,
            "cause": asdict(self.cause) if self.cause else None,
            **self.run.to_dict(),
            # A run that was cut off has steps left, but no time.
            "progress": progress | ({"remaining_s": None} if self.run.is_over else {}),
        }


def make_plan(
    source: str | os.PathLike[str], overrides: Sequence[str] = (), *, chip: str | None = None
) -> hw.Plan:
    """Load an experiment, look at its machines and plan the training.

    Args:
        source: FlagScale experiment file, or the name of a recipe such as `qwen3/tiny`.
        overrides: Hydra overrides such as `train.model.train_iters=10`.
        chip: of hosts that a scheduler will choose, so that nothing is looked at: `runner.nnodes` of them
            with `runner.nproc_per_node` devices each. By default the hosts of the experiment are looked at.
    """
    return _plan(load(source, list(overrides), task="train"), chip)


def _plan(experiment: Experiment, chip: str | None = None) -> hw.Plan:
    nodes = find_nodes(experiment) if chip is None else promised_nodes(experiment, chip=chip)
    machine = nodes[0].machine if nodes else hw.detect()
    return plan(experiment, machine, nodes=nodes, findings=examine(experiment))


_OTHER_WORK = ("load", "pretrained_checkpoint", "finetune", "skip_train", "ckpt_step")
"""With one of these a run does something even where the last step was trained."""


def finished(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Path | None:
    """Return the checkpoint of the last step, where an experiment was trained to its end already.

    Args:
        source: experiment file or recipe name.
        overrides: Hydra overrides.

    Returns:
        None if a run would train, or do anything else.
    """
    experiment = load(source, list(overrides), task="train")
    train = experiment.train
    if train is None or not train.train_iters or any(train.options.get(name) for name in _OTHER_WORK):
        return None
    newest = choose(Path(checkpoint_dir(experiment)))
    return newest.path if newest.iteration >= train.train_iters else None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A training that Slurm is to start."""

    chip: str
    """Of its nodes, by the name in `flagscale_hw`."""
    options: Mapping[str, str | None] = field(default_factory=dict)
    """Of `sbatch`, by their long names; None for one without a value."""


def run(
    source: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    detach: bool = True,
    slurm: Slurm | None = None,
) -> hw.Run:
    """Start training.

    Args:
        source: experiment file or recipe name.
        overrides: Hydra overrides.
        detach: let the run outlive this process; otherwise it ends when this process does, however that
            happens. Slurm's jobs outlive it always.
        slurm: submit it as a job instead of starting it here or over ssh.

    Returns:
        The run, which has just been started.

    Raises:
        InvalidInput: the experiment cannot be trained here, or it is being trained already.
    """
    experiment = load(source, list(overrides), task="train")
    planned = _plan(experiment, slurm.chip if slurm else None)
    root = Path(experiment.exp_dir) / _RUNS
    with _alone(root):
        _refuse_second(root)
        run_dir = _new_directory(root)
        if slurm is None:
            started = hw.launch(planned, run_dir, detach=detach)
        else:
            started = hw.submit(planned, run_dir, slurm.options)
        _point_latest(root, run_dir)
    return started


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one process at a time start a run of this experiment; the lock goes with the process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidInput(
            f"experiment.exp_dir: {root.parent}: {error.strerror}: give a directory to write to"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _refuse_second(root: Path) -> None:
    """Two runs would write over each other's checkpoints."""
    latest = root / _LATEST
    if not latest.exists():
        return
    try:
        other = hw.open_run(latest.resolve())
    except hw.RunNotFound:
        return
    state = other.status()
    if not state.is_over:
        raise InvalidInput(
            f"{other.dir}: this experiment is being trained already ({state.state}): follow it with "
            "`flagscale-train logs -f`, end it with `flagscale-train stop`, or give another exp_dir"
        )


def _new_directory(root: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [stamp, *(f"{stamp}-{count}" for count in range(2, 1000))]
    return next(root / name for name in names if not (root / name).exists())


def _point_latest(root: Path, run_dir: Path) -> None:
    beside = root / f".{_LATEST}.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(run_dir.name)
    beside.replace(root / _LATEST)


def find(target: str | os.PathLike[str], overrides: Sequence[str] = ()) -> hw.Run:
    """Find a run.

    Args:
        target: a run directory, an experiment directory, an experiment file or a recipe name; of an
            experiment the newest run is meant.
        overrides: Hydra overrides, for a file or recipe whose directory depends on them.

    Raises:
        NotFound: nothing was run there.
    """
    path = Path(target)
    if path.is_dir():
        if not overrides:
            for candidate in (path, path / _RUNS / _LATEST, path / _LATEST):
                with contextlib.suppress(hw.RunNotFound):
                    return hw.open_run(candidate.resolve())
        raise NotFound(
            f"{target}: no run in it: give a run directory, an experiment directory or an experiment file"
        )
    exp_dir = Path(load(target, list(overrides), task="train").exp_dir)
    try:
        return hw.open_run((exp_dir / _RUNS / _LATEST).resolve())
    except hw.RunNotFound:
        raise NotFound(
            f"{exp_dir}: this experiment was never run: start it with `flagscale-train run`"
        ) from None


def status(target: str | os.PathLike[str] | hw.Run, overrides: Sequence[str] = ()) -> TrainStatus:
    """Say how a run stands; `target` as for `find`, or the run itself."""
    found = target if isinstance(target, hw.Run) else find(target, overrides)
    now = found.status()
    progress = Progress.of(events_of(found))
    killed = _killed(found) if now.state == "failed" else ""
    # Who is killed by another says nothing more; who aborts has said why.
    aborted = abort(_logs_of(found)) if "SIGABRT" in killed else ""
    return TrainStatus(found.dir, found.name, now, progress, killed, aborted)


def events_of(found: hw.Run) -> list[dict[str, Any]]:
    """Return the events of all hosts, in the order of their clocks."""
    events = [event for folder in found.folders() for event in read(folder / FILE_NAME)]
    return sorted(events, key=lambda event: event["time"])


def _killed(found: hw.Run) -> str:
    return next((text for text in map(hw.killed_rank, _logs_of(found)) if text), "")


def _logs_of(found: hw.Run) -> list[Path]:
    return sorted(log for folder in found.folders() for log in (folder / "logs").glob("train*.log"))


def logs(
    target: str | os.PathLike[str], overrides: Sequence[str] = (), *, follow: bool = False
) -> Iterator[hw.LogLine]:
    """Yield the log lines of a run; with `follow` as they are written, until the run is over."""
    return find(target, overrides).logs(follow=follow)


def stop(
    target: str | os.PathLike[str], overrides: Sequence[str] = (), *, grace_s: float | None = None
) -> TrainStatus:
    """Stop a run: it saves a checkpoint if it gets to it, and ends.

    Args:
        target: as for `find`.
        overrides: as for `find`.
        grace_s: seconds to wait before everything left is killed; the plan's own by default.

    Raises:
        NotFound: there is no such run, or it is over already.
    """
    found = find(target, overrides)
    before = found.status()
    if before.is_over:
        raise NotFound(f"{found.dir}: not running: it {_ended(before)}")
    found.stop(grace_s)
    return status(found)


def _ended(state: hw.RunStatus) -> str:
    return {"succeeded": "finished", "failed": "failed", "stopped": "was stopped", "lost": "was lost"}[
        state.state
    ]


def list_runs() -> tuple[TrainStatus, ...]:
    """Return every training run of this user on this machine that still has its directory, newest last."""
    return tuple(status(found) for found in hw.list_runs() if _kind(found.dir) == "train")


def _kind(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
