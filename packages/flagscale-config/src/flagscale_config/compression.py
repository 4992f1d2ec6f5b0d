"""FlagScale's `compress:` section: a model made smaller by llm-compressor."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from flagscale_config.base import Bool, Float, FrozenMap, Model, Positive, Text

__all__ = ["Compression", "Quantization"]

_ClassName = Annotated[Text, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]


class CompressLogging(Model):
    """How the task reports."""

    log_interval: Positive | None = None
    """Steps between two reports."""
    tensorboard_log_interval: Positive | None = None
    """Steps between two entries in TensorBoard."""
    wandb_project: Text | None = None
    """Project in Weights & Biases."""
    wandb_exp_name: Text | None = None
    """Run in Weights & Biases."""


class CompressSystem(Model):
    """Where the task writes, and how the model is spread."""

    save_dir: Text | None = None
    """Folder of the compressed model."""
    tensor_model_parallel_size: Positive = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: Positive = 1
    """Stages into which the layers are divided."""
    sequence_parallel: Bool = False
    """Whether activations are split along the sequence."""
    use_flash_attn: Bool = False
    """Whether flash attention is used."""
    logging: CompressLogging | None = None
    """How it reports."""


class CompressModel(Model):
    """The model to compress."""

    model_cls: _ClassName | None = None
    """Class of transformers that loads it, such as `AutoModelForCausalLM`."""
    model_path: Text | None = None
    """Name or path of the model."""
    device_map: Text | FrozenMap[str, Any] | None = None
    """Devices, such as `cuda:0` or `auto`."""
    torch_dtype: Text | None = None
    """Number format."""
    trust_remote_code: Bool = False
    """Whether code that comes with the model may run."""
    low_cpu_mem_usage: Bool = False
    """Whether the model is loaded piece by piece."""


class TokenizerArgs(Model):
    """The tokenizer of the calibration data."""

    tokenizer_path: Text | None = None
    """Name or path of the tokenizer; the model's by default."""
    special_tokens_file: Text | None = None
    """File of special tokens (Emu3)."""
    trust_remote_code: Bool = False
    """Whether code that comes with the tokenizer may run."""
    use_fast: Bool | None = None
    """Whether the fast tokenizer is used."""


class CompressData(Model):
    """The data by which quantization is calibrated."""

    data_path: Text | None = None
    """Path of the data; some schemes need none."""
    batch_size: Positive | None = None
    """Sequences per batch."""
    max_seq_len: Positive | None = None
    """Tokens per sequence at most."""
    max_seq_length: Positive | None = None
    """The same, as the scripts of single models call it."""
    max_calib_data: Positive | None = None
    """Sequences used at most."""
    num_calibration_samples: Positive | None = None
    """The same, as the scripts of single models call it."""
    tokenizer_args: TokenizerArgs | None = Field(
        default=None, validation_alias=AliasChoices("tokenizer_args", "tokenzier_args")
    )
    """The tokenizer. FlagScale spells the key `tokenzier_args`; both are read."""


class Gptq(Model):
    """GPTQ: round weights so that the layer's output changes least."""

    blocksize: Positive = 128
    """Columns rounded together."""
    percdamp: Annotated[Float, Field(gt=0)] = 0.01
    """Damping, as a part of the mean of the diagonal."""


class Algorithm(Model):
    """How weights are rounded; plain rounding when none is given."""

    gptq: Gptq | None = None
    """GPTQ."""


Scheme = Literal[
    "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "INT8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4",
    "NVFP4A16", "MXFP4", "MXFP4A16",
]  # fmt: skip
"""Schemes of llm-compressor: bits of weights and activations."""


class Quantization(Model):
    """One quantization."""

    scheme: Scheme | None = None
    """Number formats of weights and activations."""
    targets: tuple[Text, ...] | Text | None = None
    """Kinds of layers that are quantized."""
    ignore: tuple[Text, ...] = ()
    """Layers left as they are; `re:` starts a regular expression."""
    algo: Algorithm | None = None
    """How weights are rounded."""


class CompressArgs(Model):
    """What is done to the model."""

    quantization: tuple[Quantization, ...] = ()
    """Quantizations, in order."""
    scheme: Scheme | None = None
    """Number formats, where there is one quantization (newer files)."""
    targets: tuple[Text, ...] | Text | None = None
    """Kinds of layers, where there is one quantization (newer files)."""


class Compression(Model):
    """A compress task."""

    system: CompressSystem = CompressSystem()
    """Where it writes."""
    model: CompressModel = CompressModel()
    """The model."""
    data: CompressData = CompressData()
    """The calibration data."""
    compress_args: CompressArgs = CompressArgs()
    """What is done."""
