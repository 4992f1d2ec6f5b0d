"""Computes the logits of a checkpoint by Megatron itself, to compare another engine with.

`python -m flagscale_train.worker.logits --flagscale-tokens IN.json --flagscale-output OUT.safetensors
<megatron arguments>`: one process, fp32; the input is a JSON list of equally long lists of token ids, the
output one tensor `logits` of shape [batch, sequence, vocabulary without padding].
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flagscale_train.events import Journal
from flagscale_train.worker.refusal import Refusal
from flagscale_train.worker.session import prepare
from flagscale_train.worker.settings import Settings

__all__ = ["main"]


def main() -> int:
    """Compute and write the logits named on the command line; 1 if refused."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--flagscale-tokens", type=Path, required=True)
    parser.add_argument("--flagscale-output", type=Path, required=True)
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    settings = Settings.from_environment()
    try:
        _compute(own.flagscale_tokens, own.flagscale_output, settings)
    except Refusal as refusal:
        Journal(settings.events).write("error", rank=0, type="Refusal", text=str(refusal))
        print(f"error: {refusal}", file=sys.stderr, flush=True)  # noqa: T201 -- the log is this process's output
        return 1
    return 0


def _compute(tokens_path: Path, output_path: Path, settings: Settings) -> None:
    arguments = prepare(settings)
    args = arguments()
    model = _load_model(args, Journal(settings.events))

    import torch
    from megatron.training import get_tokenizer
    from safetensors.torch import save_file

    tokens = torch.tensor(json.loads(tokens_path.read_text(encoding="utf-8")), dtype=torch.long)
    vocab_size = int(get_tokenizer().vocab_size)
    if int(tokens.max()) >= args.padded_vocab_size:
        raise Refusal(
            f"{tokens_path}: token {int(tokens.max())}: the model knows 0 to {args.padded_vocab_size - 1}"
        )
    rows = []
    with torch.no_grad():
        for row in tokens:  # one at a time: logits of a large vocabulary are what fills the memory
            row_1s = row[None].to(torch.cuda.current_device())
            positions_1s = torch.arange(row.numel(), device=row_1s.device)[None]
            logits_1sv = model(row_1s, positions_1s, None)
            rows.append(logits_1sv[..., :vocab_size].float().cpu())
    partial = output_path.with_name(output_path.name + ".partial")
    save_file({"logits": torch.cat(rows).contiguous()}, partial)
    partial.replace(output_path)


def _load_model(args: Any, journal: Journal) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.initialize import initialize_megatron

    from flagscale_train.checkpoints import choose
    from flagscale_train.worker.megatron import build_model
    from flagscale_train.worker.recorder import Recorder
    from flagscale_train.worker.resume import Keeper

    if choose(Path(args.load), args.ckpt_step).path is None:
        raise Refusal(f"{args.load}: no whole checkpoint: train and save first, or name another with --load")
    Keeper(Recorder(journal, None)).attach()
    initialize_megatron()
    model = build_model(args, ProcessGroupCollection.use_mpu_process_groups())
    model.to(_device())
    training.load_checkpoint([model], None, None)
    model.eval()
    return model


def _device() -> Any:
    """The device of this process; the CPU adapter answers on a CPU."""
    import torch

    return torch.cuda.current_device()


if __name__ == "__main__":
    raise SystemExit(main())
