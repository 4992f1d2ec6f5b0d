"""Entry of a training process.

The guard below is needed: Megatron's checkpoint writer spawns a helper process, which imports this module
again.
"""

from flagscale_train.worker.session import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
