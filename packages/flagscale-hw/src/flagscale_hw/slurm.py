"""Slurm: a plan as a batch script, and a run that `sbatch` started, with the same verbs as any other.

The scheduler chooses the hosts, supervises and ends what it started, so our supervisor has no part in it. The
run directory must be on a disk that all nodes share, as is usual there.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagscale_hw import index
from flagscale_hw.cause import first_cause
from flagscale_hw.errors import InputError, LaunchError, LaunchRefused
from flagscale_hw.plan import Plan
from flagscale_hw.rundir import Claim
from flagscale_hw.runs import Run, take
from flagscale_hw.scripts import node_script, variable
from flagscale_hw.status import ProcessStatus, RunState, RunStatus

__all__ = ["SlurmRun", "render_slurm", "submit"]

_OWN = frozenset({"nodes", "ntasks-per-node", "output", "open-mode", "job-name", "parsable", "no-requeue"})
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_ASK_LIMIT_S = 30.0
_POLL_S = 0.5
_END_LIMIT_S = 60.0
_SIGNALLED = 128
"""A shell reports a death by signal as this plus the signal's number."""
_FIRST_PORT, _PORTS = 20000, 12000
_STATES: Mapping[str, RunState] = {
    "PENDING": "starting",
    "CONFIGURING": "starting",
    "REQUEUED": "starting",
    "REQUEUE_HOLD": "starting",
    "SUSPENDED": "running",
    "RUNNING": "running",
    "COMPLETING": "stopping",
    "STOPPED": "running",
    "COMPLETED": "succeeded",
    "CANCELLED": "stopped",
}
"""Slurm's job states; every other one, such as TIMEOUT, NODE_FAIL or OUT_OF_MEMORY, is a failure."""


def render_slurm(plan: Plan, run_dir: str, options: Mapping[str, str | None] | None = None) -> str:
    """Render the batch script; as a step it runs each node's part too, so it must stand at `run_dir/job.sh`.

    Args:
        plan: its targets stand for the nodes that Slurm will choose.
        run_dir: absolute; on a disk that all nodes share.
        options: of `sbatch`, by their long names: `{"partition": "long", "exclusive": None}`.

    Raises:
        InputError: an option is not a plain word, or is one that the plan decides.
    """
    count = max(1, len(plan.targets))
    given = dict(options or {})
    for name, value in given.items():
        if not _OPTION.fullmatch(name) or (value is not None and not value.isprintable()):
            raise InputError(
                f"slurm option {name!r}: give the long name of an sbatch option, such as partition"
            )
        if name in _OWN:
            raise InputError(f"slurm option {name}: the plan decides it: leave it out")
    own = {
        "job-name": re.sub(r"[^\w.-]", "-", plan.name) or "flagscale",
        "nodes": str(count),
        "ntasks-per-node": "1",
        "output": f"{run_dir}/slurm.log",
        "open-mode": "append",
        "no-requeue": None,
    }
    lines = ["#!/usr/bin/env bash"]
    for name, value in {**own, **given}.items():
        # sbatch reads these lines itself, by quoting rules of its own.
        words = name if value is None else f"{name}={_sbatch_word(value)}"
        lines.append(f"#SBATCH --{words}")
    lines += [
        f"# {plan.kind} on {count} nodes, written by FlagScale from the plan of the run.",
        "set -euo pipefail",
        f"FLAGSCALE_RUN_DIR={shlex.quote(run_dir)}",
        *_BATCH.splitlines(),
        *_ports(plan),
        *_STEP.splitlines(),
        *node_script(plan),
    ]
    return "\n".join(lines)


