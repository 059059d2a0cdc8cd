"""What all requests have in common: strict types, and four classes of fields.

Every field of a request is *honoured*, *accepted* with no effect on the output, known but
*unsupported* (400 by name), or unknown (400 by name). Nothing is ever ignored in silence.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

FieldClass = Literal["honoured", "accepted", "unsupported"]

_CLASS_KEY = "x-vmalloc-class"


class ApiRequest(BaseModel):
    """A request's body. Types are strict, numbers finite, unknown fields refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, data: Any) -> Any:
        """Leave out all unknown fields but the first.

        Each would get an error of its own, and a body can hold a million of them.
        """
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in data if name not in known), None)
        return {name: value for name, value in data.items() if name in known or name == unknown}


class ApiResponse(BaseModel):
    """A response's body."""

    model_config = ConfigDict(protected_namespaces=())


def accepted(default: Any = None, **kwargs: Any) -> Any:
    """A field that is taken and changes nothing about the output."""
    return Field(default, json_schema_extra={_CLASS_KEY: "accepted"}, **kwargs)


def unsupported(why: str, *neutral: Any) -> Any:
    """The type of a field that is known and cannot be honoured.

    It may be null or one of ``neutral``, which ask for what happens anyway. Use it as
    ``suffix: unsupported("text is only ever added at the end") = None``.
    """

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "not supported: {why}", {"why": why})

    allowed: list[Any] = [None, *neutral]
    return Annotated[
        Any,
        AfterValidator(check),
        WithJsonSchema({"enum": allowed, _CLASS_KEY: "unsupported", "description": why}),
    ]


def field_classes(model: type[ApiRequest]) -> dict[str, FieldClass]:
    """The class of every field, by name."""
    properties = model.model_json_schema()["properties"]
    return {name: schema.get(_CLASS_KEY, "honoured") for name, schema in properties.items()}
