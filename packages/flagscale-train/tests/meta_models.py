"""Build models on the meta device, where weights have shapes and no memory, and count their parameters.

`python meta_models.py REQUEST.json`: an object of Megatron's words by name; prints a line of JSON for each.
"""

import contextlib
import io
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

_MOST_BYTES = 6 << 30


def main(path):
    request = json.loads(Path(path).read_text())
    os.environ.update(TORCH_COMPILE_DISABLE="1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    # Should anything be made in memory after all, this process fails, and not the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    import torch

    with torch.device("meta"):
        # torch looks its factory functions up by name at the first call; later the adapter has wrapped them.
        assert torch.empty(1).is_meta
    from flagscale_train.worker import cpu

    cpu.install()
    from megatron.core import parallel_state

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        for name, words in request.items():
            print(json.dumps({"name": name, "parameters": _count(words)}), flush=True)


def _count(words):
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import parse_args, validate_args

    from flagscale_train.worker import lora, megatron

    sys.argv = ["meta", *words]
    with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
        args = validate_args(parse_args(lora.add_arguments))
        args.peft_type = None  # what is counted is the published model, without adapters
        args.padded_vocab_size = args.padded_vocab_size or args.vocab_size
        args.perform_initialization = False  # half the time, for values that nothing has
        model = megatron.build_model(args, ProcessGroupCollection.use_mpu_process_groups())
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1])
