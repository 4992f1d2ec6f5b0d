"""Compare what two checkpoints compute: both run by transformers on the CPU, cut to their first layers.

Each side is written as a small Hugging Face model in a temporary directory and run in a process of its own,
so that this package needs neither torch nor transformers itself. Weights alone cannot show a wrong rotary
base or router setting; this does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from os import PathLike
from pathlib import Path

import numpy as np

from flagscale_convert.errors import Unsupported
from flagscale_convert.execution import convert
from flagscale_convert.plan import make_plan

__all__ = ["logits_difference"]

_TOKENS = 32
_TIMEOUT_SECONDS = 3600
_CHILD = """
import sys
import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import transformers
named = AutoConfig.from_pretrained(sys.argv[1]).architectures
kind = getattr(transformers, (named or [""])[0], AutoModelForCausalLM)
model = kind.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
vocabulary = model.config.get_text_config().vocab_size
tokens = torch.randint(0, vocabulary, (2, int(sys.argv[3])), generator=torch.Generator().manual_seed(17))
with torch.no_grad():
    numpy.save(sys.argv[2], model(tokens).logits.float().numpy())
"""


def logits_difference(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    num_layers: int | None = 2,
    vocab_size: int | None = None,
) -> tuple[float, float]:
    """Run both and compare.

    Args:
        a: one checkpoint of any format.
        b: the other.
        num_layers: layers of each that are run, the first ones; None runs all.
        vocab_size: true vocabulary, where a checkpoint does not tell it.

    Returns:
        The largest difference of a logit, and the largest logit of the first.

    Raises:
        Unsupported: torch or transformers are not installed, or cannot run the model.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-logits-") as folder:
        results = [
            _run(side, Path(folder) / str(number), num_layers, vocab_size)
            for number, side in enumerate((a, b))
        ]
    if results[0].shape != results[1].shape:
        return float("inf"), float(np.abs(results[0]).max())
    difference = np.abs(results[0] - results[1]).max()
    return float(np.nan_to_num(difference, nan=np.inf)), float(np.abs(results[0]).max())


def _run(
    checkpoint: str | PathLike[str], folder: Path, num_layers: int | None, vocab_size: int | None
) -> np.ndarray:
    convert(make_plan(checkpoint, folder, to="hf", vocab_size=vocab_size, num_layers=num_layers))
    output = folder / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(output), str(_TOKENS)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unsupported(
            f"{checkpoint}: transformers could not run it ({last}): `verify --mode logits` needs torch and"
            " transformers in this Python, with the model's class"
        )
    return np.asarray(np.load(output))
