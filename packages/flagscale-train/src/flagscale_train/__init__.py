"""Training runner of FlagScale on megatron-core's own trainer.

    import flagscale_train as train

    plan = train.plan(flagscale_config.load("qwen3/tiny", [...]), flagscale_hw.detect())
    run = train.run("experiment.yaml", ["train.model.train_iters=10"])
    print(train.status(run).progress.iteration)

Most names are loaded when first used, so that importing the package costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flagscale_train.__about__ import __version__

# Not on first use: these functions have their modules' names, and whoever imports the module first would put
# it in their place.
from flagscale_train.plan import plan
from flagscale_train.report import report

if TYPE_CHECKING:
    from flagscale_train.data import inspect, merge, tokenize, train_tokenizer
    from flagscale_train.errors import InvalidInput, NotFound, RunFailed, TrainError
    from flagscale_train.findings import Findings, examine
    from flagscale_train.logits import compute_logits
    from flagscale_train.runs import TrainStatus, list_runs, logs, run, status, stop

__all__ = [
    "Findings",
    "InvalidInput",
    "NotFound",
    "RunFailed",
    "TrainError",
    "TrainStatus",
    "__version__",
    "compute_logits",
    "examine",
    "inspect",
    "list_runs",
    "logs",
    "merge",
    "plan",
    "report",
    "run",
    "status",
    "stop",
    "tokenize",
    "train_tokenizer",
]

_HOMES = {
    "data": ("inspect", "merge", "tokenize", "train_tokenizer"),
    "errors": ("InvalidInput", "NotFound", "RunFailed", "TrainError"),
    "findings": ("Findings", "examine"),
    "logits": ("compute_logits",),
    "runs": ("TrainStatus", "list_runs", "logs", "run", "status", "stop"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
