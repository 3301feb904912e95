"""The base of graph passes: what it refuses, in which order passes run, and which are seen."""

import operator
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import subgraph_peft as sp
from subgraph_peft.base.plugins import Plugins
from subgraph_peft.graph import passes as passes_
from subgraph_peft.graph.addends import addends
from subgraph_peft.graph.edit import eliminate_dead_code
from subgraph_peft.graph.nodes import aten, show
from subgraph_peft.graph.passes import EquationPass, GraphPass, ProgramPass, optimisations, ordered
from subgraph_peft.graph.rewriter import META, ORIGIN, Rewriter, copied
from subgraph_peft.method import registry
from subgraph_peft.passes import optimise as builtin
from subgraph_peft.pipeline.pipeline import Pipeline, names
from subgraph_peft.program import runners
from subgraph_peft.program.internals import internals
from subgraph_peft.program.runners import specialise
from tests.installed import install


class Negated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.neg().neg()


class Negations(ProgramPass):
    """−(−x) = x"""

    name = "negations"

    def apply(self, rewrite, owner):
        for node in rewrite.graph.find_nodes(op="call_function", target=aten.neg.default):
            if node.args[0].target is node.target:
                rewrite.replace(node, node.args[0].args[0])


class Twice(sp.Method):
    """φ(W) = 2 W + s"""

    name = "twice"

    def tensors(self, site):
        return {"s": sp.trainable(1)}

    def weight(self, W, s):
        return 2.0 * W + s


class Same(EquationPass):
    """s W = s W; `met` tells how often, for every equation"""

    name = "same"
    met: ClassVar[list[int]] = []

    def apply(self, rewrite, owner):
        for node in rewrite.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            rewrite.replace(node, rewrite.add(node.target, node.args, like=node))
        self.met.append(rewrite.changes)


@pytest.fixture
def negated() -> sp.Program:
    return sp.capture(nn.Sequential(nn.Linear(4, 3), Negated()), torch.randn(2, 4))


def changes(program: sp.Program) -> dict[str, int]:
    """Places that passes have changed in the training graph of a program like this one."""
    return runners.changes(sp.optimise(sp.optimise(program, tidy=False), tidy=True).module)[True, frozenset()]


# what the base refuses


def doing(edit, name: str = "theirs") -> GraphPass:
    """A pass that does one thing to the first neg of a graph."""

    class Theirs(ProgramPass):
        def apply(self, rewrite, owner):
            edit(rewrite, rewrite.graph.find_nodes(op="call_function", target=aten.neg.default)[0])

    Theirs.name = name
    return Theirs()


def silent(rewrite: Rewriter, node: fx.Node) -> None:
    with rewrite.graph.inserting_before(node):
        node.replace_input_with(node.args[0], rewrite.graph.call_function(aten.alias.default, node.args))


def behind(rewrite: Rewriter, node: fx.Node) -> None:
    later = rewrite.add(aten.alias.default, node.args, like=node, before=rewrite.graph.output_node())
    node.args = (later,)


def failing(rewrite: Rewriter, node: fx.Node) -> None:
    raise KeyError("no such layer")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (silent, r"the node alias_default = alias\(…\) does not say where it comes from\. Add it with Rewriter\.add"),
        (behind, "RuntimeError: Argument .* of Node .* was used before it has been defined"),
        (failing, "KeyError: 'no such layer'"),
    ],
)
def test_a_pass_that_goes_wrong_is_named(negated, edit, message):
    graph = specialise(negated.module, True)
    with pytest.raises(sp.PassError, match=rf"^The optimising pass 'theirs' \({__name__}.*Theirs\): {message}"):
        doing(edit)(graph, internals(negated.module))


def test_a_pass_that_goes_wrong_fails_what_runs_it(negated, monkeypatch):
    monkeypatch.setattr(passes_.INSTALLED, "registered", [type(doing(silent))])
    with pytest.raises(sp.PassError, match="'theirs'"):
        changes(negated)
    assert "theirs" not in runners.changes(sp.optimise(negated, theirs=False).module)[True, frozenset()]


def test_a_pass_says_what_it_changed_and_added(negated):
    graph = specialise(negated.module, True)
    (node,) = graph.find_nodes(op="call_function", target=aten.neg.default)[:1]
    value = node.meta["val"]
    theirs = doing(lambda rewrite, node: rewrite.replace(node, rewrite.add(aten.alias.default, node.args, like=node)))
    found = theirs(graph, internals(negated.module))
    assert found.places == 1 and [each.name for each in found.added] == ["neg_alias"]
    (added,) = found.added
    assert added.meta["val"] is value and added.meta[ORIGIN] == "neg" and added.meta["nn_module_stack"]


def test_what_nothing_reads_is_gone_after_a_pass(negated):
    graph = specialise(negated.module, True)
    found = doing(lambda rewrite, node: rewrite.add(aten.alias.default, node.args, like=node))(
        graph, internals(negated.module)
    )
    assert found == (0, ())


# order


def named(name: str, stage: str = "graph", **order) -> type[GraphPass]:
    return type(name, (GraphPass,), {"name": name, "stage": stage, **order})


