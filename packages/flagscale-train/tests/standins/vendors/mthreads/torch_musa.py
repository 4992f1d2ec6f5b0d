"""Stands in for Moore Threads' plug-in of torch."""

import device_on_cpu

device_on_cpu.add("musa", "MUSA_VISIBLE_DEVICES", "mccl")
