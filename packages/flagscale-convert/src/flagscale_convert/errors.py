"""What can go wrong, as data.

- ConvertError           what every error of this package is; has an exit code (2: the user's input is wrong)
  - SourceNotFound       there is no checkpoint at that place (3)
  - SourceDamaged        a checkpoint is there, but unfinished, truncated or contradicting itself (3)
  - UnsafePickle         a pickle asks for a name that no checkpoint needs; nothing of it was executed (2)
  - Unsupported          a format, architecture or field that cannot be converted faithfully (2)
  - DestinationRefused   the place to write to holds something else (2)
  - WriteFailed          the destination could not be written: disk full, limit, permission (4)
"""

from __future__ import annotations

__all__ = [
    "ConvertError",
    "DestinationRefused",
    "SourceDamaged",
    "SourceNotFound",
    "UnsafePickle",
    "Unsupported",
    "WriteFailed",
]


class ConvertError(Exception):
    """Root of this package's errors.

    Attributes:
        exit_code: what a command line exits with when this error ends it: 2 wrong input, 3 not found or not
            whole, 4 the conversion itself failed.
    """

    exit_code = 2


class SourceNotFound(ConvertError):
    """There is no checkpoint at that place."""

    exit_code = 3


class SourceDamaged(ConvertError):
    """A checkpoint is there, but it is unfinished, truncated or contradicts itself."""

    exit_code = 3


class UnsafePickle(ConvertError):
    """A pickle asks for a name that no checkpoint needs. Nothing of it was executed."""


class Unsupported(ConvertError):
    """A format, architecture or field that cannot be converted faithfully."""


class DestinationRefused(ConvertError):
    """The place to write to cannot be made, or holds something that must not be lost or mixed."""


class WriteFailed(ConvertError):
    """The destination could not be written."""

    exit_code = 4
