"""What every model of this package shares: frozen, strict, documented by the docstrings of its attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "Bool",
    "Float",
    "Fraction",
    "FrozenDict",
    "FrozenMap",
    "Int",
    "Model",
    "Natural",
    "NonNegative",
    "Port",
    "Positive",
    "Scalar",
    "Text",
    "Words",
]

_K = TypeVar("_K")
_V = TypeVar("_V")


class FrozenDict(dict[_K, _V]):
    """A dict that cannot be changed, so that a frozen model is frozen all the way down."""

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError("an Experiment cannot be changed; load it again with an override")

    __setitem__ = __delitem__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse
    __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash by content, where the content is hashable."""
        return hash(frozenset(self.items()))

    def __copy__(self) -> FrozenDict[_K, _V]:
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> FrozenDict[_K, _V]:
        return self

    def __reduce__(self) -> tuple[type[FrozenDict[_K, _V]], tuple[dict[_K, _V]]]:
        return (FrozenDict, (dict(self),))


FrozenMap = Annotated[Mapping[_K, _V], AfterValidator(FrozenDict)]
"""A mapping field that cannot be changed."""


class Model(BaseModel):
    """Root of the models of this package."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_by_name=False,
        serialize_by_alias=True,
    )


def _number(value: Any) -> Any:
    """Refuse true and false where a number is meant; pydantic would read 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


def _switch(value: Any) -> Any:
    """Refuse what pydantic would read as true or false beside those words: 1, `yes`, `on`."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in {"true", "false"}):
        return value
    raise PydanticCustomError("bool_type", "must be true or false")


def _text(value: Any) -> Any:
    """Let a number stand where text is meant: ids and addresses are often digits."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _words(value: Any) -> Any:
    """Split FlagScale's comma lists; a YAML list passes."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return value


Int = Annotated[int, BeforeValidator(_number, json_schema_input_type=int)]
"""An integer; text of digits counts, as environment variables give it."""
Float = Annotated[float, BeforeValidator(_number, json_schema_input_type=float)]
"""A number."""
Bool = Annotated[bool, BeforeValidator(_switch, json_schema_input_type=bool)]
"""True or false; the words count too, as environment variables give them."""
Text = Annotated[str, BeforeValidator(_text, json_schema_input_type=str | float)]
"""Text; a number counts."""
Words = Annotated[tuple[str, ...], BeforeValidator(_words, json_schema_input_type=str | list[str])]
"""Several words: a list, or one text with commas."""
Natural = Annotated[Int, Field(ge=0)]
Positive = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Port = Annotated[Int, Field(ge=1, le=65535)]
Scalar = bool | int | float | str | None
