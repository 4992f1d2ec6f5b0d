"""torchrun, with less patience for the survivors of a dead worker.

When a worker dies, torchrun asks the others to end and gives them 30 seconds, which it offers no option for.
They cannot train on without their peer, and nothing of a failed run may live longer than ten seconds. A stop
asked for by a signal keeps the 30 seconds: there the workers save a checkpoint.
"""

from __future__ import annotations

import signal
from typing import Any

from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import main

__all__ = ["main"]

_PATIENCE_S = 3

_close = PContext.close


def _close_sooner(self: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
    """Stand in for `PContext.close`; without a signal it is torchrun's own answer to an ended worker."""
    _close(self, death_sig, min(timeout, _PATIENCE_S) if death_sig is None else timeout)


if __name__ == "__main__":
    PContext.close = _close_sooner
    main()
