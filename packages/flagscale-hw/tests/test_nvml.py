"""The library route, against a library made of Python functions."""

# ruff: noqa: N802 - the names are those of the library
from __future__ import annotations

import ctypes

import pytest

from flagscale_hw.backends.nvml import describe

LOST, NOT_SUPPORTED, DENIED = 15, 3, 4


class FakeLibrary:
    """NVML with two cards, the second of which is broken in parts."""

    def __init__(self, *, init: int = 0, lost: tuple[int, ...] = (), cut: tuple[int, ...] = ()) -> None:
        self._init = init
        self._cut = cut
        self._lost = lost
        self.rows, self.errors = (3, 0, 0, 0), 0
        texts = {
            LOST: b"GPU is lost",
            NOT_SUPPORTED: b"Not Supported",
            DENIED: b"Insufficient Permissions",
            9: b"Driver Not Loaded",
            6: b"Not Found",
        }
        self.nvmlErrorString = lambda code: texts[code]

    def nvmlInit_v2(self):
        return self._init

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlSystemGetDriverVersion(self, buffer, _size):
        buffer.value = b"570.1"
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 100
        return LOST if index.value in self._lost else 0

    def nvmlDeviceGetName(self, _handle, buffer, _size):
        buffer.value = b"NVIDIA H200"
        return 0

    def nvmlDeviceGetUUID(self, handle, buffer, _size):
        buffer.value = b"GPU-%d" % handle.value
        return 0

    def nvmlDeviceGetMemoryInfo(self, _handle, memory):
        memory._obj.total, memory._obj.used = 141 << 30, 0
        return 0

    def nvmlDeviceGetUtilizationRates(self, _handle, rates):
        rates._obj.gpu = 42
        return 0

    def nvmlDeviceGetTemperature(self, _handle, _sensor, value):
        value._obj.value = 36
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, value):
        value._obj.value = 75500
        return DENIED if handle.value == 101 else 0

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle, value):
        value._obj.value = 700000
        return 0

    def nvmlDeviceGetSerial(self, _handle, buffer, _size):
        buffer.value = b"165"
        return 0

    def nvmlDeviceGetEccMode(self, _handle, now, later):
        now._obj.value, later._obj.value = 1, 0
        return 0

    def nvmlDeviceGetRemappedRows(self, handle, *values):
        for value, told in zip(values, self.rows, strict=True):
            value._obj.value = told
        return NOT_SUPPORTED if handle.value == 101 else 0

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, since, count):
        assert (kind.value, since.value) == (1, 0)
        count._obj.value = self.errors
        return NOT_SUPPORTED if handle.value == 101 else 0

    def nvmlDeviceGetMigMode(self, handle, now, later):
        now._obj.value, later._obj.value = int(handle.value in self._cut), 1
        return 0

    def nvmlDeviceGetMaxMigDeviceCount(self, _handle, count):
        count._obj.value = 3
        return 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, _handle, number, part):
        part._obj.value = number.value + 200
        return 6 if number.value == 1 else 0  # the library leaves gaps

    def nvmlDeviceGetGpuInstanceId(self, part, value):
        value._obj.value = part.value - 193
        return 0

    def nvmlDeviceGetComputeInstanceId(self, part, value):
        value._obj.value = 0
        return DENIED if part.value == 202 else 0

    def nvmlDeviceGetPciInfo_v3(self, _handle, pci):
        pci._obj.domain, pci._obj.bus, pci._obj.device = 1, 0xD8, 0
        return 0


def test_facts_come_through_and_a_field_that_fails_is_none():
    *messages, done = describe(FakeLibrary())
    devices = [message["device"] for message in messages if "device" in message]
    assert done == {"done": True}
    assert devices[0] == {
        "chip": "nvidia",
        "index": 0,
        "driver": "570.1",
        "pci_bus": "0001:d8:00.0",
        "name": "NVIDIA H200",
        "uuid": "GPU-100",
        "compute_capability": None,  # the library has no such function
        "memory_total_bytes": 141 << 30,
        "memory_used_bytes": 0,
        "utilisation_percent": 42.0,
        "temperature_c": 36.0,
        "power_w": 75.5,
        "power_limit_w": 700.0,
        "serial": "165",
        "is_ecc_on": True,
        "is_sliced": False,
        "health": "ok",
        "health_reasons": [],
    }
    assert devices[1]["power_w"] is None
    assert devices[1]["health"] is None  # it tells nothing of its memory
    assert [message["problem"] for message in messages if "problem" in message] == [
        {"where": "nvidia 1 power_w", "text": "nvmlDeviceGetPowerUsage: Insufficient Permissions"}
    ]


@pytest.mark.parametrize(
    ("rows", "errors", "health", "reasons"),
    [
        ((0, 1, 0, 0), 0, "ok", []),  # replaced already
        ((0, 1, 1, 0), 0, "degraded", ["a broken row of its memory is replaced at the next reset"]),
        ((0, 0, 0, 0), 2, "degraded", ["2 uncorrected memory errors since the driver was loaded"]),
        (
            (0, 9, 0, 1),
            1,
            "bad",
            [
                "a broken row of its memory could not be replaced: the card must be",
                "1 uncorrected memory errors since the driver was loaded",
            ],
        ),
    ],
)
def test_health_is_that_of_the_memory(rows, errors, health, reasons):
    library = FakeLibrary()
    library.rows, library.errors = rows, errors
    device = next(message["device"] for message in describe(library) if "device" in message)
    assert (device["health"], device["health_reasons"]) == (health, reasons)


def test_a_lost_card_keeps_its_place():
    messages = list(describe(FakeLibrary(lost=(0,))))
    assert [message["device"]["index"] for message in messages if "device" in message] == [0, 1]
    assert messages[0]["problem"]["text"] == "nvmlDeviceGetHandleByIndex_v2: GPU is lost"


def test_a_cut_card_shows_its_parts_and_their_gaps():
    first, _ = [message["device"] for message in describe(FakeLibrary(cut=(100,))) if "device" in message]
    assert first["is_sliced"]
    assert [part["instance"] for part in first["slices"]] == ["7/0", None]
    assert [part["uuid"] for part in first["slices"]] == ["GPU-200", "GPU-202"]
    assert first["slices"][0]["memory_total_bytes"] == 141 << 30


def test_no_driver_is_one_problem():
    (message,) = describe(FakeLibrary(init=9))
    assert message["problem"]["text"] == "libnvidia-ml.so.1: nvmlInit_v2: Driver Not Loaded"


def test_structures_have_the_size_of_nvidias_header():
    from flagscale_hw.backends import nvml

    assert ctypes.sizeof(nvml._Memory) == 24
    assert ctypes.sizeof(nvml._Memory2) == 40
    assert ctypes.sizeof(nvml._Utilisation) == 8
    assert ctypes.sizeof(nvml._Pci) == 68
