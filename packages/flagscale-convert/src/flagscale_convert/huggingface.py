"""Read Hugging Face model directories: `config.json` and safetensors, by positions, without the library.

Only the header of each file is parsed; tensor bytes are read where they lie. `.bin` files are pickles that
must be loaded whole, so they are refused with the way to turn them into safetensors.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_convert.errors import SourceDamaged, SourceNotFound, Unsupported
from flagscale_convert.positioned import PositionedFiles
from flagscale_convert.tensors import DTYPES, TensorInfo

__all__ = ["CONFIG", "INDEX", "SINGLE", "HuggingFaceSource", "read_json"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceNotFound: no such file.
        SourceDamaged: not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceNotFound(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise SourceDamaged(f"{path}: is not JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise SourceDamaged(f"{path}: holds a {type(value).__name__}: a JSON object is needed")
    return value


class HuggingFaceSource:
    """A model directory as a source of tensors.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards with their index.

    Raises:
        SourceNotFound: no safetensors there.
        SourceDamaged: a shard is missing or truncated, or a header is wrong.
        Unsupported: only `.bin` files are there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = PositionedFiles(directory)
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        listed = self._shards()
        for file in sorted(set(listed.values())) or [SINGLE]:
            self._add_file(file)
        for name, file in listed.items():
            if name not in self._places or self._places[name].file != file:
                raise SourceDamaged(
                    f"{directory / INDEX}: `{name}` should be in {file}, which does not hold it: copy the"
                    " model again"
                )

    def _shards(self) -> dict[str, str]:
        """Read which file holds which tensor; empty when there is a single file."""
        if (self.directory / INDEX).exists():
            listed = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise SourceDamaged(f"{self.directory / INDEX}: has no `weight_map`: copy it again")
            for file in listed.values():
                if not isinstance(file, str) or Path(file).name != file:
                    raise SourceDamaged(
                        f"{self.directory / INDEX}: file name ({file!r}): only plain names are read"
                    )
            return listed
        if (self.directory / SINGLE).exists():
            return {}
        bins = sorted(path.name for path in self.directory.glob("*.bin"))
        if bins:
            raise Unsupported(
                f"{self.directory}: weights are in {bins[0]}: pickled .bin files must be loaded whole and can"
                " execute"
                " code, only safetensors are read: save the model again with"
                " `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
            )
        raise SourceNotFound(f"{self.directory}: has neither {SINGLE} nor {INDEX}: give a model directory")

    def _add_file(self, file: str) -> None:
        path = self.directory / file
        header, start = self._header(file)
        end = self.files.size(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                begin, stop = entry["data_offsets"]
                info = TensorInfo(entry["dtype"], tuple(int(size) for size in entry["shape"]))
                is_wrong = info.dtype not in DTYPES or stop - begin != info.size_bytes or begin < 0
            except (KeyError, TypeError, ValueError) as error:
                raise SourceDamaged(
                    f"{path}: header of `{name}` is wrong ({error}): copy the file again"
                ) from error
            if is_wrong:
                raise SourceDamaged(
                    f"{path}: `{name}` has {stop - begin} bytes for {info.dtype} {list(info.shape)}"
                )
            if start + stop > end:
                raise SourceDamaged(
                    f"{path}: has {end} bytes, `{name}` ends at {start + stop}: the file is truncated: copy"
                    " it again"
                )
            if name in self._places:
                raise SourceDamaged(
                    f"{path}: `{name}` is in {self._places[name].file} too: remove one of the files"
                )
            self._tensors[name] = info
            self._places[name] = _Place(file, start + begin)

    def _header(self, file: str) -> tuple[dict[str, Any], int]:
        path = self.directory / file
        size = self.files.size(file)
        prefix: np.ndarray = np.zeros(8, np.uint8)
        if size >= len(prefix):
            self.files.read_into(file, 0, prefix, what="the header")
        if prefix.tobytes() == b"version ":
            raise SourceNotFound(
                f"{path}: is a Git LFS pointer, not the weights: run `git lfs pull` in that directory"
            )
        (length,) = struct.unpack("<Q", prefix.tobytes())
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise SourceDamaged(
                f"{path}: header length ({length}) does not fit its {size} bytes: copy the file again"
            )
        data = np.empty(length, np.uint8)
        self.files.read_into(file, 8, data, what="the header")
        try:
            header = json.loads(data.tobytes())
        except (ValueError, RecursionError) as error:
            raise SourceDamaged(f"{path}: header is not JSON ({error}): copy the file again") from error
        if not isinstance(header, dict):
            raise SourceDamaged(f"{path}: header is a {type(header).__name__}: an object is needed")
        return header, 8 + length

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name every tensor, in the order of the files."""
        return self._tensors

    def rename(self, patterns: Sequence[tuple[str, str]]) -> None:
        """Take tensors under the names one version of transformers gave them for those of another.

        Args:
            patterns: regular expressions and what stands for them; each is tried on every name, in order.

        Raises:
            SourceDamaged: two tensors would have one name.
        """
        for pattern, replacement in patterns:
            compiled = re.compile(pattern)
            for name in list(self._tensors):
                new = compiled.sub(replacement, name)
                if new == name:
                    continue
                if new in self._tensors:
                    raise SourceDamaged(
                        f"{self.directory}: `{name}` and `{new}` are the same tensor: the model was"
                        " saved by two versions of transformers: remove one of the two"
                    )
                self._tensors[new], self._places[new] = self._tensors.pop(name), self._places.pop(name)

    def divide(self, name: str, parts: Sequence[str], *, shape: tuple[int, ...]) -> bool:
        """Take a tensor as equal parts that lie one behind the other.

        Args:
            name: the tensor; afterwards gone.
            parts: names of the parts, in the order of their bytes.
            shape: of each part.

        Returns:
            False, and nothing changed, when the parts are not the whole.
        """
        info, place = self._tensors[name], self._places[name]
        part = TensorInfo(info.dtype, shape)
        if part.size_bytes * len(parts) != info.size_bytes:
            return False
        del self._tensors[name], self._places[name]
        for number, named in enumerate(parts):
            self._tensors[named] = part
            self._places[named] = _Place(place.file, place.offset + number * part.size_bytes)
        return True

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on."""
        place, info = self._places[name], self._tensors[name]
        offset = place.offset + start * info.row_bytes
        if out.flags.c_contiguous:
            self.files.read_into(place.file, offset, out, what=f"`{name}`")
            return
        scratch = np.empty(out.shape, np.uint8)
        self.files.read_into(place.file, offset, scratch, what=f"`{name}`")
        out[...] = scratch

    def close(self) -> None:
        """Close the files."""
        self.files.close()
