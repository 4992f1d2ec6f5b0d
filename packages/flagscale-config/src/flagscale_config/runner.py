"""The parts of a file's `experiment:` section, key by key: task, runner, deployment, commands.

These models are the vocabulary; an unknown key in any of them is an error. Sections of newer FlagScale
versions (heartbeat, tracing, profilers) are typed here too, whether or not a runner of ours acts on them yet.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from flagscale_config.base import (
    Bool,
    Float,
    FrozenMap,
    Int,
    Model,
    Natural,
    NonNegative,
    Port,
    Positive,
    Text,
)

__all__ = [
    "BadSteps",
    "Checkpoints",
    "CliArgs",
    "Cmds",
    "Deploy",
    "Heartbeat",
    "Request",
    "Runner",
    "Task",
    "Tracing",
]


class Task(Model):
    """What is to be done, and by which engine."""

    type: Literal["train", "serve", "inference", "compress", "rl"]
    """The kind of task; `train` and `serve` can be run by packages of ours."""
    backend: Text | None = None
    """The engine: `megatron` for training; `vllm`, `sglang`, `llama_cpp`, `transformers` for serving."""
    entrypoint: Text | None = None
    """FlagScale's script path. Accepted and not used: the engines are started by the runners themselves."""


class Request(Model):
    """One field of the request of a composed application."""

    arg: str
    """Name of the field."""
    type: str
    """A Python type as text: `str`, `Optional[str]`, `Optional[list]`."""
    required: Bool = True
    """Whether a request without it is refused."""
    default: Any = None
    """Taken when the field is absent."""


class Deploy(Model):
    """How a served model is offered."""

    use_fs_serve: Bool = True
    """True: several instances behind one router; false: the engine's own server."""
    port: Port | None = None
    """Public port; the engine's own by default."""
    name: Text | None = None
    """Route prefix of a composed application."""
    enable_composition: Bool = False
    """Whether the serve items form a graph of classes."""
    request: tuple[Request, ...] = ()
    """Request fields of a composed application."""
    working_dir: Text | None = None
    """Working directory of a composed application."""
    prefill_decode_disaggregation: Bool = False
    """Whether prompt processing and generation run in different instances."""
    prefill_num: Positive | None = None
    """Number of prefill instances."""
    decode_num: Positive | None = None
    """Number of decode instances."""
    prefill_address: Text | None = None
    """Host of the prefill instances."""
    decode_address: Text | None = None
    """Host of the decode instances."""
    prefill_decode_strategy: Literal["slo", "random", "robin"] = "slo"
    """How requests are spread over the pairs."""
    prefill_decode_log_dir: Text | None = None
    """Where the instances of a disaggregated deployment log."""
    pd_proxy_port: Port | None = None
    """Registration port of the router."""


class HardwareHealth(Model):
    """Health checks of the accelerators."""

    enabled: Bool = False
    """Whether to check."""
    interval_s: NonNegative = 60
    """Seconds between checks."""
    command_timeout_s: NonNegative = 10
    """Seconds one check may take."""
    stale_after_s: NonNegative | None = None
    """Seconds after which a result counts as missing."""


class Heartbeat(Model):
    """Signs of life of the training processes."""

    enabled: Bool = False
    """Whether processes are watched."""
    log_dir: Text | None = None
    """Where heartbeats are written."""
    publish_interval_s: NonNegative = 5
    """Seconds between two signs of life."""
    initial_process_timeout_s: NonNegative = 30
    """Seconds until the first sign of life is due."""
    process_timeout_s: NonNegative = 30
    """Seconds of silence after which a process counts as dead."""
    initial_progress_timeout_s: NonNegative = 600
    """Seconds until the first step is due."""
    progress_timeout_s: NonNegative = 300
    """Seconds without a step after which the run counts as hung."""
    checkpoint_timeout_s: NonNegative = 1800
    """Seconds a checkpoint may take."""
    failure_grace_period_s: NonNegative | None = None
    """Seconds between a failure and the stop."""
    scan_interval_s: NonNegative | None = None
    """Seconds between two looks at the heartbeats."""
    monitor_nice: Int = 10
    """Scheduling priority of the watcher."""
    expected_world_size: Natural | None = None
    """Number of processes to wait for."""
    hardware_health: HardwareHealth = HardwareHealth()
    """Checks of the accelerators."""


