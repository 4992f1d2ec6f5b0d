"""Stands in for Moore Threads' module that lets torch.cuda mean their chips."""

import device_on_cpu

device_on_cpu.let_cuda_mean("musa")