def _sbatch_word(value: str) -> str:
    return value if re.fullmatch(r"[\w./:,%+@=-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


_BATCH = """\
if [ "${1:-}" != node ]; then
  # On the first node: tell all nodes where they are, and start this same script on each of them.
  addresses=()
  for name in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    addresses+=("$(sinfo -h -n "$name" -o %o | head -n 1)")
  done
  export FLAGSCALE_HOSTS="${addresses[*]}"
  code=0
  srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash "$FLAGSCALE_RUN_DIR/job.sh" node || code=$?
  printf '%s\\n' "$code" > "$FLAGSCALE_RUN_DIR/.job.end"
  mv "$FLAGSCALE_RUN_DIR/.job.end" "$FLAGSCALE_RUN_DIR/job.end"
  exit "$code"
fi
# On each node:
read -r -a FLAGSCALE_ADDRESSES <<< "$FLAGSCALE_HOSTS\""""

_STEP = """\
FLAGSCALE_NODE_RANK=$SLURM_NODEID"""


def _ports(plan: Plan) -> Iterator[str]:
    """Yield the numbers of the ports: derived from the job, so that jobs that share a node do not meet."""
    for place, (port, number) in enumerate(sorted(plan.ports.items())):
        chosen = number or f"$(({_FIRST_PORT} + (SLURM_JOB_ID * 8 + {place}) % {_PORTS}))"
        yield f"{variable(port)}={chosen}"


def submit(plan: Plan, run_dir: Path, options: Mapping[str, str | None] | None = None) -> SlurmRun:
    """Hand a plan to `sbatch`.

    Raises:
        LaunchRefused: Slurm refuses the job, in its own words, or the directory holds a run.
        LaunchError: there is no Slurm here, or it does not answer.
        InputError: as for `render_slurm`.
    """
    script = render_slurm(plan, str(run_dir), options)
    run = SlurmRun(run_dir)
    claim = Claim(run.directory)
    try:
        take(claim, run, plan)
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "job.sh").write_text(script, encoding="utf-8")
        said = _ask(["sbatch", "--parsable", str(run_dir / "job.sh")])
        job, _, cluster = said.strip().partition(";")
        facts = {"job": job, "cluster": cluster, "submitted_at": time.time()}
        run.directory.write(run.job_file, facts)
        run.directory.write(run.directory.supervisor, {"run_id": f"slurm-{uuid.uuid4().hex}"})
        claim.settle()
    except BaseException:
        claim.give_up(run_dir / name for name in ("job.sh", "slurm.json"))
        raise
    with contextlib.suppress(OSError, KeyError, TypeError):  # it will not be listed
        index.remember((run.directory.read(run.directory.supervisor) or {})["run_id"], run_dir)
    return run