class Inspector(Model):
    """The collective-communication inspector of a traced run."""

    enabled: Bool = False
    """Whether to inspect."""
    plugin_library: Text | None = None
    """Path of the plug-in."""
    dump_dir: Text | None = None
    """Where it writes."""
    dump_interval_us: Natural | None = None
    """Microseconds between two dumps."""
    min_size_bytes: Natural | None = None
    """Smallest message looked at."""
    require_kernel_timing: Bool | None = None
    """Whether kernel times are needed."""
    correlation_window_s: NonNegative | None = None
    """Seconds within which two events belong together."""


class Tracing(Model):
    """Tracing of collective operations."""

    enabled: Bool = False
    """Whether to trace."""
    log_dir: Text | None = None
    """Where traces are written."""
    probe_library: Text | None = None
    """Path of the probe."""
    collective_timeout_s: NonNegative = 60
    """Seconds a collective may take."""
    delayed_enter_threshold_s: NonNegative = 30
    """Seconds after which a late rank is named."""
    checkpoint_timeout_s: NonNegative | None = None
    """Seconds a checkpoint may take."""
    p2p_timeout_s: NonNegative | None = None
    """Seconds a point-to-point message may take."""
    p2p_match_window_s: NonNegative | None = None
    """Seconds within which both ends must be seen."""
    missing_exit_timeout_s: NonNegative | None = None
    """Seconds until a missing exit is reported."""
    failure_grace_period_s: NonNegative | None = None
    """Seconds between a failure and the stop."""
    scan_interval_s: NonNegative | None = None
    """Seconds between two looks at the traces."""
    monitor_nice: Int | None = None
    """Scheduling priority of the watcher."""
    inspector: Inspector = Inspector()
    """The collective-communication inspector."""


class Checkpoints(Model):
    """What happens to the checkpoints of a training beside what Megatron's own options say."""

    enabled: Bool = True
    """Whether any is saved: false for a benchmark or a trial that nobody will resume."""
    keep_last: Positive | None = None
    """Number of whole checkpoints kept, the newest; older ones go when a newer one was verified."""


class BadSteps(Model):
    """What happens when a step's loss or gradient norm is no number, or its loss jumps."""

    action: Literal["stop", "skip", "roll_back"] = "stop"
    """`stop`: the run fails before the update. `skip`: the update is dropped. `roll_back`: training starts
    again from the newest whole checkpoint and leaves out the data seen since."""
    spike_threshold: Annotated[Float, Field(gt=0)] | None = None
    """Rise of the loss over the mean of the last 16 good steps that counts as a spike, 0.2 being 20 %; none
    by default, or Megatron's factor 10 where its option check_for_spiky_loss is given."""
    patience: Positive = 10
    """Steps left out in a row, or roll-backs in a run, after which the run stops all the same."""


class CliArgs(Model):
    """What FlagScale's command line passes into a file."""

    model_path: Text | None = None
    """Model to serve."""
    port: Port | None = None
    """Public port."""
    engine_args: FrozenMap[str, Any] | str | None = None
    """Engine options, as a mapping or JSON text."""


_RANGE = re.compile(r"([0-9]{1,6})(?::([0-9]{1,6}))?")


def _hosts(value: Any) -> Any:
    """Refuse what is neither a number of hosts nor a range of them."""
    found = _RANGE.fullmatch(str(value))
    if found is None or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise PydanticCustomError("hosts", "must be a number of at least 1, or 'min:max' with min <= max")
    return value


_Hosts = Annotated[Positive | Annotated[str, Field(pattern=f"^{_RANGE.pattern}$")], BeforeValidator(_hosts)]


