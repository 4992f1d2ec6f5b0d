"""What planning needs to know that is neither in the experiment nor in the machine: software and files.

`plan()` is pure, so this is looked up before and handed to it: which optional packages the training
interpreter has, how large the tokenizer is, and which of the named files are missing.
"""

from __future__ import annotations

import importlib.util
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale_train import splits
from flagscale_train.checkpoints import choose
from flagscale_train.chips import MEGATRON_FL, PLUGINS
from flagscale_train.data.facts import Tokenized
from flagscale_train.data.indexed import IndexedDataset, Sizes, files_of
from flagscale_train.data.vocabulary import Vocabulary
from flagscale_train.errors import InvalidInput

if TYPE_CHECKING:
    from flagscale_config import Experiment

__all__ = ["OPTIONAL", "Findings", "examine"]

OPTIONAL = ("transformer_engine", "apex", "tensorboard", "nvidia_resiliency_ext")
"""Packages whose presence changes the plan."""

_COUNTED_TOKENS = 1 << 22
"""So many ids of a dataset of other tools are read to find the highest: a tenth of a second."""


@dataclass(frozen=True)
class _Dataset:
    """What is known of one dataset."""

    prefix: str
    num_sequences: int
    max_token: int | None


@dataclass(frozen=True)
class Findings:
    """What was found; the defaults are what a GPU host is usually set up with."""

    installed: frozenset[str] = frozenset({"transformer_engine", "tensorboard"})
    """Which of `OPTIONAL` the training interpreter can import."""
    vendor_modules: frozenset[str] | None = None
    """Which modules of chips' vendors and of FlagOS it can import; None where that was not looked at."""
    tokenizer_vocab_size: int | None = None
    """Tokens of the tokenizer, where it could be read."""
    data_max_token: int | None = None
    """Highest id in the data, where the data say it."""
    problems: tuple[str, ...] = ()
    """What would make the training fail at its start, each as one sentence."""


def examine(experiment: Experiment) -> Findings:
    """Look at this interpreter and at the files an experiment names.

    Nothing is imported but found, and no file is read whole but the tokenizer's.
    """
    options = experiment.train.options if experiment.train else {}
    base = Path(experiment.cwd)
    problems: list[str] = []
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("megatron") is None:
        problems.append(
            "megatron-core and torch: not installed in this environment: pip install "
            "'flagscale-train[megatron]'"
        )
    vocabulary = _tokenizer(options, base, problems)
    if options.get("sft"):
        for _, name in splits.named(options):
            _chats(name, base, problems)
        _chat_template(options, base, problems)
        datasets = []
    else:
        looked = [_dataset(option, prefix, base, problems) for option, prefix in splits.named(options)]
        datasets = [one for one in looked if one is not None]
        problems += splits.conflicts(options, {one.prefix: one.num_sequences for one in datasets})
    _explicit_load(experiment, base, problems)
    return Findings(
        installed=frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is not None),
        vendor_modules=_vendor_modules(),
        tokenizer_vocab_size=vocabulary.size if vocabulary else _null_vocab_size(options),
        data_max_token=max((one.max_token for one in datasets if one.max_token is not None), default=None),
        problems=tuple(problems),
    )


def _vendor_modules() -> frozenset[str]:
    """Find modules by their files: importing what is above one can already ask a driver."""
    return frozenset(name for name in (MEGATRON_FL, *PLUGINS) if _is_there(name))


def _is_there(name: str) -> bool:
    top, *below = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not below:
        return spec is not None
    inside = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in inside)


def _tokenizer(options: Mapping[str, Any], base: Path, problems: list[str]) -> Vocabulary | None:
    if options.get("tokenizer_type") != "HuggingFaceTokenizer" or "tokenizer_model" not in options:
        return None
    name = str(options["tokenizer_model"])
    directory = base / name
    if not directory.exists() and name.count("/") <= 1 and not name.startswith((".", "/")):
        return None  # a name on a model hub; transformers will look it up
    try:
        return Vocabulary.read(directory)
    except InvalidInput as error:
        if not (directory / "tokenizer_config.json").exists():
            problems.append(f"tokenizer_model: {error}")
        return None  # an older tokenizer without tokenizer.json: transformers may still read it


def _null_vocab_size(options: Mapping[str, Any]) -> int | None:
    """Return the tokens of a NullTokenizer, to which older Megatrons add one for the end of a document."""
    size = options.get("vocab_size")
    if options.get("tokenizer_type") != "NullTokenizer" or size is None:
        return None
    from flagscale_config import option_table

    version = tuple(int(part) for part in option_table("megatron").version.split("+")[0].split(".")[:2])
    return int(size) + (version < (0, 18))


def _dataset(option: str, prefix: str, base: Path, problems: list[str]) -> _Dataset | None:
    """Check that a dataset is there and not damaged; return what is known of it."""
    path = base / prefix
    missing = [str(file) for file in files_of(path) if not file.exists()]
    if missing:
        problems.append(f"{option}: {prefix}: {missing[0]} is missing: give the path without .bin or .idx")
        return None
    try:
        sizes = Sizes.glance(path)
        return _Dataset(prefix, sizes.num_sequences, _max_token(path, sizes))
    except InvalidInput as error:
        problems.append(f"{option}: {error}")
        return None


def _max_token(path: Path, sizes: Sizes) -> int | None:
    """Return the highest id: as said when the dataset was made, else counted where that takes no time."""
    said = Tokenized.read(path)
    if said is not None:
        return said.max_token
    if sizes.num_tokens > _COUNTED_TOKENS:
        return None
    dataset = IndexedDataset.open(path)
    return max((max(array(dataset.typecode, piece)) for piece in dataset.pieces()), default=None)


def _chats(name: str, base: Path, problems: list[str]) -> None:
    """Check that a file of chats is there and begins with a line of JSON."""
    path = base / name
    if not path.is_file():
        problems.append(
            f"data_path: {name}: no such file: with sft give files of chats, one JSON object per line"
        )
        return
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        json.loads(first)
    except ValueError as error:
        problems.append(f"data_path: {name}:1: not JSON ({error}): one chat per line is expected")


def _chat_template(options: Mapping[str, Any], base: Path, problems: list[str]) -> None:
    directory = base / str(options.get("tokenizer_model", ""))
    if not (directory / "tokenizer.json").exists() or (directory / "chat_template.jinja").exists():
        return  # a name on a model hub, or reported already
    try:
        described = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = {}
    if not described.get("chat_template"):
        problems.append(
            f"tokenizer_model: {options['tokenizer_model']}: has no chat template, which sft renders chats "
            "by: take the tokenizer of a chat model, or put a chat_template.jinja beside it"
        )


def _explicit_load(experiment: Experiment, base: Path, problems: list[str]) -> None:
    """A checkpoint named by the user must be there; only the experiment's own may be missing."""
    options = experiment.train.options if experiment.train else {}
    own = {Path(experiment.exp_dir) / "checkpoints"} | (
        {base / str(options["save"])} if "save" in options else set()
    )
    for name in ("load", "pretrained_checkpoint"):
        if name in options and base / str(options[name]) not in own:
            root = base / str(options[name])
            step = options.get("ckpt_step") if name == "load" else None
            if choose(root, step).path is None:
                problems.append(
                    f"{name}: {root}: no whole checkpoint in it{f' of step {step}' if step else ''}"
                )
