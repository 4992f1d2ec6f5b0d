import device_on_cpu

device_on_cpu.let_cuda_mean("npu")