def _ask(words: Sequence[str]) -> str:
    """Run one of Slurm's commands.

    Raises:
        LaunchRefused: it says no.
        LaunchError: there is none, or it does not answer.
    """
    if shutil.which(words[0]) is None:
        raise LaunchError(f"{words[0]}: not found: run this where Slurm's commands are installed")
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_ASK_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{words[0]}: no answer for {_ASK_LIMIT_S:g} s: is slurmctld up?") from error
    if done.returncode:
        raise LaunchRefused(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class SlurmRun(Run):
    """A run that Slurm has; its directory tells the job, Slurm tells how it stands."""

    _poll_s = _POLL_S

    @property
    def job_file(self) -> Path:
        """The file that tells the job; by it a directory is known to be Slurm's."""
        return self.dir / "slurm.json"

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return str((self.directory.read(self.directory.plan) or {}).get("name", ""))

    @property
    def job(self) -> str:
        """Slurm's number of the job."""
        return str((self.directory.read(self.job_file) or {}).get("job", ""))

    def status(self) -> RunStatus:
        """Say how the job stands; the end is kept in the directory, for Slurm forgets it after minutes.

        Raises:
            LaunchError: Slurm does not answer.
        """
        kept = self.directory.read_status()
        if kept is not None and kept.is_over:
            return kept
        said = self._said_by_slurm()
        status = self._status_of(*said) if said else self._status_without_slurm()
        if status.is_over:
            with contextlib.suppress(OSError):
                self.directory.write(self.directory.state, status.to_dict())
        return status

    def _said_by_slurm(self) -> tuple[str, str] | None:
        """Return state and reason; None when Slurm does not know the job any more."""
        with contextlib.suppress(LaunchRefused):
            shown = _ask(["scontrol", "show", "job", "-o", self.job])
            fields = dict(word.partition("=")[::2] for word in shown.split())
            if "JobState" in fields:
                return fields["JobState"], fields.get("Reason", "None")
        return None

    def _status_of(self, word: str, why: str) -> RunStatus:
        state = _STATES.get(word, "failed")
        was_asked = self.directory.stop_request.exists()
        if was_asked and state in {"failed", "succeeded"}:
            state = "stopped"
        reason = f"job {self.job}: waiting in Slurm's queue: {why}" if state == "starting" else ""
        if state == "stopped":
            reason = "stopped on request" if was_asked else f"job {self.job} was cancelled"
        return self._make(state, reason, word)

    def _status_without_slurm(self) -> RunStatus:
        try:
            code = int((self.dir / "job.end").read_text())
        except (OSError, ValueError):
            text = (
                f"Slurm does not know job {self.job} any more, and it left no end: killed, or its node failed"
            )
            return self._make("lost", text, "")
        was_asked = self.directory.stop_request.exists()
        if was_asked:
            return self._make("stopped", "stopped on request", "")
        return self._make("failed" if code else "succeeded", "", "FAILED")

    def _make(self, state: RunState, reason: str, word: str) -> RunStatus:
        over = state in {"succeeded", "failed", "stopped", "lost"}
        processes = tuple(self._processes(is_over=over))
        if state == "failed":
            reason = self._first_failure(processes) or f"job {self.job}: {word}: see {self.dir}/slurm.log"
        ends = [process.ended_at for process in processes if process.ended_at]
        submitted = (self.directory.read(self.job_file) or {}).get("submitted_at")
        ended_at = (max(ends) if ends else time.time()) if over else None
        return RunStatus(
            state=state, reason=reason, processes=processes, started_at=submitted, ended_at=ended_at
        )

    def _processes(self, *, is_over: bool) -> Iterator[ProcessStatus]:
        plan = self.directory.read(self.directory.plan) or {}
        for entry in plan.get("processes", ()):
            yield self._process(entry, is_over=is_over)

    def _process(self, entry: Mapping[str, Any], *, is_over: bool) -> ProcessStatus:
        name = entry["name"]
        begun, ended = self._note(f"{name}.begun"), self._note(name)
        if begun is None:
            return ProcessStatus(name=name, host=entry["host"])
        started = ProcessStatus(name=name, host=begun[0], started_at=float(begun[1]))
        if ended is None:
            return replace(started, is_lost=is_over)
        code = int(ended[0])
        return replace(
            started,
            ended_at=float(ended[1]),
            exit_code=code if 0 <= code <= _SIGNALLED else None,
            signal=code - _SIGNALLED if code > _SIGNALLED else None,
            cause=first_cause(self.directory.log(name)) if code > 0 else "",
        )

    def _note(self, name: str) -> list[str] | None:
        """Read what a node's script has noted."""
        try:
            words = (self.dir / "ends" / name).read_text(encoding="utf-8").split()
        except OSError:
            return None
        return words if len(words) == 2 else None

    @staticmethod
    def _first_failure(processes: Sequence[ProcessStatus]) -> str:
        failed = [one for one in processes if one.exit_code or one.signal]
        if not failed:
            return ""
        first = min(failed, key=lambda one: one.ended_at or 0.0)
        return f"{first.host}: {first.name}: {first.fate}" + (f": {first.cause}" if first.cause else "")

    def folders(self) -> tuple[Path, ...]:
        """Return the run directory: all nodes share it."""
        return (self.dir,)

    def _log_of(self, process: dict[str, str]) -> Path:
        return self.directory.log(process["name"])

    def stop(self, grace_s: float | None = None) -> RunStatus:
        """End the job: SIGTERM to its steps, then `scancel` for what is left.

        Raises:
            LaunchError: Slurm does not answer, or lets only the owner do this.
        """
        if self.status().is_over:
            return self.status()
        self.ask_to_stop(grace_s)
        status = self.wait(self._patience_s(grace_s))
        if not status.is_over:
            _ask(["scancel", self.job])
            status = self.wait(_END_LIMIT_S)
        return status

    def ask_to_stop(self, grace_s: float | None = None) -> None:
        """Ask the job to end, and return at once; one that has not begun is taken from the queue."""
        is_queued = self.status().state == "starting"
        self.directory.write(self.directory.stop_request, {"grace_s": grace_s})
        with contextlib.suppress(LaunchRefused):  # over by now
            _ask(["scancel", self.job] if is_queued else ["scancel", "--signal=TERM", self.job])
