"""The CPU platform: points the host-side facts of `torch.cuda` that Megatron uses at the CPU.

Megatron's trainer speaks to `torch.cuda` everywhere: for the device of a tensor, for streams and events, for
the random generator, for memory counters. On a machine without a GPU each of these fails although nothing
about them needs one. `install()` replaces exactly what is listed in `REDIRECTS`, each entry with the reason
it is there. It patches torch for the whole process, so it is called only when the CPU was chosen, and before
megatron is imported. Megatron itself is not changed but for its two functions that read torch's CUDA
generator through private parts of torch, the one that brings the experts' token counts to the host, and the
collectives by which a distributed optimizer of one rank would send all gradients and weights to itself.

What does not live here: anything about layers, optimizers or data, which are the same on every device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["REDIRECTS", "Redirect", "install"]

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Names of options in glibc's malloc.h."""
_TOP_PAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Redirect:
    """One attribute that is replaced on a CPU."""

    owner: Any
    """The module or class that has the attribute."""
    name: str
    to: Any
    why: str


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, (str, torch.device)) else False


def _always(value: Any) -> Callable[..., Any]:
    def answer(*_arguments: Any, **_named: Any) -> Any:
        return value

    return answer


class _Stream:
    """A CPU works through its operations in order, so every stream is the same one."""

    cuda_stream = 0

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything given to a CPU stream is done."""
        return True

    def record_event(self, event: Any = None) -> Any:
        """Record now."""
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    """An event is a point in time."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self.time_s = 0.0

    def record(self, _stream: Any = None) -> None:
        """Take the time."""
        self.time_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds from this event to `other`."""
        return (other.time_s - self.time_s) * 1e3


@dataclass(frozen=True)
class _Properties:
    """What `get_device_properties` says of a CPU; capability 0.0 switches no GPU-only path on."""

    name: str = "cpu"
    major: int = 0
    minor: int = 0
    multi_processor_count: int = os.cpu_count() or 1
    total_memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes(*_arguments: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_info(*_arguments: Any) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def _stream_context(_stream: Any = None) -> Iterator[None]:
    yield


def _get_rng_state(*_arguments: Any, **_named: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_arguments: Any, **_named: Any) -> None:
    torch.default_generator.set_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _call_now(function: Callable[[], Any], **_named: Any) -> None:
    function()


class _Generators:
    """`torch.cuda.default_generators`: every index is the CPU's generator."""

    def __getitem__(self, _index: Any) -> Any:
        return torch.default_generator


def _factory(name: str) -> Callable[..., torch.Tensor]:
    real = getattr(torch, name)

    @functools.wraps(real)
    def create(*arguments: Any, **named: Any) -> torch.Tensor:
        if _is_cuda(named.get("device")):
            named["device"] = _CPU
        if named.get("pin_memory"):
            named["pin_memory"] = False
        return real(*arguments, **named)

    return create


_real_to, _real_type = torch.Tensor.to, torch.Tensor.type


