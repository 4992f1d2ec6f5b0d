"""What can go wrong, as data.

- TrainError             what every error of this package is; has an exit code
  - InvalidInput         the experiment, a file or an option is wrong (exit 2)
  - NotFound             no such run, or no whole checkpoint where one is needed (exit 3)
  - RunFailed            the training itself failed (exit 4)
"""

__all__ = ["InvalidInput", "NotFound", "RunFailed", "TrainError"]


class TrainError(Exception):
    """Root of this package's errors.

    Attributes:
        exit_code: what a command line exits with when this error ends it: 2 wrong input, 3 not found or not
            ready, 4 the run itself failed.
    """

    exit_code = 4


class InvalidInput(TrainError):
    """What the user gave cannot be trained or tokenized as it is."""

    exit_code = 2


class NotFound(TrainError):
    """There is no such run, or no whole checkpoint in that directory."""

    exit_code = 3


class RunFailed(TrainError):
    """The training started and failed."""
