"""What can go wrong, as data.

- ServeError             what every error of this package is; has an exit code
  - InvalidService       what was asked cannot be served as written (exit 2)
  - InvalidModel         the model directory is not whole (exit 2)
  - EngineMissing        the engine is not installed where it should run (exit 3)
  - NotServing           no such run, or it does not answer yet (exit 3)
  - RunFailed            the run ended, or never got ready (exit 4)
  - RequestFailed        the server refused or broke off a request (exit 4)
"""

__all__ = [
    "EngineMissing",
    "InvalidModel",
    "InvalidService",
    "NotServing",
    "RequestFailed",
    "RunFailed",
    "ServeError",
]


class ServeError(Exception):
    """Root of this package's errors.

    Attributes:
        exit_code: what a command line exits with when this error ends it: 2 wrong input, 3 not found or not
            ready, 4 the run itself failed.
    """

    exit_code = 4


class InvalidService(ServeError):
    """What was asked contradicts itself, the machine or what an engine can do."""

    exit_code = 2


class InvalidModel(ServeError):
    """A model directory is missing, unreadable or not whole."""

    exit_code = 2


class EngineMissing(ServeError):
    """The engine cannot be imported by the Python that should run it."""

    exit_code = 3


class NotServing(ServeError):
    """No run there, or it does not answer yet."""

    exit_code = 3


class RunFailed(ServeError):
    """The engine ended by itself or did not get ready in time."""


class RequestFailed(ServeError):
    """The server refused a request or broke it off."""
