"""Methods by name. They register in the entry-point group `subgraph_peft.passes`, or by `register`; the core names none
of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from ..base.errors import MethodError, suggestion
from ..base.plugins import Plugins
from .method import Method
from .written import WRITTEN, define

GROUP = "subgraph_peft.passes"


INSTALLED = Plugins(GROUP, Method, "methods", MethodError, lambda found: dict(sorted(found.items())))
register = INSTALLED.register


def methods() -> Mapping[str, type[Method]]:
    """Every method by its `name`: those behind installed entry points, and registered ones."""
    return INSTALLED.all()


def method_class(name: str, beside: Mapping[str, type[Method]] = MappingProxyType({})) -> type[Method]:
    """The installed method of that name, or the one among those `beside` them."""
    known = {**methods(), **beside}
    if name not in known:
        raise MethodError(f"Unknown method {name!r}.{suggestion(name, known)} Methods: {', '.join(known)}.")
    return known[name]


def read_method(spelled: Any) -> Method:
    """A method from its configuration: `"lora"`, `{"lora": {"r": 8}}`, or `{"method": {definition}}`."""
    if isinstance(spelled, Method):
        return spelled
    if isinstance(spelled, str):
        return method_class(spelled)()
    if isinstance(spelled, Mapping) and len(spelled) == 1:
        name, options = next(iter(spelled.items()))
        if name == WRITTEN:
            return define(options or {})
        cls = method_class(name)
        return cls(**with_methods(cls, options or {}))
    raise MethodError(f"A method is written as a name or {{name: {{options}}}}, not {spelled!r}.")


def with_methods(cls: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, those that are methods themselves read."""
    if not isinstance(options, Mapping):
        raise MethodError(f"{cls.name}: its options are written as {{name: value}}, not {options!r}.")
    return {
        name: read_method(value) if is_method(cls.model_fields.get(name)) else value for name, value in options.items()
    }


def is_method(field: FieldInfo | None) -> bool:
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Method)
