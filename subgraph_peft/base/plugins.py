"""What packages and this process add by name: classes behind the entry points of a group, and registered ones."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import SubgraphPeftError


class Plugins:
    """The classes of one kind, by their `name`. What is installed or registered later is seen.

    group:   of entry points, each a class of that kind or a module whose `__all__` has some
    kind:    their base class
    word:    what one is called in errors             error: raised where two have one name, or one cannot be loaded
    arrange: makes of the classes by name what `all` returns
    """

    def __init__(
        self, group: str, kind: type, word: str, error: type[SubgraphPeftError],
        arrange: Callable[[dict[str, type]], Mapping[str, Any]],
    ):  # fmt: skip
        self.group, self.kind, self.word, self.error, self.arrange = group, kind, word, error, arrange
        self.registered: list[type] = []
        self.seen: tuple[Any, Mapping[str, Any]] | None = None

    def register(self, cls: type) -> type:
        """Add a class for this process; a decorator too. Raises for what is none, and where another has its name."""
        if not self.fits(cls):
            raise self.error(f"{cls!r} is no subclass of {self.kind.__name__} with a `name`: none of the {self.word}.")
        self.arrange(self.by_name((*self.classes(), (cls, cls.__module__))))
        self.registered.append(cls)
        return cls

    def all(self) -> Mapping[str, Any]:
        state = (*path_state(), *self.registered)
        if self.seen is None or self.seen[0] != state:
            self.seen = state, self.arrange(self.by_name(self.classes()))
        return self.seen[1]

    def classes(self) -> Iterator[tuple[type, str]]:
        """(class, where it comes from) of each, installed ones first."""
        for point in entry_points(group=self.group):
            loaded = self.load(point)
            listed = [getattr(loaded, name, None) for name in getattr(loaded, "__all__", ())]
            fitting = list(filter(self.fits, [loaded, *listed]))
            if not fitting:
                raise self.error(
                    f"The entry point {point.name} = {point.value} ({self.group}) is no subclass of "
                    f"{self.kind.__name__} with a `name`, nor a module whose __all__ has one."
                )
            yield from ((cls, point.value) for cls in fitting)
        for cls in self.registered:
            yield cls, cls.__module__

    def fits(self, cls: Any) -> bool:
        return isinstance(cls, type) and issubclass(cls, self.kind) and bool(cls.name)

    def load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:
            raise self.error(
                f"The entry point {point.name} = {point.value} ({self.group}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Repair or uninstall the package that has it."
            ) from error

    def by_name(self, classes: Any) -> dict[str, type]:
        found: dict[str, type] = {}
        for cls, source in classes:
            if found.setdefault(cls.name, cls) is not cls:
                raise self.error(
                    f"Two {self.word} are called {cls.name!r}: {found[cls.name]} and {cls} ({source}). Rename one, or "
                    "uninstall the package that has it."
                )
        return found


def path_state() -> tuple:
    """What changes when a package is installed, removed, or put on the path."""
    return tuple((path, modified(path or ".")) for path in sys.path)


def modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
