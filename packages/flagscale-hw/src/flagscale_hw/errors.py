"""What can go wrong, as data.

- HwError                what every error of this package is; has an exit code
  - InputError           an option or argument that makes no sense (exit 2)
  - InvalidPlan          a plan that cannot be run as written (exit 2)
  - DetectError          a machine that cannot be described (exit 3)
  - HostsNotReady        a host of a run cannot be reached or used (exit 3)
  - LaunchError          the run could not be started (exit 4)
    - LaunchRefused      the port or the directory asked for cannot be had (exit 2)
  - RunNotFound          no such run, or nothing of it is left (exit 3)
"""

__all__ = [
    "DetectError",
    "HostsNotReady",
    "HwError",
    "InputError",
    "InvalidPlan",
    "LaunchError",
    "LaunchRefused",
    "RunNotFound",
]


class HwError(Exception):
    """Root of this package's errors.

    Attributes:
        exit_code: what a command line exits with when this error ends it: 2 wrong input, 3 not found or not
            ready, 4 the run itself failed.
    """

    exit_code = 4


class InputError(HwError):
    """What was asked for makes no sense on this machine, or at all."""

    exit_code = 2


class InvalidPlan(HwError):
    """The plan contradicts itself or the machine."""

    exit_code = 2


class DetectError(HwError):
    """A machine cannot be described."""

    exit_code = 3


class HostsNotReady(HwError):
    """A host of a run cannot be reached or used as it is; the message names every obstacle."""

    exit_code = 3


class LaunchError(HwError):
    """The processes of a plan could not be started."""


class LaunchRefused(LaunchError):
    """A port or a directory that the caller chose cannot be had; nothing was started, another one helps."""

    exit_code = 2


class RunNotFound(HwError):
    """No run lives in that directory."""

    exit_code = 3
