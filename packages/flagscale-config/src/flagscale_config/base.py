"""What every model of this package shares: frozen, strict, documented by the docstrings of its attributes."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = [
    "Bool",
    "Float",
    "Fraction",
    "FrozenDict",
    "FrozenMap",
    "Int",
    "Late",
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
        defer_build=True,
        protected_namespaces=(),
        validate_by_name=False,
        serialize_by_alias=True,
    )

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Return the docstrings below the fields, by field.

        They are read from the source when somebody asks: pydantic's `use_attribute_docstrings` reads it in
        every start of every command.
        """
        found: dict[str, str] = {}
        for one in reversed(cls.__mro__):
            if issubclass(one, Model) and one is not Model:
                found.update(_docstrings(one))
        return found

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in cls.descriptions().items():
            properties[cls.model_fields[name].alias or name].setdefault("description", text)
        return schema


def _docstrings(model: type[Model]) -> Iterator[tuple[str, str]]:
    try:
        (definition,) = ast.parse(dedent(inspect.getsource(model))).body
    except OSError:  # installed without its source
        return
    for field, below in pairwise(definition.body if isinstance(definition, ast.ClassDef) else ()):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield field.target.id, inspect.cleandoc(below.value.value)


class Late:
    """Stands for a model that is imported when a value of it is first met: a file has one section of many.

    `Inference = Annotated[Any, Late("flagscale_config.inference:Inference")]`
    """

    def __init__(self, home: str) -> None:
        self._module, _, self._name = home.partition(":")

    def _model(self) -> type[Model]:
        model: type[Model] = getattr(importlib.import_module(self._module), self._name)
        return model

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any) -> Model:
            return self._model().model_validate(value)

        return core_schema.no_info_plain_validator_function(read, serialization=core_schema.any_schema())

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        model = self._model()
        model.model_rebuild()
        # As it stands in definitions it keeps its name, as any other model does.
        return handler(core_schema.definitions_schema(model.__pydantic_core_schema__, []))


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