class Runner(Model):
    """Where and how processes are started."""

    type: Literal["ssh", "cloud"] = "ssh"
    """How other hosts are reached; without a hostfile everything runs on this host."""
    backend: Literal["torchrun"] = "torchrun"
    """Launcher of training processes."""
    hostfile: Text | None = None
    """Path of the list of hosts; none means this host."""
    nnodes: _Hosts | None = None
    """Number of hosts, or `min:max`; all hosts of the hostfile by default."""
    nproc_per_node: Positive | None = None
    """Processes per host; the host's slots by default."""
    node_rank: Natural | None = None
    """Rank of this host in a static rendezvous."""
    master_addr: Text | None = None
    """Address of the first host."""
    master_port: Port | None = None
    """Rendezvous port on the first host."""
    rdzv_backend: Text | None = None
    """Rendezvous backend of torchrun: `c10d` or `static`."""
    rdzv_endpoint: Text | None = None
    """Rendezvous `host:port`."""
    rdzv_id: Text | None = None
    """Rendezvous name."""
    tee: Annotated[Int, Field(ge=0, le=3)] | None = None
    """torchrun's console output: 1 stdout, 2 stderr, 3 both."""
    redirects: Annotated[Int, Field(ge=0, le=3)] | None = None
    """torchrun's log redirection: 1 stdout, 2 stderr, 3 both."""
    log_dir: Text | None = None
    """Where logs go; the run directory by default."""
    per_node_task: Bool = False
    """One process per host, without torchrun."""
    no_shared_fs: Bool = False
    """Whether each host has a file system of its own."""
    ssh_port: Port | None = None
    """Port of the hosts' ssh servers."""
    docker: Text | None = None
    """Container in which commands run."""
    device_type: Text | None = None
    """Kind of device, on a cloud runner."""
    ray_port: Port = 6379
    """Port of Ray's head."""
    ray_dashboard_port: Port = 8265
    """Port of Ray's dashboard."""
    runtime_env: FrozenMap[str, Any] | str | None = None
    """Ray's runtime environment."""
    enable_monitoring: Bool = False
    """Whether a hung or failed run is detected."""
    enable_gpu_health_check: Bool = False
    """Whether accelerators are checked before the run."""
    hang_detection_timeout: Annotated[Float, Field(gt=0)] = 1800
    """Seconds without progress after which a run counts as hung."""
    cli_args: CliArgs = CliArgs()
    """What FlagScale's command line passes into a file."""
    deploy: Deploy = Deploy()
    """How a served model is offered."""
    heartbeat: Heartbeat = Heartbeat()
    """Signs of life of the training processes."""
    tracing: Tracing = Tracing()
    """Tracing of collective operations."""
    checkpoints: Checkpoints = Checkpoints()
    """What happens to the checkpoints of a training."""
    bad_steps: BadSteps = BadSteps()
    """What happens at a step that is no good."""
    nsys_bin_path: Text | None = None
    """Path of NVIDIA's profiler."""
    nsys_rep_file_path: Text | None = None
    """Report file of NVIDIA's profiler."""
    hipprof_bin_path: Text | None = None
    """Path of the HIP profiler."""
    hipprof_output_dir: Text | None = None
    """Output folder of the HIP profiler."""

    @property
    def node_bounds(self) -> tuple[int, int | None]:
        """Fewest and most hosts that `nnodes` asks for; most is None where it is not given: all there are."""
        if self.nnodes is None:
            return 1, None
        least, _, most = str(self.nnodes).partition(":")
        return int(least), int(most or least)

    @property
    def num_nodes(self) -> int | None:
        """Number of hosts: the minimum of `min:max`, 1 without a hostfile, None when the hostfile says it."""
        if self.nnodes is None:
            return 1 if self.hostfile is None else None
        return self.node_bounds[0]

    @property
    def world_size(self) -> int | None:
        """Number of processes when the file says it, else None."""
        nodes = self.num_nodes
        return None if nodes is None or self.nproc_per_node is None else nodes * self.nproc_per_node


class Cmds(Model):
    """Shell text of the user, run around the task."""

    before_start: Text | None = None
    """Run on each host before its processes start."""
    after_stop: Text | None = None
    """Run on each host after its processes have stopped."""
