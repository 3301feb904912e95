"""Methods by name. They register through the entry-point group `subgraph_peft.passes`; the core names none of them."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from .errors import MethodError, suggestion
from .method import Method
from .written import WRITTEN, define

GROUP = "subgraph_peft.passes"


@cache
def methods() -> Mapping[str, type[Method]]:
    """Every installed method by its `name`. An entry point is a method class, or a module whose `__all__` has some."""
    found: dict[str, type[Method]] = {}
    for point in entry_points(group=GROUP):
        loaded = point.load()
        candidates = [loaded] if isinstance(loaded, type) else [getattr(loaded, n) for n in loaded.__all__]
        for cls in candidates:
            if isinstance(cls, type) and issubclass(cls, Method) and cls.name:
                if found.get(cls.name, cls) is not cls:
                    raise MethodError(
                        f"Two methods are called {cls.name!r}: {found[cls.name]} and {cls} ({point.value})."
                    )
                found[cls.name] = cls
    return dict(sorted(found.items()))


def method_class(name: str, beside: Mapping[str, type[Method]] = MappingProxyType({})) -> type[Method]:
    """The installed method of that name, or the one among those `beside` them."""
    known = {**methods(), **beside}
    if name not in known:
        raise MethodError(f"Unknown method {name!r}.{suggestion(name, known)} Methods: {', '.join(known)}.")
    return known[name]


def read(spelled: Any) -> Method:
    """A method from its configuration: `"lora"`, `{"lora": {"r": 8}}`, or `{"method": {definition}}`."""
    if isinstance(spelled, Method):
        return spelled
    if isinstance(spelled, str):
        return method_class(spelled)()
    if isinstance(spelled, Mapping) and len(spelled) == 1:
        name, options = next(iter(spelled.items()))
        return define(options or {}) if name == WRITTEN else method_class(name)(**(options or {}))
    raise MethodError(f"A method is written as a name or {{name: {{options}}}}, not {spelled!r}.")