def order(*passes: type[GraphPass]) -> list[str]:
    return list(ordered({each.name: each for each in passes}))


@pytest.mark.parametrize("turned", [False, True])
def test_passes_run_before_and_after_the_ones_they_name(turned):
    a = named("a", after=("c",))
    b, c = named("b", before=("c",)), named("c")
    first, last = named("z", "equation"), named("0", "compiled")
    passes = [a, b, c, first, last]
    assert order(*(reversed(passes) if turned else passes)) == ["z", "b", "c", "a", "0"]


def test_passes_that_ask_for_nothing_run_by_name():
    assert order(named("c"), named("a"), named("b")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "passes",
    [
        [named("a", before=("b",)), named("b", before=("a",))],
        [named("a", after=("a",))],
        [named("a", after=("b",)), named("b", after=("c",)), named("c", after=("a",))],
        [named("a", "equation", after=("b",)), named("b", "graph")],
    ],
    ids=["two", "itself", "three", "a later stage"],
)
def test_passes_that_wait_for_each_other_are_refused(passes):
    with pytest.raises(sp.PassError, match="wait for each other: .*a before .*Change their `before`, `after`"):
        order(*passes)


def test_a_pass_that_names_an_unknown_one_is_refused():
    with pytest.raises(sp.PassError, match="'a' is to run before or after 'tidi', which is not.*mean 'tidy'"):
        order(named("a", after=("tidi",)), named("tidy"))


def test_the_builtin_passes_are_ordered_by_what_they_say():
    """However the module lists them."""
    listed = {cls.name: cls for cls in (getattr(builtin, name) for name in reversed(builtin.__all__))}
    assert list(ordered(listed)) == list(optimisations())


# which are seen


@pytest.mark.parametrize("name", ["tidy", "gram"])
def test_a_foreign_pass_with_the_name_of_a_builtin_is_refused(monkeypatch, tmp_path, negated, name):
    monkeypatch.setattr(Negations, "name", name)
    with pytest.raises(sp.PassError, match=f"Two optimising passes are called '{name}'.*Negations.*Rename one"):
        passes_.register(Negations)
    assert not passes_.INSTALLED.registered
    install(monkeypatch, tmp_path, passes_.GROUP, f"{__name__}:Negations")
    with pytest.raises(sp.PassError, match=f"Two optimising passes are called '{name}'"):
        changes(negated)


def test_a_pass_that_is_installed_later_runs(monkeypatch, tmp_path, negated):
    assert "negations" not in changes(negated)
    install(monkeypatch, tmp_path, passes_.GROUP, f"{__name__}:Negations")
    assert changes(negated)["negations"] == 1
    assert "negations" not in runners.changes(sp.optimise(negated, negations=False).module)[True, frozenset()]
    assert torch.equal(sp.optimise(negated, negations=False).run(), negated.run())


def test_a_pass_that_is_registered_later_runs_in_equations_traced_before(monkeypatch):
    monkeypatch.setattr(passes_.INSTALLED, "registered", [])
    program = sp.capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))

    before = show(sp.rewrite(program, Twice(), where="0").graph)
    passes_.register(Same)
    assert list(optimisations()) == ["gram", "same", *[n for n in optimisations() if n not in ("gram", "same")]]
    assert show(sp.rewrite(program, Twice(), where="0").graph) == before and Same.met == [1]


@pytest.mark.parametrize("how", ["installed", "registered"])
def test_a_method_that_comes_later_is_seen(monkeypatch, tmp_path, how):
    monkeypatch.setattr(registry.INSTALLED, "registered", [])
    with pytest.raises(sp.MethodError, match="Unknown method 'twice'"):
        registry.read_method("twice")
    assert "twice" not in names()
    if how == "installed":
        install(monkeypatch, tmp_path, registry.GROUP, f"{__name__}:Twice")
    else:
        registry.register(Twice)
    assert isinstance(registry.read_method("twice"), Twice) and "twice" in names()
    assert Pipeline.read("capture,twice{where=0}").passes[1].method == Twice()


def test_what_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "subgraph_peft.tests", "no_such_module:Thing")
    plugins = Plugins("subgraph_peft.tests", GraphPass, "passes", sp.PassError, dict)
    with pytest.raises(sp.PassError, match=r"theirs = no_such_module:Thing \(subgraph_peft\.tests\) cannot be loaded"):
        plugins.all()


@pytest.mark.parametrize("point", ["json:dumps", "math", "math:pi"])
def test_an_entry_point_that_is_no_such_class_is_named(monkeypatch, tmp_path, point):
    install(monkeypatch, tmp_path, "subgraph_peft.tests", point)
    plugins = Plugins("subgraph_peft.tests", GraphPass, "passes", sp.PassError, dict)
    with pytest.raises(sp.PassError, match=f"{point} .* is no subclass of GraphPass with a `name`"):
        plugins.all()


