"""The public surface: what the three `__all__` say. A Program is data, and verbs are functions."""

import copy
import inspect
from importlib.resources import files

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft import export, passes
from subgraph_peft.passes import LoRA
from subgraph_peft.store.adapter_file import restore

VERBS = ("save", "load", "write", "read", "write_to", "take", "unflatten", "promise", "penalty", "schedule", "optimise")


@pytest.mark.parametrize("package", [sp, passes, export], ids=lambda package: package.__name__)
def test_every_public_name_is_there_once_and_is_no_module(package):
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        found = getattr(package, name)
        assert not inspect.ismodule(found), f"{name} is hidden by the module of its name"
        assert inspect.getdoc(found), f"{name} says nothing"
    assert set(package.__all__) <= set(dir(package))


def test_verbs_are_functions_and_no_methods():
    for verb in VERBS:
        assert inspect.isfunction(getattr(sp, verb)) and verb in sp.__all__
        assert not hasattr(sp.Program, verb), f"one name for one thing: sp.{verb}(program)"
        if verb != "read":
            assert next(iter(inspect.signature(getattr(sp, verb)).parameters)) == "program"


def test_types_are_shipped():
    assert files("subgraph_peft").joinpath("py.typed").is_file()


class Own(LoRA):
    """A method that no entry point registers."""

    name = "own"


@pytest.fixture
def base():
    torch.manual_seed(0)
    return sp.capture(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(2, 4))


def moved(program):
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(0.3)
    return program


def test_load_gives_a_new_program_and_restore_changes_one(base, tmp_path):
    adapted = moved(sp.rewrite(base, LoRA(r=2), where="0"))
    sp.save(adapted, tmp_path)
    fresh = sp.rewrite(base, LoRA(r=2), where="0", seed=5)
    before = copy.deepcopy(fresh.run())
    loaded = sp.load(fresh, tmp_path)
    assert torch.equal(fresh.run(), before) and torch.equal(loaded.run(), adapted.run())
    assert restore(fresh, tmp_path) is fresh and torch.equal(fresh.run(), adapted.run())


def test_load_takes_a_method_that_is_not_registered_from_the_program(base, tmp_path):
    adapted = moved(sp.rewrite(base, Own(r=2), where="0"))
    sp.save(adapted, tmp_path)
    with pytest.raises(sp.CheckpointError, match="pass that program: sp.load.adapted, folder"):
        sp.load(base, tmp_path)
    with pytest.raises(sp.CheckpointError, match="pass that program"):
        sp.load(sp.rewrite(base, Own(r=3), where="0"), tmp_path)
    loaded = sp.load(sp.rewrite(base, Own(r=2), where="0", seed=5), tmp_path)
    assert torch.equal(loaded.run(), adapted.run()) and loaded.adapters[0].method == Own(r=2)