def _to(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    if arguments and _is_cuda(arguments[0]):
        arguments = (_CPU, *arguments[1:])
    if _is_cuda(named.get("device")):
        named["device"] = _CPU
    return _real_to(self, *arguments, **named)


def _type(self: torch.Tensor, *arguments: Any, **named: Any) -> Any:
    result = _real_type(self, *arguments, **named)
    if arguments or named:
        return result
    return result.replace("torch.", "torch.cuda.", 1)


def _itself(self: Any, *_arguments: Any, **_named: Any) -> Any:
    return self


_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand",
    "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_ASKED = "Megatron refuses to start, or picks no device, without it"
_ORDER = "a CPU has one queue that is always in order: waiting is already done"
_RANDOM = "the CPU's one generator stands for the device's; seeds must be set, or ranks draw the same"
_MEMORY = "memory reports read it; on a CPU it is the process's own memory"
_PLACE = "tensors asked for on cuda are made on the CPU"

_cuda = torch.cuda
REDIRECTS: tuple[Redirect, ...] = (
    Redirect(_cuda, "is_available", _always(value=True), _ASKED),
    Redirect(_cuda, "is_initialized", _always(value=True), _ASKED),
    Redirect(_cuda, "_lazy_init", _always(None), "there is no driver to start"),
    Redirect(_cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _ASKED),
    Redirect(_cuda, "current_device", _always(_CPU), "used as `device=torch.cuda.current_device()`"),
    Redirect(_cuda, "set_device", _always(None), "every local rank has the same CPU"),
    Redirect(_cuda, "get_device_properties", _always(_Properties()), _ASKED),
    Redirect(_cuda, "get_device_capability", _always((0, 0)), _ASKED),
    Redirect(_cuda, "get_device_name", _always("cpu"), "log lines"),
    Redirect(_cuda, "is_current_stream_capturing", _always(value=False), "a CPU captures no graphs"),
    Redirect(_cuda, "synchronize", _always(None), _ORDER),
    Redirect(_cuda, "Stream", _Stream, _ORDER),
    Redirect(_cuda, "Event", _Event, _ORDER),
    Redirect(_cuda, "current_stream", _always(_Stream()), _ORDER),
    Redirect(_cuda, "default_stream", _always(_Stream()), _ORDER),
    Redirect(_cuda, "set_stream", _always(None), _ORDER),
    Redirect(_cuda, "stream", _stream_context, _ORDER),
    Redirect(_cuda, "empty_cache", _always(None), _MEMORY),
    Redirect(_cuda, "memory_allocated", _resident_bytes, _MEMORY),
    Redirect(_cuda, "max_memory_allocated", _resident_bytes, _MEMORY),
    Redirect(_cuda, "memory_reserved", _resident_bytes, _MEMORY),
    Redirect(_cuda, "max_memory_reserved", _resident_bytes, _MEMORY),
    Redirect(_cuda, "reset_peak_memory_stats", _always(None), _MEMORY),
    Redirect(_cuda, "memory_stats", lambda *_arguments, **_named: defaultdict(int), _MEMORY),
    Redirect(_cuda, "mem_get_info", _memory_info, _MEMORY),
    Redirect(_cuda, "default_generators", _Generators(), _RANDOM),
    Redirect(
        _cuda, "_lazy_call", _call_now, "torch would queue the call until a driver starts, that is for ever"
    ),
    *(
        Redirect(owner, name, to, _RANDOM)
        for owner in (_cuda, _cuda.random)
        for name, to in (
            ("get_rng_state", _get_rng_state),
            ("set_rng_state", _set_rng_state),
            ("manual_seed", _seed),
            ("manual_seed_all", _seed),
        )
    ),
    *(
        Redirect(_cuda.nvtx, name, _always(None), "no profiler listens")
        for name in ("range_push", "range_pop")
    ),
    *(Redirect(torch, name, _factory(name), _PLACE) for name in _FACTORIES),
    Redirect(torch.Tensor, "to", _to, _PLACE),
    Redirect(torch.Tensor, "cuda", _itself, _PLACE),
    Redirect(torch.nn.Module, "cuda", _itself, _PLACE),
    Redirect(torch.Tensor, "pin_memory", _itself, "pinning asks the driver"),
    Redirect(torch.Tensor, "record_stream", _always(None), _ORDER),
    Redirect(
        torch.Tensor,
        "type",
        _type,
        "the optimizer compares this text with `torch.cuda.FloatTensor` and the like",
    ),
    Redirect(
        torch.accelerator,
        "is_available",
        _always(value=False),
        "DataLoader would pin memory through the driver",
    ),
    Redirect(torch.accelerator, "current_accelerator", _always(None), "as above"),
    *(
        Redirect(_cuda, name, getattr(torch, name), "typed tensors made by name")
        for name in (
            "BoolTensor",
            "ByteTensor",
            "DoubleTensor",
            "FloatTensor",
            "HalfTensor",
            "IntTensor",
            "LongTensor",
        )
    ),
)
"""Everything that is replaced, and why."""


def install() -> None:
    """Make this process train on the CPU. Call once, before megatron is imported."""
    for redirect in REDIRECTS:
        setattr(redirect.owner, redirect.name, redirect.to)
    _keep_freed_memory()
    _rename_platform()
    _redirect_megatron()


def _keep_freed_memory() -> None:
    """Let malloc use freed memory again instead of giving it back to the system.

    A GPU has torch's caching allocator; a CPU has malloc, which by default maps every large tensor anew, so
    that each step pays for the faults of all its pages. A step needs as much as the one before, so what is
    kept is about the peak. Other libraries than glibc are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def _rename_platform() -> None:
    """Let the platform that Megatron-LM-FL chose, that of torch.cuda, name the device that tensors have."""
    with contextlib.suppress(ModuleNotFoundError):  # Megatron itself has no platforms
        from megatron.plugin import platform

        platform.get_platform().device_name = _always("cpu")


def _redirect_megatron() -> None:
    """Replace what Megatron itself decides by the kind of a tensor or takes from private parts of torch."""
    import logging

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    to_host = moe_utils.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Hand out numbers where Megatron expects them, also from a tensor that is here already."""
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return to_host(tensor, as_numpy=as_numpy, record_stream=record_stream)

    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move

    def get_state(_device: Any = None, *, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:  # noqa: ARG001
        return torch.default_generator.get_state()

    def set_state(state: torch.Tensor, _device: Any = None, *, graph_safe: bool = False) -> None:  # noqa: ARG001
        torch.default_generator.set_state(state)

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # Here the two generators are one, so a change of the CPU's state inside a forked context is what is
    # meant.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Skip a collective of one rank in place, for which gloo would copy all of it twice and change nothing.

    One that is waited for later is not skipped: Megatron would wait for nothing at all.
    """

    @functools.wraps(collective)
    def collect(output: torch.Tensor, given: torch.Tensor, *, group: Any, **named: Any) -> Any:
        in_place = output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
        if in_place and group.size() == 1 and not named.get("async_op"):
            return None
        return collective(output, given, group=group, **named)

    return collect