@pytest.mark.parametrize(
    "has, reason",
    [
        ({"name": ""}, "no subclass of GraphPass with a `name`"),
        ({"stage": "last"}, "'own' .*: it has no `stage` of equation, graph, compiled"),
        ({"before": "tidy"}, r"'own' .*: its `before` is a text .*\('tidy',\)"),
        ({"__init__": lambda self, size: None}, "'own' .*: TypeError: .*'size'"),
    ],
    ids=["name", "stage", "before", "init"],
)
def test_a_pass_that_is_none_is_refused_at_the_door(monkeypatch, has, reason):
    monkeypatch.setattr(passes_.INSTALLED, "registered", [])
    with pytest.raises(sp.PassError, match=reason):
        passes_.register(type("Own", (sp.ProgramPass,), {"name": "own", **has}))
    assert "own" not in optimisations() and not passes_.INSTALLED.registered


def test_what_is_no_method_is_refused_at_the_door(monkeypatch):
    monkeypatch.setattr(registry.INSTALLED, "registered", [])
    for given in (object, len, Twice()):
        with pytest.raises(sp.MethodError, match="no subclass of Method with a `name`"):
            registry.register(given)


# the rewriter


def test_an_added_node_carries_site_adapter_and_term():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.neg.default, (x,))
    y.meta = {"custom": {META: {"site": "0.weight", "adapter": "lora", "term": "A"}}, "val": None}
    graph.output((y,))
    added = Rewriter(graph).add(aten.add.Tensor, (x, 1), like=y)
    assert added.meta == {"custom": y.meta["custom"]} and added.next is y and added.name == "neg_default_add"
    own = Rewriter(graph).add(aten.add.Tensor, (x, 1), like=y, says={"site": "s", "adapter": "a", "term": "t"})
    assert own.meta == {"custom": {META: {"site": "s", "adapter": "a", "term": "t"}}}


def traced(function, *shapes: tuple[int, ...]) -> fx.Graph:
    graph = fx.Graph()
    given = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for node, shape in zip(given, shapes, strict=True):
        node.meta["val"] = torch.empty(shape, device="meta")
    rewrite, output = Rewriter(graph, valued=True), graph.output(())

    def add(target, *args):
        return rewrite.add(target, args, like=given[0], before=output)

    output.args = ((function(add, *given),),)
    return graph


def test_the_terms_of_a_sum():
    """−2 (a − (b / 4 + 3 c)) + d, where d is broadcast or is not opened"""
    shape = (3, 5)

    def function(add, a, b, c, d):
        inner = add(aten.add.Tensor, add(aten.div.Tensor, b, 4), add(aten.mul.Tensor, c, 3))
        outer = add(aten.mul.Tensor, add(aten.sub.Tensor, a, inner), -2.0)
        return add(aten.add.Tensor, outer, d)

    graph = traced(function, shape, shape, shape, shape)
    root = graph.output_node().args[0][0]
    found = list(addends(root, lambda node: True))
    assert [(each.scale, each.term.name) for each in found] == [(-2, "x0"), (0.5, "x1"), (6, "x2"), (1, "x3")]
    assert [each.within and each.within.target for each in found] == [None, None, aten.add.Tensor, aten.add.Tensor]
    (whole,) = addends(root, lambda node: False)
    assert whole == (1.0, root, None)
    halves = list(addends(root, lambda node: node.target is not aten.sub.Tensor))
    assert [each.scale for each in halves] == [-2.0, 1.0] and halves[0].term.target is aten.sub.Tensor


def test_a_graph_copied_by_an_emitter_has_arguments_of_its_own():
    graph = traced(lambda add, a, b: add(aten.mul.Tensor, add(aten.add.Tensor, a, b), a), (2,), (2,))
    known = dict(zip(graph.find_nodes(op="placeholder"), (2, 3), strict=True))
    numbers = {aten.mul.Tensor: operator.mul, aten.add.Tensor: operator.add}
    copies = copied(graph, known, lambda node, args, kwargs: numbers[node.target](*args, **kwargs))
    assert copies[graph.output_node().args[0][0]] == 10


# effects


def test_sweep_removes_what_has_no_effect():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.sym_max, (3, 4))
    graph.call_function(operator.mul, (x, 2))
    graph.call_function(aten.neg.default, (x,))
    for target, args in ((aten.add_.Tensor, (x, 1)), (operator.iadd, (x, 1)), (print, (x,))):
        graph.call_function(target, args)
    graph.call_method("add_", (x, 1))
    graph.output((x,))
    assert eliminate_dead_code(graph) == 3
    kept = [node.target for node in graph.nodes if node.op.startswith("call")]
    assert kept == [aten.add_.Tensor, operator.iadd, print, "add_"]


@pytest.mark.parametrize("writes", [False, True])
def test_sweep_looks_into_bodies_where_it_is_given_what_holds_them(writes):
    body = fx.Graph()
    inside = body.placeholder("x")
    body.output((body.call_function(aten.add_.Tensor if writes else aten.add.Tensor, (inside, 1)),))
    root = nn.Module()
    root.body = fx.GraphModule(nn.Module(), body)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.higher_order.cond, (x, graph.get_attr("body"), graph.get_attr("body"), (x,)))
    graph.output((x,))
    assert eliminate_dead_code(graph) == 0
    assert eliminate_dead_code(graph, root) == (0 if writes else 3)
