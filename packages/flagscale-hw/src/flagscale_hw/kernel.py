"""The two Linux process attributes that Python does not offer: sub-reaper and parent-death signal.

What does not live here: who a process is (`identity.py`), when it is ended (`ending.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = ["become_subreaper", "die_with_parent"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    # The loader's own symbols: the C library is already in every Python process, so nothing is opened here.
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def become_subreaper() -> None:
    """Adopt every orphan below the calling process, also those that started a session of their own.

    Raises:
        OSError: the kernel is older than 3.4.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int, signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to the calling process when its parent dies; exit if it is dead.

    Call it in the child right after the fork. The kernel watches the parent's *thread* that forked, so the
    parent must fork from a thread that lives as long as the parent itself.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signum))
    # The parent may have died between fork and prctl; the signal for that death will never come.
    if os.getppid() != parent_pid:
        os._exit(int(signum) + 128)
