"""Read the pickles of a checkpoint without executing anything in them.

Every global a pickle names becomes an inert record of ours, so no class or function of torch, Megatron or
anything else is ever imported or called. A name outside the list of what checkpoints hold is refused by name,
because a file that asks for `posix.system` deserves an alarm and not a shrug.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from flagscale_convert.errors import SourceDamaged, UnsafePickle

__all__ = ["Record", "as_mapping", "load"]

_ALLOWED_MODULES = ("torch", "megatron", "flagscale", "transformer_engine", "numpy", "omegaconf")
_ALLOWED_NAMES = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("signal", "Signals"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("_codecs", "encode"),
    ("datetime", "timedelta"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("__builtin__", "set"),
}
# What a broken or hostile stream makes the unpickler raise; nothing of ours raises these in between.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    UnicodeDecodeError,
    ValueError,
)


class Record:
    """Stands where an object of some other library was pickled: its type's name, arguments and state."""

    path = "?"
    """Dotted name of the pickled type or function."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Make a record; the arguments are kept, not interpreted."""
        record = super().__new__(cls)
        record.args = args
        record.state = kwargs or None
        record.items = {}
        return record

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Take an element of a pickled list subclass."""
        self.items[len(self.items)] = value

    def __call__(self, *args: Any, **_kwargs: Any) -> Record:
        """Stand in for calling what was pickled; nothing is called."""
        return Record(*args)

    def __hash__(self) -> int:
        return id(self)

    def field(self, name: str, default: Any = None) -> Any:
        """Read an attribute that the pickle would have set."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BufferedIOBase, where: str) -> None:
        super().__init__(stream)
        self._where = where
        self._types: dict[str, type[Record]] = {}

    def find_class(self, module_name: str, global_name: str) -> type[Record]:
        """Give the inert stand-in of a global, or refuse the name."""
        root = module_name.partition(".")[0]
        if root not in _ALLOWED_MODULES and (module_name, global_name) not in _ALLOWED_NAMES:
            raise UnsafePickle(
                f"{self._where}: the pickle asks for `{module_name}.{global_name}`: no checkpoint needs that,"
                " nothing"
                " was executed: do not load this file with other tools, get the checkpoint from a source you"
                " trust"
            )
        path = f"{module_name}.{global_name}"
        if path not in self._types:
            self._types[path] = type(global_name.rpartition(".")[2], (Record,), {"path": path})
        return self._types[path]

    def persistent_load(self, pid: Any) -> Any:
        """Keep torch's reference to a storage as the tuple it is."""
        return pid


def load(data: bytes, *, where: str) -> Any:
    """Unpickle into plain containers and `Record`s.

    Args:
        data: the whole pickle.
        where: names the file (and part of it) in messages.

    Raises:
        UnsafePickle: it names a global that no checkpoint holds.
        SourceDamaged: it is not a whole pickle.
    """
    try:
        return _Unpickler(io.BytesIO(data), where).load()
    except _PICKLE_ERRORS as error:
        raise SourceDamaged(
            f"{where}: not a readable pickle ({type(error).__name__}: {error}): the file is truncated or"
            " corrupt:"
            " copy the checkpoint again"
        ) from error


def as_mapping(value: Any) -> Mapping[str, Any]:
    """View a plain dict, a pickled `Namespace` or an `OrderedDict` as a mapping; anything else is empty."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Record):
        # A dict of some class has items, and often attributes besides (torch's state dicts have `_metadata`).
        return value.state if not value.items and isinstance(value.state, dict) else value.items
    return {}
