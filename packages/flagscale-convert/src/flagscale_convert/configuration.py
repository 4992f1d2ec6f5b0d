"""A model's configuration alone, in the three forms people write: `config.json`, Megatron's options, YAML.

Which arguments there are, what they are called and what Megatron takes when they are left out is told by
flagscale-config's table of Megatron's own parser.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from flagscale_convert.architecture import Architecture
from flagscale_convert.errors import SourceNotFound, Unsupported
from flagscale_convert.hf_config import read_config, write_config
from flagscale_convert.huggingface import CONFIG, read_json
from flagscale_convert.locate import open_checkpoint
from flagscale_convert.megatron_args import read_args, write_args
from flagscale_convert.megatron_source import MegatronSource
from flagscale_convert.tensors import TensorInfo

__all__ = ["Configuration", "Form", "config"]

Form = Literal["yaml", "args", "hf"]
_OF_THE_RUN = frozenset(
    {
        "add_position_embedding",
        "ckpt_format",
        "disable_bias_linear",
        "expert_model_parallel_size",
        "make_vocab_size_divisible_by",
        "no_save_optim",
        "no_save_rng",
        "pipeline_model_parallel_size",
        "seq_length",
        "tensor_model_parallel_size",
        "tokenizer_model",
        "tokenizer_type",
        "use_rotary_position_embeddings",
        "virtual_pipeline_model_parallel_size",
    }
)
"""Arguments written into checkpoints that say nothing about the model, or say it twice."""
_CLASS_DEFAULTS = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""What Megatron's latent attention takes where its command line has no such option."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration in the form asked for."""

    architecture: Architecture
    text: str
    """YAML, the words of a command line in one line, or JSON."""
    notes: tuple[str, ...]
    """What was defaulted or left out, one sentence each."""


def config(
    src: str | PathLike[str],
    *,
    to: Form | None = None,
    megatron: str | None = None,
    vocab_size: int | None = None,
    vocab_divisor: int = 128,
) -> Configuration:
    """Read a model's configuration and write it in another form.

    Args:
        src: `config.json` or a directory with one, a Megatron checkpoint, or a YAML file: a FlagScale
            experiment, its `train` section or that section's `model`.
        to: `hf` for `config.json`, `args` for Megatron's command line, `yaml` for FlagScale's `model`
            section; by default `yaml` from Hugging Face and `hf` from Megatron.
        megatron: version whose options are meant; the newest known by default.
        vocab_size: true vocabulary, where the source does not tell it.
        vocab_divisor: what a Hugging Face vocabulary is padded to a multiple of.

    Raises:
        SourceNotFound: nothing to read there.
        Unsupported: a value the other side has no equal for.
    """
    if to is not None and to not in get_args(Form):
        raise Unsupported(f"to ({to}): one of {', '.join(get_args(Form))}")
    arch, notes, is_megatron = _read(Path(src), megatron, vocab_size, vocab_divisor)
    if (to or ("hf" if is_megatron else "yaml")) == "hf":
        notes.append("torch_dtype: bfloat16 written, the weights decide")
        written = write_config(arch, dtype="BF16", tokens={})
        return Configuration(arch, json.dumps(written, indent=2) + "\n", tuple(notes))
    options = _options(arch, str(src), megatron, vocab_divisor)
    text = _command_line(options, megatron) if to == "args" else _yaml(options)
    return Configuration(arch, text, tuple(notes))


def _read(
    src: Path, megatron: str | None, vocab_size: int | None, vocab_divisor: int
) -> tuple[Architecture, list[str], bool]:
    """Read an architecture from any form; the last value tells whether the form is Megatron's."""
    tensors: Mapping[str, TensorInfo] = {}
    if src.suffix in (".yaml", ".yml"):
        args = _read_yaml(src, megatron, vocab_divisor)
    elif src.is_file() or (src / CONFIG).is_file():
        file = src if src.is_file() else src / CONFIG
        found = read_config(read_json(file), where=str(file), vocab_divisor=vocab_divisor)
        return found.architecture, list(found.notes), False
    else:
        opened = open_checkpoint(src)
        if not isinstance(opened.source, MegatronSource):
            raise SourceNotFound(f"{src}: has no {CONFIG}: give a directory with one")
        args, tensors = dict(opened.source.common.args), opened.source.tensors()
    read = read_args(args, where=str(src), vocab_size=vocab_size, tensors=tensors)
    return read.architecture, list(read.notes), True


