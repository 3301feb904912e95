"""What every test shares: one thread a worker, a heap that the collector leaves alone, Python's own SIGINT."""

import functools
import gc
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# files that take longest, the longest first: a worker that got one of them last would keep the others waiting
LONG = (
    "test_serving", "test_slots", "test_generator", "test_decoder_slots", "test_module", "test_distributed", "test_zoo",
    "test_cli", "test_optimise", "test_laws", "test_schedule", "test_peft", "test_interchange", "test_sequence",
    "test_decoder", "test_places", "test_merged", "test_rewrite", "test_capture", "test_to_onnx", "test_blocks",
)  # fmt: skip


# files that make the same decoders, which one worker translates once
DECODERS = ("test_decoder.py", "test_generator.py", "test_decoder_slots.py")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, each with one worker (`--dist loadgroup`)."""
    place = {f"{name}.py": at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
    for item in items:
        group = "decoders" if item.path.name in DECODERS else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """A full collection would walk every imported module; what is alive before a file's tests stays out of it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.set_threshold(10_000, 20, 50)
    if "onnxscript" in sys.modules:
        translate_once()


def translate_once() -> None:
    """torch.onnx parses the sources of all its translations for each file that it exports: one time does."""
    from torch.onnx._internal.exporter import _registration as translations

    translations.onnxscript_apis.get_torchlib_ops = functools.cache(translations.onnxscript_apis.get_torchlib_ops)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Python's own SIGINT handler, which a process started in the background does not have."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)
