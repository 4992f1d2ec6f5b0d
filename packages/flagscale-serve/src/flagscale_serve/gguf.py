"""The header of a GGUF file, llama.cpp's model format (github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from flagscale_serve.errors import InvalidModel

__all__ = ["read_gguf"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_LONGEST = 1 << 24
_MAX_DIMS = 8
_CURE = "finish the download or the conversion"


def read_gguf(path: Path) -> Mapping[str, Any]:
    """Return the metadata of a GGUF file; of an array, only its length.

    Raises:
        InvalidModel: it is no GGUF file, or is cut short.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path, path.stat().st_size)
    except FileNotFoundError:
        raise InvalidModel(f"{path}: no such file: llama.cpp serves one GGUF file: give its path") from None
    except IsADirectoryError:
        found = ", ".join(sorted(one.name for one in path.glob("*.gguf"))[:3]) or "none is in it"
        raise InvalidModel(
            f"{path}: a directory: llama.cpp serves one GGUF file ({found}): give the file, or make one with "
            "llama.cpp's convert_hf_to_gguf.py"
        ) from None
    except OSError as error:
        raise InvalidModel(f"{path}: cannot be read ({error.strerror}): check its permissions") from None
    except (struct.error, OverflowError, MemoryError, UnicodeDecodeError):
        raise InvalidModel(f"{path}: its header is cut short or damaged: {_CURE}") from None


def _read(file: IO[bytes], path: Path, size: int) -> Mapping[str, Any]:
    if file.read(4) != b"GGUF":
        raise InvalidModel(f"{path}: not a GGUF file: llama.cpp serves nothing else: {_CURE}")
    version, num_tensors, num_keys = _unpack(file, "IQQ")
    if version not in _VERSIONS:
        raise InvalidModel(f"{path}: GGUF version {version}: {_VERSIONS} are read here: convert it anew")
    found = {}
    for _ in range(num_keys):
        key = _text(file)
        found[key] = _value(file, *_unpack(file, "I"))
    last = 0
    for _ in range(num_tensors):
        _text(file)
        (num_dims,) = _unpack(file, "I")
        if num_dims > _MAX_DIMS:
            raise struct.error
        *_, offset = _unpack(file, f"{num_dims}QIQ")
        last = max(last, offset)
    if num_tensors and file.tell() + last >= size:
        raise InvalidModel(f"{path}: {size} bytes, where its header places tensors behind that: {_CURE}")
    return found


def _unpack(file: IO[bytes], form: str) -> tuple[Any, ...]:
    packed = struct.Struct("<" + form)
    return packed.unpack(file.read(packed.size))


def _text(file: IO[bytes]) -> str:
    (length,) = _unpack(file, "Q")
    if length > _LONGEST:
        raise struct.error
    data = file.read(length)
    if len(data) < length:
        raise struct.error
    return data.decode("utf-8", errors="replace")


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise struct.error
        return _unpack(file, _SCALARS[kind])[0]
    inner, length = _unpack(file, "IQ")
    if inner in _SCALARS:
        file.seek(length * struct.calcsize("<" + _SCALARS[inner]), 1)
    else:
        for _ in range(length):
            _value(file, inner)
    return length
