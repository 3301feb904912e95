"""Options that differ by site: `{"*.query": {"r": 16}}` beside a method's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import MethodError, SelectorError, nearest
from ..base.patterns import Pattern
from ..graph.site import Site
from ..method.method import Method, Wrapper

FREE = {"r", "alpha", "dropout"}  # options that a schedule takes site by site
Patterns = Mapping[str, Mapping[str, Any]]


def with_options(method: Method, options: Mapping[str, Any]) -> Method:
    """The method with some options changed; those that a wrapper does not have are its inner method's."""
    inner = {name: value for name, value in options.items() if name not in type(method).model_fields}
    own = {name: getattr(method, name) for name in type(method).model_fields}
    if inner and isinstance(method, Wrapper):
        own["of"], inner = with_options(method.of, inner), {}
    return type(method)(**{**own, **{n: v for n, v in options.items() if n in own}, **inner})


def variants(method: Method, patterns: Patterns, sites: Sequence[Site]) -> tuple[tuple[str, Method], ...]:
    """(site name, method) of every site that a pattern matches; of several patterns the last one counts.

    Raises SelectorError for a pattern that matches none of the sites, MethodError for an unknown option.
    """
    found: dict[str, Method] = {}
    for text, options in patterns.items():
        pattern = Pattern(text)
        matched = [site for site in sites if pattern.match((site.owner, site.name)) != "no"]
        head = pattern.blocks and pattern.blocks[0]
        if not matched and head and any(head.match((site.owner, site.name)) != "no" for site in sites):
            raise SelectorError(f"The pattern {text!r} names row blocks; options differ from weight to weight.")
        if not matched:
            close = ", ".join(nearest(pattern.body, [site.owner for site in sites]))
            raise SelectorError(
                f"The pattern {text!r} matches none of the {len(sites)} selected sites. Nearest: {close}."
            )
        if not isinstance(options, Mapping) or not options:
            raise MethodError(f"The pattern {text!r} needs options, such as {{r: 4}}, not {options!r}.")
        changed = with_options(method, options)
        fixed = ", ".join(sorted(set(options) - FREE))
        if fixed and any(layer.defines("schedule") for layer in method.layers()):
            raise MethodError(
                f"The pattern {text!r} changes {fixed}, but the schedule of {method.name} is one for all its sites; a "
                f"pattern may change {', '.join(sorted(FREE))}. Rewrite those sites by an adapter of their own."
            )
        if changed.shared(sites) != method.shared(sites):
            raise MethodError(f"The pattern {text!r} changes tensors that all sites of {method.name} share.")
        found |= {site.name: changed for site in matched}
    return tuple((name, changed) for name, changed in found.items() if changed != method)
