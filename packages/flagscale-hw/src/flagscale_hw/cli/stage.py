"""Verbs that put a recorded or an invented host in the place of this one: `record`, `replay`, `fake`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flagscale_hw.cli.show import show
from flagscale_hw.errors import HwError, InputError
from flagscale_hw.fake import Faults, environment, variables, write_host
from flagscale_hw.host import ROOT_VARIABLE

__all__ = ["fake", "record", "replay"]


class _NotRecorded(HwError):
    exit_code = 3


def record(options: argparse.Namespace) -> int:
    """Keep this host's files and the answers of its tools."""
    from flagscale_hw.recording import record_host

    found = record_host(Path(options.directory), redact=options.redact, timeout_s=options.timeout)
    print(f"{options.directory}: {len(found.devices)} x {found.chip}")
    print(f"flagscale-hw replay {options.directory}")
    return 0


def replay(options: argparse.Namespace) -> int:
    """Run a command as if on a recorded host."""
    root = Path(options.directory)
    if not (root / "proc").is_dir():
        raise _NotRecorded(f"{root}: no recorded host: make one with `flagscale-hw record {root}`")
    return _run_there({ROOT_VARIABLE: str(root.resolve())}, options)


def fake(options: argparse.Namespace) -> int:
    """Run a command as if on a host with certain chips."""
    count = 0 if options.chip == "cpu" and options.count == 8 else options.count
    faults = Faults(
        hang=options.hang, garbage=options.garbage, slow_s=max(0.0, options.slow), exit_code=options.rc
    )
    if options.out is not None:
        root = Path(options.out)
        if root.exists() and any(root.iterdir()):
            raise InputError(f"{root}: not empty: name a directory that does not exist yet")
        write_host(root, options.chip, count, faults=faults)
        return _run_there(variables(root, faults), options)
    with tempfile.TemporaryDirectory(prefix="flagscale-hw-fake-") as folder:
        write_host(Path(folder), options.chip, count, faults=faults)
        return _run_there(variables(Path(folder), faults), options)


def _run_there(shown: Mapping[str, str], options: argparse.Namespace) -> int:
    """Run the command, or print the table, where these variables are set; return the exit code."""
    # The tools come first in PATH too, for programs that call them without asking us.
    tools = [f"{shown[ROOT_VARIABLE]}/{folder}" for folder in ("usr/bin", "usr/local/bin")]
    path = os.pathsep.join([*tools, os.environ.get("PATH", os.defpath)])
    with environment({**shown, "PATH": path}):
        if not options.command:
            return show(options)
        sys.stdout.flush()
        try:
            done = subprocess.run(options.command, check=False)
        except OSError as error:
            raise InputError(f"{options.command[0]}: {error.strerror}") from error
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
