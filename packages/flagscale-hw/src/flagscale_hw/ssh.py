"""The way to a host: the system's own OpenSSH with the user's own configuration.

Nothing about keys, known hosts, proxies or names is decided here; what `ssh HOST` does by hand is what
happens. `FLAGSCALE_SSH` gives other words for `ssh`, such as `ssh -F other_config`.
"""

from __future__ import annotations

import os
import re
import shlex

from flagscale_hw.bootstrap import script
from flagscale_hw.target import Target

__all__ = ["argv_of", "explain"]

_OPTIONS = (
    *("-T", "-o", "BatchMode=yes"),  # nobody is there to type a password
    *("-o", "ConnectTimeout=15"),
    *("-o", "LogLevel=ERROR"),  # what ssh says is our error message
    *("-o", "ControlMaster=no"),  # one of the user's is used; ours would outlive the run
    *("-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none"),  # meant for a person's session
)
_HINTS = (
    (
        "Could not resolve hostname",
        "write its address into the hostfile, or make the name known (DNS, /etc/hosts)",
    ),
    ("Permission denied", "`ssh {name} true` must work without a password: see ssh-copy-id"),
    ("Host key verification failed", "connect once by hand and compare the key of the host"),
    ("IDENTIFICATION HAS CHANGED", "connect once by hand and compare the key of the host"),
    ("Connection refused", "start its ssh server, or set experiment.runner.ssh_port"),
    ("No route to host", "the host is down, or the network between is cut"),
    ("timed out", "the host is down, or a firewall drops the connection"),
    ("No such container", "start the container on that host, or mend experiment.runner.docker"),
    ("command not found", "install it on that host"),
)
_NOISE = re.compile(r"^(@|Warning:|\s*$)")


def argv_of(target: Target) -> list[str]:
    """Return the command that starts the agent on a target."""
    words = ["sh", "-c", script(target)]
    if target.docker:
        words = ["docker", "exec", "-i", target.docker, *words]
    if target.transport == "local":
        return words
    ssh = shlex.split(os.environ.get("FLAGSCALE_SSH", "")) or ["ssh"]
    options = list(_OPTIONS)
    for flag, value in (("-p", target.port), ("-l", target.user), ("-J", target.jump)):
        if value is not None:
            options += [flag, str(value)]
    # The host's login shell, whichever it is, gets one quoted command line.
    return [*ssh, *options, "--", target.name, shlex.join(words)]


def explain(target: Target, said: str) -> str:
    """Turn what ssh or the shell said on its error output into one line with what to do."""
    lines = [line.strip() for line in said.splitlines() if not _NOISE.match(line)]
    words = lines[-1] if lines else "the connection ended without a word"
    for pattern, hint in _HINTS:
        if any(pattern in line for line in said.splitlines()):
            return f"{words}: {hint.format(name=target.name)}"
    return words
