"""Look at a model directory before a server spends minutes on it.

Everything here reads headers only: a directory of a terabyte is checked in milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale_serve.errors import InvalidModel
from flagscale_serve.gguf import read_gguf

__all__ = ["Model", "has_chat_template", "read_gguf_model", "read_model"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.json",
    "spiece.model",
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model directory says about itself."""

    path: Path
    architecture: str
    """The class that implements it, such as `Qwen3ForCausalLM`."""
    has_chat_template: bool
    num_weight_bytes: int
    head_dim: int | None
    """Size of one attention head where the configuration tells."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """`config.json`, or the metadata of a GGUF file."""
    bytes_of: Mapping[str, int] = field(default_factory=dict)
    """Bytes of all tensors by their number format as safetensors calls it (`BF16`); empty where not known."""
    is_gguf: bool = False


def read_gguf_model(path: Path) -> Model:
    """Read the header of a GGUF file, which holds its tokenizer and its chat template too.

    Raises:
        InvalidModel: it is missing, no GGUF file, or cut short.
    """
    found = read_gguf(path)
    return Model(
        path=path,
        architecture=str(found.get("general.architecture", "unknown")),
        has_chat_template=bool(found.get("tokenizer.chat_template")),
        num_weight_bytes=path.stat().st_size,
        head_dim=None,
        config=found,
        is_gguf=True,
    )


def read_model(path: Path, *, tokenizer: Path | None = None, with_weights: bool = True) -> Model:
    """Read a model directory and refuse one that no engine could load.

    Args:
        path: the directory.
        tokenizer: another directory that has the tokenizer.
        with_weights: False when the engine is told to make up weights (`load_format: dummy`).

    Raises:
        InvalidModel: it is missing, its configuration is unreadable, a weight file is missing or cut short,
            or it
            has no tokenizer.
    """
    _check_directory(path)
    config = _read_json(
        path / "config.json", "a model directory has it: give the directory that holds config.json"
    )
    num_bytes, bytes_of = _check_weights(path) if with_weights else (0, {})
    words = tokenizer or path
    if not any((words / name).is_file() for name in _TOKENIZER_FILES):
        raise InvalidModel(
            f"{words}: no tokenizer: one of {', '.join(_TOKENIZER_FILES[:4])} is needed: copy it from the "
            "model this one was made from"
        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise InvalidModel(
            f"{path / 'config.json'}: architectures: {architectures!r}: a list with the model's class is "
            "needed, such as "
            '["Qwen3ForCausalLM"]: complete the file'
        )
    return Model(
        path=path,
        architecture=str(architectures[0]),
        has_chat_template=has_chat_template(words),
        num_weight_bytes=num_bytes,
        head_dim=_head_dim(config),
        config=config,
        bytes_of=bytes_of,
    )


def _check_directory(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        raise InvalidModel(
            f"{path}: a file: the directory of a model is needed (Hugging Face layout): give its folder"
        )
    tail = "/".join(path.parts[-2:]) if len(path.parts) > 2 else "ORG/NAME"
    raise InvalidModel(
        f"{path}: no such directory: give a model directory on this machine; one from the Hugging Face Hub "
        f"is fetched with `hf download {tail} --local-dir DIR`"
    )


def _read_json(path: Path, cure: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidModel(f"{path}: no such file: {cure}") from None
    except OSError as error:
        raise InvalidModel(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except ValueError as error:
        raise InvalidModel(f"{path}: not valid JSON ({error}): copy or write the file again") from None
    if not isinstance(data, dict):
        raise InvalidModel(f"{path}: not a JSON object: copy or write the file again")
    return data


def _check_weights(path: Path) -> tuple[int, dict[str, int]]:
    """Return the bytes of all weight files, and those of all tensors by number format."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return _check_index(index)
    found = sorted(path.glob("*.safetensors"))
    if found:
        return sum(file.stat().st_size for file in found), _added(map(_tensors, found))
    others = sorted(path.glob("pytorch_model*.bin"))
    if not others:
        raise InvalidModel(
            f"{path}: no weights: *.safetensors (or pytorch_model*.bin) is needed: finish the download or "
            "the conversion"
        )
    return sum(file.stat().st_size for file in others), {}


def _check_index(index: Path) -> tuple[int, dict[str, int]]:
    where = _read_json(index, "").get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise InvalidModel(f"{index}: weight_map: missing or empty: copy or write the file again")
    names = sorted({str(name) for name in where.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InvalidModel(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing ({_few(missing)}): "
            "finish the download or the conversion"
        )
    present = {name: _tensors(index.parent / name) for name in names}
    lost = sorted(tensor for tensor, name in where.items() if tensor not in present[str(name)])
    if lost:
        raise InvalidModel(
            f"{index}: {len(lost)} tensors are not in the files that should hold them ({_few(lost)}): "
            "finish the download or the conversion"
        )
    return sum((index.parent / name).stat().st_size for name in names), _added(present.values())


def _added(files: Iterable[Mapping[str, tuple[str, int]]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for tensors in files:
        for kind, size in tensors.values():
            total[kind] = total.get(kind, 0) + size
    return total


def _tensors(file: Path) -> dict[str, tuple[str, int]]:
    """Read a safetensors header and compare the length it promises with the file's.

    Returns:
        Tensor -> its number format and bytes.
    """
    size = file.stat().st_size
    cure = "finish the download or the conversion"
    try:
        with file.open("rb") as handle:
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise InvalidModel(f"{file}: {size} bytes: cut short, or not a safetensors file: {cure}")
            header = json.loads(handle.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        promised = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {
            name: (str(entry["dtype"]), int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]))
            for name, entry in entries.items()
        }
    except OSError as error:
        raise InvalidModel(f"{file}: cannot be read ({error.strerror}): check its permissions") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InvalidModel(f"{file}: its header is damaged: {cure}") from None
    if size != promised:
        raise InvalidModel(f"{file}: {size} bytes where its header promises {promised}: {cure}")
    return tensors


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def has_chat_template(path: Path) -> bool:
    """Tell whether the tokenizer in a directory knows how to write a conversation.

    Raises:
        InvalidModel: `tokenizer_config.json` is unreadable.
    """
    if any((path / name).is_file() for name in _TEMPLATE_FILES):
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and bool(_read_json(config, "").get("chat_template"))


def _head_dim(config: Mapping[str, Any]) -> int | None:
    given = config.get("head_dim")
    if isinstance(given, int):
        return given
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return hidden // heads
    return None
