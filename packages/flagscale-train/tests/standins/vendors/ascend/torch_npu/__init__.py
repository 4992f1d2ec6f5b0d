"""Stands in for Ascend's plug-in of torch."""

import device_on_cpu
import torch

device_on_cpu.add("npu", "ASCEND_RT_VISIBLE_DEVICES", "hccl")
npu = torch.npu
