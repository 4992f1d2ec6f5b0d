"""What runs in every training process: the only place of this package that imports torch and megatron.

`python -m flagscale_train.worker <megatron arguments>` trains; `python -m flagscale_train.worker.logits`
computes logits of a checkpoint. Both are started by a plan (`flagscale_train.plan`), which gives them
Megatron's own arguments and these environment variables:

- `FLAGSCALE_PLATFORM`: device type in torch; `cpu` installs the CPU adapter before Megatron is imported.
- `FLAGSCALE_PLUGIN`, `FLAGSCALE_CUDA_HOOK`, `FLAGSCALE_COLLECTIVES`: a vendor's module for torch, one that
  lets `torch.cuda` mean its chip, and the backend of torch.distributed; absent where torch knows the chip.
- `FLAGSCALE_EVENTS`: file that events are appended to; without it there are none.
- `FLAGSCALE_PEAK_FLOPS`: peak FLOP/s of one device in the type trained in, for MFU; without it MFU is null.
- `FLAGSCALE_ON_BAD_STEP`, `FLAGSCALE_SPIKE_THRESHOLD`, `FLAGSCALE_BAD_STEP_PATIENCE`: the experiment's
  `runner.bad_steps`; `FLAGSCALE_KEEP_LAST`: its `runner.checkpoints.keep_last`. Absent: the defaults.
"""

__all__: list[str] = []
