"""Experiment and machine in, plan out: a pure function.

Every option Megatron gets and every variable its processes see stands in the plan; the worker adds none. What
does not live here: what a chip asks for (`chips.py`), looking at files and packages (`findings.py`), starting
(`runs.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from flagscale_hw import Machine, Plan, Process, StopPolicy, literal, peak, runtime, unknowns
from flagscale_hw import env as device_env
from flagscale_hw.target import LOCAL
from flagscale_train import documents, fine_tuning
from flagscale_train.chips import conflicts, defaults
from flagscale_train.chips import environment as chip_environment
from flagscale_train.errors import InvalidInput
from flagscale_train.events import FILE_NAME
from flagscale_train.findings import Findings

if TYPE_CHECKING:
    from flagscale_config import Experiment, Train
    from flagscale_hw import Node

__all__ = ["Layout", "checkpoint_dir", "lay_out", "options_for", "plan", "process_for"]

_SECRET = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|passw(or)?d|credentials?)(_|$)")
_STOP = StopPolicy(signal="SIGTERM", grace_s=45.0)
"""torchrun itself gives its workers 30 s to save after SIGTERM; the run's own patience must outlast that."""


@dataclass(frozen=True)
class Layout:
    """How many processes, and how they share the work."""

    num_processes: int
    """On all hosts together, the same number on each."""
    data: int
    tensor: int
    pipeline: int
    context: int
    num_nodes: int = 1

    @property
    def per_node(self) -> int:
        """Number of processes on each host."""
        return self.num_processes // self.num_nodes


def plan(
    experiment: Experiment,
    machine: Machine,
    *,
    nodes: Sequence[Node] = (),
    python: str = sys.executable,
    findings: Findings | None = None,
) -> Plan:
    """Decide everything about a training run.

    Args:
        experiment: what is asked for.
        machine: where it will run, when that is this host.
        nodes: where it will run otherwise; the first is node 0, at which all meet.
        python: interpreter of the training processes; must have torch and megatron-core.
        findings: what `examine()` found; by default a host that is set up as usual.

    Returns:
        The plan: one process on each host, torchrun, which starts one worker per rank.

    Raises:
        InvalidInput: the experiment does not train, does not fit the machine, or asks for what its chip
            cannot do.
    """
    findings = findings or Findings()
    train = _train_of(experiment)
    runner = experiment.runner
    if not nodes and (runner.hostfile is not None or (runner.num_nodes or 1) > 1):
        raise InvalidInput(
            f"experiment.runner: hostfile {runner.hostfile}, nnodes {runner.nnodes}: no hostfile was "
            "followed: give `nodes`, as find_nodes() does, or remove both"
        )
    if len(nodes) == 1 and nodes[0].target.transport == "local":
        machine, nodes = nodes[0].machine, ()
    machine = nodes[0].machine if nodes else machine
    layout = lay_out(experiment, machine, nodes)
    options = options_for(experiment, machine, findings)
    if nodes:
        processes = tuple(
            _process_of_node(experiment, rank, nodes, layout, options, python) for rank in range(len(nodes))
        )
    else:
        argv = _torchrun(python, layout, _STANDALONE, options, train.extra_args)
        environment = _environment(experiment, machine, layout, options)
        processes = (process_for(experiment, name="train", argv=argv, environment=environment),)
    return Plan(
        kind="train",
        name=experiment.name,
        processes=processes,
        stop=_STOP,
        facts=_facts(experiment, machine, nodes, layout, options),
        secrets=tuple(sorted({name for one in processes for name in one.env if _SECRET.search(name)})),
        targets=tuple(node.target for node in nodes),
        ports={"rendezvous": experiment.runner.master_port} if len(nodes) > 1 else {},
        collect=(FILE_NAME,) if nodes else (),
    )


def _process_of_node(
    experiment: Experiment,
    rank: int,
    nodes: Sequence[Node],
    layout: Layout,
    options: Mapping[str, Any],
    python: str,
) -> Process:
    node = nodes[rank]
    launcher = _STANDALONE if len(nodes) == 1 else _rendezvous(experiment, nodes)
    extra_args = _train_of(experiment).extra_args
    process = process_for(
        experiment,
        name="train" if len(nodes) == 1 else f"train-{rank}",
        argv=_torchrun(python, layout, launcher, options, extra_args),
        environment=_environment(experiment, node.machine, layout, options, node),
    )
    return replace(process, host=node.target.name, rank=rank)


