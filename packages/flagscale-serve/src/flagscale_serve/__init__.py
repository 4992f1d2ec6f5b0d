"""Serving runner of FlagScale on vLLM, SGLang, llama.cpp and transformers.

    run("model_dir"), status(), chat(None, "Hello"), stop()

Every verb of the command line is one function here with the same name (`list` is `list_runs`).
"""

from flagscale_serve.__about__ import __version__
from flagscale_serve.bench import Benched, Measured, Workload, bench, parse_slo
from flagscale_serve.chat import chat
from flagscale_serve.errors import (
    EngineMissing,
    InvalidModel,
    InvalidService,
    NotServing,
    RequestFailed,
    RunFailed,
    ServeError,
)
from flagscale_serve.fit import Fit, fit
from flagscale_serve.generate import Progress, Sampling, generate
from flagscale_serve.hosts import find_nodes
from flagscale_serve.metrics import Load
from flagscale_serve.model import Model, read_model
from flagscale_serve.plan import plan
from flagscale_serve.runs import (
    Options,
    Prepared,
    check,
    logs,
    prepare,
    run,
    start,
    status,
    stop,
    wait_ready,
)
from flagscale_serve.service import Instance, Service, of_experiment, of_model
from flagscale_serve.state import InstanceStatus, ServiceStatus, list_runs
from flagscale_serve.targets import find_run
from flagscale_serve.tune import Trial, Tuned, parse_space, tune

__all__ = [
    "Benched",
    "EngineMissing",
    "Fit",
    "Instance",
    "InstanceStatus",
    "InvalidModel",
    "InvalidService",
    "Load",
    "Measured",
    "Model",
    "NotServing",
    "Options",
    "Prepared",
    "Progress",
    "RequestFailed",
    "RunFailed",
    "Sampling",
    "ServeError",
    "Service",
    "ServiceStatus",
    "Trial",
    "Tuned",
    "Workload",
    "__version__",
    "bench",
    "chat",
    "check",
    "find_nodes",
    "find_run",
    "fit",
    "generate",
    "list_runs",
    "logs",
    "of_experiment",
    "of_model",
    "parse_slo",
    "parse_space",
    "plan",
    "prepare",
    "read_model",
    "run",
    "start",
    "status",
    "stop",
    "tune",
    "wait_ready",
]
