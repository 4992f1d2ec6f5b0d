"""Stands in for the platforms of Megatron-LM-FL, over megatron-core: the same names and the same order.

The first platform whose torch device is there when this is imported is selected. Ascend's brings the hook
that lets torch.cuda mean its chip; Moore Threads' does not.
"""

import torch


class _Platform:
    def __init__(self, name):
        self._name = name

    def is_available(self):
        device = getattr(torch, self._name, None)
        return device is not None and device.device_count() > 0 and device.is_available()

    def device_name(self, device_index=None):
        return self._name if device_index is None else f"{self._name}:{device_index}"


class _Npu(_Platform):
    def is_available(self):
        if not super().is_available():
            return False
        from torch_npu.contrib import transfer_to_npu  # noqa: F401

        return True


class _Cpu(_Platform):
    def is_available(self):
        return True


_ORDER = (_Platform("cuda"), _Platform("musa"), _Npu("npu"), _Cpu("cpu"))
_registered = [platform for platform in _ORDER if platform.is_available()]


def get_platform():
    return _registered[0]