def _rendezvous(experiment: Experiment, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Say where all hosts meet. Every rank and address is known, so nothing is looked up or elected.

    torchrun's elected rendezvous compares host names and waits for ever where they cannot be resolved.
    """
    master = experiment.runner.master_addr
    address = literal(master) if master else f"{{address:{nodes[0].target.name}}}"
    return (
        f"--nnodes={len(nodes)}",
        "--node-rank={node_rank}",
        "--rdzv-backend=static",
        f"--master-addr={address}",
        "--master-port={port:rendezvous}",
        "--local-addr={own_address}",
    )


def _train_of(experiment: Experiment) -> Train:
    reason = _unsupported(experiment)
    if experiment.train is None or reason is not None:
        raise InvalidInput(f"{experiment.source}: {reason}")
    return experiment.train


def _unsupported(experiment: Experiment) -> str | None:
    """Return why a task is not one that Megatron's own trainer does on one kind of chip, None when it is."""
    task, train = experiment.task, experiment.train
    if experiment.external is not None:
        return f"{task.type}: it only wraps another project's program: start that program itself"
    if experiment.native_train is not None:
        return (
            f"experiment.task.backend: {task.backend}: flagscale-train trains by Megatron, this task is for "
            "FlagScale's own trainer of robot policies"
        )
    if train is None:
        return f"experiment.task.type: {task.type}: flagscale-train runs tasks of type train"
    if train.script is not None:
        return (
            f"experiment.task.entrypoint: {task.entrypoint}: flagscale-train trains GPT models, this script "
            "trains in a way of its own"
        )
    if train.heterogeneous is not None:
        return "enable_hetero: flagscale-train trains on one kind of chip: remove it"
    is_megatron = task.backend in {None, "megatron"}
    return None if is_megatron else f"experiment.task.backend: {task.backend}: it must be megatron"


def lay_out(experiment: Experiment, machine: Machine, nodes: Sequence[Node] = ()) -> Layout:
    """Decide the number of processes and check that they fit model, batch and machines.

    Raises:
        InvalidInput: they do not.
    """
    train = _train_of(experiment)
    sizes = train.parallelism
    per_node = _per_node(experiment, nodes) if nodes else _on_machine(experiment, machine, sizes.model_size)
    count = per_node * max(1, len(nodes))
    if count % sizes.model_size:
        hosts = f" on each of {len(nodes)} hosts" if len(nodes) > 1 else ""
        raise InvalidInput(
            f"experiment.runner.nproc_per_node: {per_node}{hosts}: one copy of the model takes "
            f"{sizes.model_size} processes (tensor {sizes.tensor_model_parallel_size} x pipeline "
            f"{sizes.pipeline_model_parallel_size} x context {sizes.context_parallel_size}): use a multiple "
            f"of {sizes.model_size}"
        )
    data = count // sizes.model_size
    _check_batch(train, data)
    return Layout(
        num_processes=count,
        data=data,
        tensor=sizes.tensor_model_parallel_size,
        pipeline=sizes.pipeline_model_parallel_size,
        context=sizes.context_parallel_size,
        num_nodes=max(1, len(nodes)),
    )


def _on_machine(experiment: Experiment, machine: Machine, least: int, slots: int | None = None) -> int:
    """Return how many processes one host takes: as asked, else its slots, else its devices."""
    available = len(machine.visible) if machine.chip != "cpu" else None
    asked = experiment.runner.nproc_per_node
    count = asked or slots or available or least
    if available is not None and count > available:
        key = "nproc_per_node" if asked else "hostfile: slots"
        raise InvalidInput(
            f"experiment.runner.{key}: {count}: {machine.hostname} offers {available} "
            f"{machine.chip} devices: use at most {available}"
        )
    return count


def _per_node(experiment: Experiment, nodes: Sequence[Node]) -> int:
    chips = {node.machine.chip: node.target.name for node in nodes}
    if len(chips) > 1:
        kinds = ", ".join(f"{name} has {chip}" for chip, name in chips.items())
        raise InvalidInput(f"experiment.runner.hostfile: {kinds}: all hosts must have the same kind of chip")
    counts = {_on_machine(experiment, node.machine, 1, node.slots): node.target.name for node in nodes}
    if len(counts) > 1:
        kinds = ", ".join(f"{name} takes {count} processes" for count, name in sorted(counts.items()))
        raise InvalidInput(
            f"experiment.runner.hostfile: {kinds}: hosts must take equally many: set "
            f"experiment.runner.nproc_per_node={min(counts)}"
        )
    return next(iter(counts))


def _check_batch(train: Train, data: int) -> None:
    step = train.micro_batch_size * data
    batch = train.global_batch_size
    if batch is not None and batch % step:
        lower = max(step, batch // step * step)
        raise InvalidInput(
            f"global_batch_size: {batch}: must be a multiple of micro_batch_size x data parallel size "
            f"({train.micro_batch_size} x {data} = {step}): use {lower} or {lower + step}"
        )


def checkpoint_dir(experiment: Experiment, name: str = "save") -> str:
    """Return the absolute directory of the experiment's checkpoints: as given, else FlagScale's default."""
    given = _train_of(experiment).options.get(name)
    return str(PurePosixPath(experiment.cwd) / str(given)) if given else f"{experiment.exp_dir}/checkpoints"


def options_for(experiment: Experiment, machine: Machine, findings: Findings) -> dict[str, Any]:
    """Return every Megatron option of the run by canonical name: the user's, FlagScale's, the chip's.

    Raises:
        InvalidInput: options contradict the chip, the tokenizer or the checkpoint format.
    """
    given = _train_of(experiment).options
    problems = [*findings.problems, *conflicts(machine.chip, given, findings)]
    if given.get("ckpt_format", "torch_dist") != "torch_dist":
        problems.append(
            f"ckpt_format: {given['ckpt_format']}: checkpoints are kept as torch_dist: remove it or set it so"
        )
    problems += _upkeep_conflicts(experiment)
    if given.get("overlap_moe_expert_parallel_comm"):
        problems.append(
            "overlap_moe_expert_parallel_comm: true: the worker's forward step cannot be split that way: "
            "remove it"
        )
    vocabulary = _vocabulary(given, findings, problems)
    of_chip = defaults(machine.chip, given, findings)
    tuned = {"transformer_impl": "transformer_engine", **of_chip, **given}
    problems += [*documents.conflicts(tuned), *fine_tuning.conflicts(tuned)]
    if problems:
        raise InvalidInput("\n".join(problems))
    chosen = {
        **_flagscale_defaults(experiment, findings),
        **of_chip,
        **documents.defaults(tuned),
        **fine_tuning.defaults(tuned),
        **vocabulary,
    }
    options = {**{name: value for name, value in chosen.items() if name not in given}, **given}
    if not experiment.runner.checkpoints.enabled:
        options = {name: value for name, value in options.items() if name not in _SAVING}
    return options


def _upkeep_conflicts(experiment: Experiment) -> list[str]:
    """Say what of the experiment's rules for bad steps and checkpoints cannot hold, each as one sentence."""
    runner, given = experiment.runner, _train_of(experiment).options
    problems = []
    if runner.bad_steps.action == "roll_back" and not runner.checkpoints.enabled:
        problems.append(
            "experiment.runner.bad_steps.action: roll_back: there is nothing to go back to while "
            "checkpoints.enabled is false: use skip or stop"
        )
    if runner.bad_steps.action != "stop" and given.get("rerun_mode", "disabled") != "disabled":
        problems.append(
            f"rerun_mode: {given['rerun_mode']}: Megatron ends the run at a bad step then, before "
            f"experiment.runner.bad_steps.action {runner.bad_steps.action} is asked: remove one of them"
        )
    if runner.checkpoints.keep_last is not None and given.get("save_retain_interval") is not None:
        problems.append(
            f"experiment.runner.checkpoints.keep_last: {runner.checkpoints.keep_last}: save_retain_interval "
            f"{given['save_retain_interval']} deletes checkpoints by another rule: remove one of them"
        )
    return problems


_SAVING = ("save", "save_interval", "save_retain_interval", "async_save", "non_persistent_save_interval")


def _flagscale_defaults(experiment: Experiment, findings: Findings) -> dict[str, Any]:
    train = _train_of(experiment)
    given = train.options
    chosen: dict[str, Any] = {
        # A run continues from its own folder by default, as in FlagScale.
        "save": checkpoint_dir(experiment),
        "load": checkpoint_dir(experiment),
        "save_interval": train.train_iters or 1000,
        "eval_interval": 1000,
        "ckpt_format": "torch_dist",
        "exit_signal_handler": True,  # SIGTERM saves and ends
    }
    if "tensorboard" in findings.installed:
        chosen["tensorboard_dir"] = f"{experiment.exp_dir}/tensorboard"
    if "rerun_mode" not in given:
        # The worker judges each step itself; Megatron's check would end the run as "exited with 16".
        chosen["no_check_for_nan_in_loss_and_grad"] = True
    if given.get("wandb_project"):
        chosen["wandb_save_dir"] = f"{experiment.exp_dir}/wandb"
    if given.get("async_save") and "nvidia_resiliency_ext" not in findings.installed:
        chosen["async_strategy"] = "mcore"  # Megatron's default is that package's
    if given.get("use_distributed_optimizer"):
        chosen["dist_ckpt_optim_fully_reshardable"] = True  # so that another layout can resume
    return chosen


def _vocabulary(given: Mapping[str, Any], findings: Findings, problems: list[str]) -> dict[str, Any]:
    """Fix the padded vocabulary so that it does not depend on the tensor-parallel size.

    Megatron pads to a multiple of `make_vocab_size_divisible_by` x the tensor-parallel size. Padded rows take
    part in the softmax, so the same checkpoint would give other losses under another layout. Padding to the
    first factor alone is the same for every tensor-parallel size that divides it (128 by default, so 1, 2, 4,
    8, ...); where it does not, Megatron's own rule is left to decide.
    """
    asked, actual = given.get("vocab_size"), findings.tokenizer_vocab_size
    padded = given.get("padded_vocab_size")
    own = None if given.get("tokenizer_type") == "NullTokenizer" else asked  # there it is what makes the size
    for name, limit in (("vocab_size", own), ("padded_vocab_size", padded)):
        if actual is not None and limit is not None and actual > limit:
            problems.append(f"{name}: {limit}: the tokenizer has {actual} tokens: raise it, or remove it")
    size = max((number for number in (asked, actual) if number is not None), default=None)
    room = padded or size
    if findings.data_max_token is not None and room is not None and findings.data_max_token >= room:
        problems.append(
            f"data_path: the data hold token {findings.data_max_token}, the vocabulary ends at {room - 1}: "
            "tokenize them with this tokenizer"
        )
    if padded is not None or size is None:
        return {}
    multiple = int(given.get("make_vocab_size_divisible_by", 128))
    padded = -(-size // multiple) * multiple
    return {} if padded % int(given.get("tensor_model_parallel_size", 1)) else {"padded_vocab_size": padded}


_STANDALONE = ("--standalone", "--local-addr=127.0.0.1")


def _torchrun(
    python: str, layout: Layout, launcher: Sequence[str], options: Mapping[str, Any], extra: tuple[str, ...]
) -> tuple[str, ...]:
    from flagscale_config import render_megatron

    return (
        literal(python),
        "-m",
        "flagscale_train.worker.torchrun",
        *launcher,
        f"--nproc-per-node={layout.per_node}",
        "--max-restarts=0",
        "-m",
        "flagscale_train.worker",
        *(literal(word) for word in (*render_megatron(options), *extra)),
    )


def process_for(
    experiment: Experiment, *, name: str, argv: tuple[str, ...], environment: Mapping[str, str]
) -> Process:
    """Make the one process of a plan, in the user's directory, after the user's `cmds.before_start`."""
    before = experiment.cmds.before_start
    if before:
        # The one place with shell text, because it is the user's own; ours follows as words.
        argv = ("bash", "-c", f'{literal(before)}\nexec "$@"', "flagscale", *argv)
    return Process(name=name, argv=argv, env=dict(environment), cwd=literal(experiment.cwd))


def _environment(
    experiment: Experiment,
    machine: Machine,
    layout: Layout,
    options: Mapping[str, Any],
    node: Node | None = None,
) -> dict[str, str]:
    chosen = {
        **chip_environment(machine.chip),
        "FLAGSCALE_EVENTS": f"{{run_dir}}/{FILE_NAME}",
        "FLAGSCALE_PLATFORM": runtime(machine.chip).torch_device,
        "OMP_NUM_THREADS": str(max(1, machine.num_cpus // layout.per_node)),
        "PYTHONSAFEPATH": "1",  # a folder called megatron nearby must not be taken for Megatron
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not (options.get("use_torch_fsdp2") or options.get("use_megatron_fsdp")):
        # Megatron's overlap relies on the order of launches; with FSDP it refuses the same value.
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if machine.chip == "cpu":
        chosen["TORCH_COMPILE_DISABLE"] = "1"
        chosen["GLOO_SOCKET_IFNAME"] = "lo"  # one host: no name lookup, no firewall
    elif layout.per_node < len(machine.visible):
        chosen |= device_env(machine.visible[: layout.per_node])
    chosen |= _upkeep(experiment)
    if node is not None:
        chosen |= _network(node, layout)
    flops = _peak_flops(machine, options)
    if flops:
        chosen["FLAGSCALE_PEAK_FLOPS"] = f"{flops:.6g}"
    given: dict[str, str] = dict(experiment.envs)
    if node is not None:
        given |= experiment.device_type_envs.get(node.type or "", {})
        given |= experiment.node_envs.get(node.target.name, {})
    return {**chosen, **{name: literal(value) for name, value in given.items()}}


def _upkeep(experiment: Experiment) -> dict[str, str]:
    """Tell the worker what the experiment says of bad steps and old checkpoints beyond the defaults."""
    bad_steps, keep_last = experiment.runner.bad_steps, experiment.runner.checkpoints.keep_last
    given = _train_of(experiment).options
    is_unwatched = given.get("no_check_for_nan_in_loss_and_grad") and not given.get("check_for_spiky_loss")
    is_off = is_unwatched and bad_steps.action == "stop" and bad_steps.spike_threshold is None
    asked = {
        "FLAGSCALE_ON_BAD_STEP": ("off" if is_off else bad_steps.action, "stop"),
        "FLAGSCALE_SPIKE_THRESHOLD": (bad_steps.spike_threshold, None),
        "FLAGSCALE_BAD_STEP_PATIENCE": (bad_steps.patience, 10),
        "FLAGSCALE_KEEP_LAST": (keep_last, None),
    }
    return {name: str(value) for name, (value, default) in asked.items() if value != default}


_INTERFACE_OF = {"nccl": "NCCL_SOCKET_IFNAME", "hccl": "HCCL_SOCKET_IFNAME"}


def _network(node: Node, layout: Layout) -> dict[str, str]:
    """Name the interface by which this host reaches the first, so that no library guesses another one."""
    if layout.num_nodes == 1 or node.interface is None:
        return {}
    own = _INTERFACE_OF.get(runtime(node.machine.chip).collective_backend)
    return {name: node.interface for name in ("GLOO_SOCKET_IFNAME", own) if name}


def _peak_flops(machine: Machine, options: Mapping[str, Any]) -> float | None:
    if not machine.visible:
        return None
    dtype = (
        "fp8"
        if options.get("fp8_format")
        else "bf16"
        if options.get("bf16")
        else "fp16"
        if options.get("fp16")
        else ""
    )
    found = peak(machine.visible[0].name, dtype)
    return found.flops_per_s if found else None


def _facts(
    experiment: Experiment,
    machine: Machine,
    nodes: Sequence[Node],
    layout: Layout,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    described = experiment.model_dump(mode="json")
    described["envs"] = _masked(experiment.envs)
    for groups in ("device_type_envs", "node_envs"):
        described[groups] = {name: _masked(envs) for name, envs in getattr(experiment, groups).items()}
    return {
        "experiment": described,
        "chip": machine.chip,
        "collective_backend": runtime(machine.chip).collective_backend,
        "devices": [device.name for device in machine.visible[: layout.per_node]],
        "layout": {
            "processes": layout.num_processes,
            "data": layout.data,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            **({"nodes": layout.num_nodes} if layout.num_nodes > 1 else {}),
        },
        "megatron_options": {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
        },
        "checkpoints": checkpoint_dir(experiment),
        "events": FILE_NAME,
        "warnings": list(unknowns({one.target.name: one.machine for one in nodes} or {LOCAL: machine})),
    }


def _masked(envs: Mapping[str, str]) -> dict[str, str]:
    return {name: "***" if _SECRET.search(name) else value for name, value in envs.items()}