def _read_yaml(file: Path, megatron: str | None, vocab_divisor: int) -> dict[str, Any]:
    """Read Megatron's arguments from YAML, with Megatron's defaults for what is not said."""
    import yaml

    from flagscale_config import option_table
    from flagscale_config.arithmetic.patterns import layer_pattern

    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceNotFound(f"{file}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise Unsupported(f"{file}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, Mapping):
        raise Unsupported(f"{file}: holds a {type(tree).__name__}: a mapping of options is needed")
    table = option_table("megatron", megatron)
    args = {option.attribute: option.default for option in table.options.values()}
    given = _experiment_options(file) if "experiment" in tree else dict(_leaves(tree))
    for name, value in given.items():
        found = table.find(name)
        if found is None:
            near = table.nearest(name)
            hint = f": did you mean {near}?" if near else ""
            raise Unsupported(f"{file}: {name}: no option of Megatron {table.version}{hint}")
        option, is_opposite = found
        try:
            typed = option.coerce(value)
            args[option.attribute] = (
                (typed is not is_opposite) is not (option.kind == "false") if option.is_switch else typed
            )
            if option.attribute == "moe_layer_freq":
                args[option.attribute] = layer_pattern(str(typed))
        except ValueError as error:
            raise Unsupported(f"{file}: {name} ({value}): {error}") from error
    return _derived(args, file, vocab_divisor)


def _experiment_options(file: Path) -> dict[str, Any]:
    from flagscale_config import load

    train = load(file).train
    if train is None:
        raise Unsupported(f"{file}: trains nothing: give an experiment whose task is train")
    return dict(train.options)


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give options by name, whatever sections they are in."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif value is not None:
            yield str(name), value


def _derived(args: dict[str, Any], file: Path, vocab_divisor: int) -> dict[str, Any]:
    """Fill in what Megatron itself derives before it builds a model."""
    if args.get("use_rotary_position_embeddings"):
        args["position_embedding_type"] = "rope"
    if not args.get("padded_vocab_size"):
        if not args.get("vocab_size"):
            raise Unsupported(
                f"{file}: vocab_size: is not given: add it, Megatron would take it from the tokenizer"
            )
        divisor = args.get("make_vocab_size_divisible_by") or vocab_divisor
        divisor *= args.get("tensor_model_parallel_size") or 1
        args["padded_vocab_size"] = -(-args["vocab_size"] // divisor) * divisor
    args["max_position_embeddings"] = args.get("max_position_embeddings") or args.get("seq_length")
    return args


def _options(arch: Architecture, where: str, megatron: str | None, vocab_divisor: int) -> dict[str, Any]:
    """Give the options of Megatron's command line that say a model, those left out that are its defaults."""
    from flagscale_config import option_table

    table = option_table("megatron", megatron)
    args = write_args(arch, tokenizer=None, vocab_divisor=vocab_divisor, is_stacked=arch.is_uniform)
    options: dict[str, Any] = {}
    said = set(_OF_THE_RUN)
    for option in table.options.values():
        name = option.attribute
        if name not in args or name in said:
            continue
        value = args[name]
        said.add(name)
        if value == option.default or value is None:
            continue
        options[option.name] = (
            True if option.kind == "false" else _pattern(value) if isinstance(value, list) else value
        )
    for name, default in _CLASS_DEFAULTS.items():
        if name in set(args) - said and args[name] != default:
            raise Unsupported(
                f"{where}: {name} ({args[name]}): Megatron {table.version} has no option for it and takes"
                f" {default}: these options would train another model"
            )
    return options


def _pattern(layers: list[int]) -> str:
    """Write a list of zeros and ones as people do: `[0]*3+[1]*58`."""
    runs: list[tuple[int, int]] = []
    for value in layers:
        count = runs.pop()[1] if runs and runs[-1][0] == value else 0
        runs.append((value, count + 1))
    return "+".join(f"[{value}]*{count}" for value, count in runs)


def _command_line(options: Mapping[str, Any], megatron: str | None) -> str:
    from flagscale_config import render_megatron

    return shlex.join(render_megatron(options, version=megatron)) + "\n"


def _yaml(options: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump({"model": dict(options)}, sort_keys=False)
