"""Lets torch, and Megatron on top of it, find a chip that torch alone does not know.

A vendor's plug-in adds a device type to torch when it is imported (`torch_npu`, `torch_musa`, ...), and the
platforms of Megatron-LM-FL look for that type. Its trainer speaks to `torch.cuda` all the same, which the
platform itself (Ascend, Tsingmicro) or a module of its own (`torchada` for Moore Threads) lets mean the chip.
The order matters: with such a module first Megatron-LM-FL would take the chip for NVIDIA's.

No chip of this kind was there to run this on: it is proven by stand-ins for these modules.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from flagscale_train.worker.refusal import Refusal, first_line
from flagscale_train.worker.settings import Settings

__all__ = ["load"]


def load(settings: Settings) -> None:
    """Make torch and Megatron see the chip; call once, before anything else of Megatron is imported.

    Args:
        settings: `plugin`, `platform`, `megatron_platform` and `cuda_hook` of the chip.

    Raises:
        Refusal: a module is missing or broken, no device is there, or Megatron-LM-FL takes another platform.
    """
    if settings.plugin is None:
        return
    _import(settings.plugin)
    device = getattr(torch, settings.platform, None)
    if device is None or not device.is_available():
        raise Refusal(
            f"torch.{settings.platform}: {settings.plugin} finds no device: see `flagscale-hw doctor --for "
            "train`"
        )
    _select(settings)
    if settings.cuda_hook is not None and not torch.cuda.is_available():
        _import(settings.cuda_hook)
    if not torch.cuda.is_available():
        raise Refusal(
            f"torch.cuda, by which Megatron speaks to devices, does not mean {settings.platform} here"
        )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Refusal(
            f"{name}: {type(error).__name__}: {first_line(error)}: install it for torch {torch.__version__}"
        ) from error


def _select(settings: Settings) -> None:
    """Let Megatron-LM-FL select its platform, and check that it is the chip's."""
    if settings.megatron_platform is None or importlib.util.find_spec("megatron.plugin") is None:
        return
    name = _import("megatron.plugin.platform").get_platform().device_name()
    if name not in (settings.platform, settings.megatron_platform):
        raise Refusal(
            f"Megatron-LM-FL selects the platform {name}, and the chip's is {settings.megatron_platform}: "
            "see `flagscale-hw doctor --for train`"
        )
