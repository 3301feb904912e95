"""An adapter: one method, applied to sites, under a name; and the cost of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .method import Method
from .sites import Site


@dataclass(frozen=True)
class Adapter:
    """name: unique in its program; tensors of it live at `<owner>.<weight>_<name>.<tensor>`."""

    name: str
    method: Method
    sites: tuple[Site, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def path(self, site: Site, tensor: str) -> str:
        return f"{site.name}_{self.name}.{tensor}"

    def paths(self, site: Site) -> dict[str, str]:
        """Tensor name -> qualified name."""
        return {name: self.path(site, name) for name in self.method.tensors(site)}

    def on(self, name: str) -> bool:
        return any(site.name == name for site in self.sites)

    def all_paths(self) -> Iterator[tuple[Site, str, str]]:
        """(site, tensor name, qualified name)"""
        for site in self.sites:
            for tensor, path in self.paths(site).items():
                yield site, tensor, path


def identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)
