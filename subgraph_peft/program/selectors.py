"""Selectors: patterns over module and weight paths choose sites, and row blocks of fused weights: `*.qkv_proj[q,v]`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..base.errors import SelectorError, nearest
from ..base.patterns import Pattern, expand_braces, patterns
from ..graph.site import Site

Where = str | Sequence[str] | Callable[[Site], bool]


@dataclass(frozen=True)
class Selection:
    """Sites that a selector chose, and those it met but left out, with the reason.

    blocks: of the sites of which only some row blocks are chosen, by name
    """

    sites: tuple[Site, ...]
    left_out: tuple[tuple[Site, str], ...]
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def select(
    sites: Sequence[Site],
    where: Where = "*",
    exclude: str | Sequence[str] = (),
    kinds: Sequence[str] | None = None,
) -> Selection:
    """The sites whose module or weight path matches `where` and not `exclude`.

    where:  a pattern, a list of patterns, or a predicate on a Site; `*.qkv[q,v]` takes row blocks of a fused weight
    kinds:  op forms to take; by default all, where output heads, embeddings and other forms have to be named
            (a pattern whose last part is more than wildcards)

    Raises SelectorError when a pattern matches nothing, with the nearest names.
    """
    chosen: list[Site] = []
    left_out: list[tuple[Site, str]] = []
    includes, picked = (None, {}) if callable(where) else with_blocks(patterns(where), sites)
    excludes = patterns(exclude)
    for pattern in excludes:
        if not any(pattern.match((site.owner, site.name)) != "no" for site in sites):
            raise nothing(pattern, sites, "exclude ")
    met = dict.fromkeys(includes or (), False)
    blocks: dict[str, tuple[str, ...]] = {}
    for site in sites:
        paths = (site.owner, site.name)
        if includes is None:
            verdict = "named" if where(site) else "no"
        else:
            verdicts = {pattern: pattern.match(paths) for pattern in includes}
            for pattern, result in verdicts.items():
                met[pattern] |= result != "no"
            verdict = max(verdicts.values(), key=("no", "wildcard", "named").index, default="no")
            matched = [pattern for pattern, result in verdicts.items() if result != "no"]
            if matched and all(pattern in picked for pattern in matched):
                blocks[site.name] = chosen_blocks(site, [name for pattern in matched for name in picked[pattern]])
        if verdict == "no" or any(pattern.match(paths) != "no" for pattern in excludes):
            continue
        if kinds is not None and site.kind not in kinds:
            left_out.append((site, f"kind {site.kind}"))
        elif verdict == "wildcard" and kinds is None and (reason := site.reserved):
            left_out.append((site, reason))
        else:
            chosen.append(site)
    for pattern, matched in met.items():
        if not matched:
            raise nothing(pattern, sites)
    if not chosen:
        why = "; ".join(f"{site.owner or site.name}: {reason}" for site, reason in left_out[:5])
        raise SelectorError(
            f"The selector {describe(where)} leaves no site" + (f" ({why})" if why else "") + ". "
            f"There are {len(sites)} sites: sp.sites(program) lists them."
        )
    names = {site.name for site in chosen}
    return Selection(tuple(chosen), tuple(left_out), {n: picks for n, picks in blocks.items() if n in names})


def with_blocks(
    includes: Sequence[Pattern], sites: Sequence[Site]
) -> tuple[list[Pattern], dict[Pattern, tuple[str, ...]]]:
    """(patterns of weights, block names of those that pick blocks). `…[a,b]` picks blocks where what stands before it
    matches a weight, else it is a character class."""
    found: list[Pattern] = []
    picked: dict[Pattern, tuple[str, ...]] = {}
    for pattern in (each for several in includes for each in alternatives(several)):
        head, names = pattern.blocks or (pattern, ())
        if names and any(head.match((site.owner, site.name)) != "no" for site in sites):
            found.append(head)
            picked[head] = (*picked.get(head, ()), *names)
        else:
            found.append(pattern)
    return found, picked


def alternatives(pattern: Pattern) -> list[Pattern]:
    """The patterns of a brace list that holds brackets, `{qkv[q],o}`; else the pattern itself."""
    if pattern.kind != "glob" or "{" not in pattern.body or "[" not in pattern.body:
        return [pattern]
    return [Pattern(text) for text in expand_braces(pattern.body)]


def chosen_blocks(site: Site, names: Sequence[str]) -> tuple[str, ...]:
    """The named blocks of a site in its own order, or a SelectorError."""
    known = [name for name, _, _ in site.blocks]
    for name in names:
        if name not in known:
            there = (
                f"its blocks are {', '.join(known)}" if known else "the graph does not take its result apart by rows"
            )
            raise SelectorError(f"{site.name} has no block {name!r}: {there}.")
    return tuple(name for name in known if name in names)


def describe(where: Where) -> str:
    return "predicate" if callable(where) else repr(where)


def nothing(pattern: Pattern, sites: Sequence[Site], what: str = "The selector ") -> SelectorError:
    names = [site.owner or site.name for site in sites]
    close = nearest(pattern.body, names)
    suffix = [name for name in names if name.endswith("." + pattern.body)]
    if pattern.blocks and any(pattern.blocks[0].match((site.owner, site.name)) != "no" for site in sites):
        return SelectorError(
            f"{what}{pattern.text!r} names row blocks, which only `where` takes; here a weight is whole."
        )
    hint = f" Paths are matched whole: try '*.{pattern.body}'." if suffix and pattern.kind == "glob" else ""
    return SelectorError(
        f"{what}{pattern.text!r} matches none of {len(names)} sites. Nearest: {', '.join(close)}.{hint}"
    )
