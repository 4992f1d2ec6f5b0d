"""Options that only some of FlagScale's Megatron scripts have: which of them hold depends on the entrypoint.

The names, types and defaults are those of the scripts' own parsers (`train_llava.py`,
`train_llava_onevision.py`, `train_qwen2_5_vl.py` and those built on it). A script also has all of Megatron's
options.
"""

from __future__ import annotations

import functools
from pathlib import PurePath
from typing import Any

from flagscale_config.options import Option, OptionTable

__all__ = ["SCRIPTS", "model_script", "script_table"]


def _switch(name: str, text: str) -> Option:
    return Option(name.replace("-", "_"), (f"--{name}",), "true", type="bool", default=False, help=text)


def _value(name: str, kind: str, default: Any, text: str) -> Option:
    return Option(name.replace("-", "_"), (f"--{name}",), "value", type=kind, default=default, help=text)


_VISION = (
    _switch("freeze-LM", "Keep the language model as it is."),
    _switch("freeze-ViT", "Keep the vision model as it is."),
    _switch("disable-vision-class-token", "Leave out the vision model's class token."),
    _switch("allow-missing-vision-projection-checkpoint", "Start the projection afresh if it is not stored."),
    _switch("use-te", "Use Transformer Engine."),
    _value("dataloader-save", "str", None, "Folder for the state of Energon's data loader."),
)
_LLAVA = (
    *_VISION,
    Option("valid_path", ("--valid-path",), "list", nargs="*", help="Validation data sets, with weights."),
    _value("dataset-config", "str", None, "File that describes the data sets."),
    _value("prompt-path", "str", None, "File of prompts."),
    _value("language-model-type", "str", None, "Which language model it is, such as qwen2_7b."),
)
_ONEVISION = (
    *_LLAVA,
    _switch("interleaved-dataset", "The data holds interleaved samples."),
    _switch("training-dataset-only", "There is no validation data."),
    _value("vision-model-type", "str", "clip", "Which vision model it is: clip or siglip."),
    _value("image-aspect-ratio", "str", "square", "How images are fitted, such as anyres_max_9."),
    _value("mm-patch-merge-type", "str", "flat", "How patches are joined: flat or spatial_unpad."),
    _value("image-grid-pinpoints", "str", None, "Grids into which images are divided."),
    _switch("use-pos-skipping", "Skip positions."),
    _value("pos-skipping-range", "int", 4096, "Positions skipped at most."),
    _value("add-faster-video", "str", None, "Add tokens of a faster video."),
    _value("mm-spatial-pool-mode", "str", "bilinear", "How features are pooled."),
    _value("mm-newline-position", "str", "grid", "Where rows of patches end."),
)
_QWEN_VL = (
    *_VISION,
    _value("extra-vocab-size", "int", 421, "Tokens beyond the tokenizer's vocabulary."),
    _value("spatial-merge-size", "int", 2, "Patches merged along each side."),
    _value("temporal-patch-size", "int", 2, "Frames per patch."),
    _value("patch-size", "int", 14, "Pixels along the side of a patch."),
    _value("max-padding-length", "int", 2048, "Tokens to which sequences are padded at most."),
    _switch("enable-variable-seq-lengths", "Let sequences differ in length."),
    _value("vision-root", "str", None, "Folder of the images."),
    _value("max-samples-per-sequence", "int", 2**31 - 1, "Samples packed into a sequence at most."),
    _value("shuffle-buffer-size", "int", 0, "Samples held for shuffling."),
    _value(
        "vision-ration", "float", 0.1, "Learning rate of the vision model, as a part of the language model's."
    ),
    _value("image-max-pixels", "int", 768 * 768, "Pixels of an image at most."),
    _value("image-min-pixels", "int", 32 * 32, "Pixels of an image at least."),
    _value("vision-recompute-layer-steps", "int", 0, "Vision layers recomputed together; 0 for none."),
    _switch("no-use-system-prompt", "Leave out the system prompt."),
    _switch("convert-checkpoint-from-megatron-to-transformers", "Convert instead of training."),
)
_OPTIONS: dict[str, tuple[Option, ...]] = {
    "train_llava": _LLAVA,
    "train_llava_onevision": _ONEVISION,
    "train_qwen2_5_vl": _QWEN_VL,
    "train_qwen3_vl": _QWEN_VL,
    "train_robobrain_x0": _QWEN_VL,
    "train_rwkv": (),
    "train_aquila_sft": (),
}
SCRIPTS = tuple(_OPTIONS)
"""Entrypoints of FlagScale that train another model, or in another way, than `train_gpt.py`."""


def model_script(entrypoint: str | None) -> str | None:
    """Return the name of the model script that an entrypoint means, None for the ordinary trainer."""
    name = PurePath(entrypoint or "").stem
    return name if name in _OPTIONS else None


@functools.cache
def script_table(script: str) -> OptionTable:
    """Return a model script's own options.

    Raises:
        KeyError: there is no such script.
    """
    return OptionTable(script, "", {option.name: option for option in _OPTIONS[script]})


@functools.cache
def homes(name: str) -> tuple[str, ...]:
    """Return the scripts that have an option."""
    return tuple(script for script in SCRIPTS if name in script_table(script))
