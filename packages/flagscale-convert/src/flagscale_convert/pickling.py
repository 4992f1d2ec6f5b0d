"""Write pickles of other libraries' objects without importing those libraries.

The counterpart of `unpickle.py`: a value made of plain containers, globals by name, calls and objects with
state is written as protocol 2, the protocol `torch.load` reads, restricted (`weights_only`) or not.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Global", "New", "Pairs", "Persistent", "dump"]


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function returns for these arguments."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class New:
    """An object made without arguments and then given its state, as dataclasses are pickled."""

    of: Global
    state: Any = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """Something kept outside the pickle; torch's storages are."""

    id: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are not hashable here."""

    items: tuple[tuple[Any, Any], ...]


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(pickle.PROTO + b"\x02")
        self._memo: dict[Global | str, int] = {}

    def write(self, value: Any) -> None:
        """Append the operations that build a value."""
        if isinstance(value, Global | str):
            self._remembered(value)
        elif value is None or isinstance(value, bool | int | float):
            self._number(value)
        elif isinstance(value, Call):
            self._sequence(value.function, value.args, pickle.REDUCE)
        elif isinstance(value, New):
            self._sequence(value.of, (), pickle.NEWOBJ)
            if value.state is not None:
                self._sequence(value.state, None, pickle.BUILD)
        elif isinstance(value, Persistent):
            self._sequence(value.id, None, pickle.BINPERSID)
        else:
            self._container(value)

    def _sequence(self, first: Any, second: Any, operation: bytes) -> None:
        self.write(first)
        if second is not None:
            self.write(second)
        self.out += operation

    def _remembered(self, value: Global | str) -> None:
        if value in self._memo:
            self.out += pickle.LONG_BINGET + struct.pack("<I", self._memo[value])
            return
        if isinstance(value, Global):
            self.out += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        else:
            encoded = value.encode()
            self.out += pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
        self._memo[value] = len(self._memo)
        self.out += pickle.LONG_BINPUT + struct.pack("<I", self._memo[value])

    def _number(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        elif isinstance(value, float):
            self.out += pickle.BINFLOAT + struct.pack(">d", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += pickle.BININT + struct.pack("<i", value)
        else:
            encoded = pickle.encode_long(value)
            self.out += pickle.LONG1 + bytes([len(encoded)]) + encoded

    def _container(self, value: Any) -> None:
        if isinstance(value, Mapping | Pairs):
            self.out += pickle.EMPTY_DICT + pickle.MARK
            for key, item in value.items if isinstance(value, Pairs) else value.items():
                self.write(key)
                self.write(item)
            self.out += pickle.SETITEMS
        elif isinstance(value, list | tuple):
            self.out += (pickle.EMPTY_LIST if isinstance(value, list) else b"") + pickle.MARK
            for item in value:
                self.write(item)
            self.out += pickle.APPENDS if isinstance(value, list) else pickle.TUPLE
        else:
            raise TypeError(
                f"cannot pickle {type(value).__name__}: only plain containers and the classes here"
            )


def dump(value: Any) -> bytes:
    """Pickle a value.

    Raises:
        TypeError: something in it is neither plain nor one of the classes of this module.
    """
    writer = _Writer()
    writer.write(value)
    return bytes(writer.out + pickle.STOP)
