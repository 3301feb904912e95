"""Is the suite sharp? `python -m tests.faults [word …]` plants faults in a copy of the tree, one at a time, and runs
the test files that should catch each. Without words all of them; else those whose name has one of the words.

First these files have to pass without a fault. Prints the first test that caught each; ends with code 1 where one was
missed, or where its text is not found exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("subgraph_peft", "passes", "export")


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in the one file of the package that has it; `tests` are the files that should catch it."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, old, new, tests)


FAULTS = (
    fault(
        "sign: a difference distributes as a sum",
        "scale.times(-1.0) if minus and scale else scale",
        "scale",
        "compiler/test_rewrite",
    ),
    fault(
        "sign: a difference without scale is added",
        "aten.sub.Tensor if minus and not scale else aten.add.Tensor",
        "aten.add.Tensor",
        "compiler/test_laws",
    ),
    fault(
        "bias: lost where rows are scaled",
        '(y, factor), "rows"), bias)',
        '(y, factor), "rows"), None)',
        "compiler/test_laws",
    ),
    fault(
        "transpose: a layout is stored without turning back",
        "return through(self.writing(shape), matrix, computed).contiguous()",
        "return matrix.reshape(shape).contiguous()",
        "compiler/test_laws",
        "compiler/test_forms",
    ),
    fault(
        "method: DoRA's norms over columns",
        '"m": torch.linalg.vector_norm(W, dim=1)',
        '"m": torch.linalg.vector_norm(W, dim=0)',
        "compiler/test_laws",
    ),
    fault(
        "method: rsLoRA scales as LoRA",
        "self.alpha / self.r**0.5",
        "self.alpha / self.r",
        "oracle/test_interchange",
    ),
    fault(
        "selector: exclude is ignored",
        'if verdict == "no" or any(pattern.match(paths) != "no" for pattern in excludes):',
        'if verdict == "no":',
        "program/test_selectors",
    ),
    fault(
        "selector: heads are taken by wildcards",
        '        if self.head:\n            return "output head',
        '        if False:\n            return "output head',
        "program/test_selectors",
    ),
    fault(
        "fold: a site is skipped",
        "for target in targets(folding):",
        "for target in targets(folding)[1:]:",
        "compiler/test_fold",
        "compiler/test_laws",
    ),
    fault(
        "fold: values that are not finite pass",
        "            if not torch.isfinite(value).all():\n                bad =",
        "            if False:\n                bad =",
        "compiler/test_fold",
    ),
    fault(
        "fold: what the dtype loses is not counted",
        "max(0.0, 1 - lost / delta)",
        "1.0",
        "compiler/test_fold",
    ),
    fault(
        "capture: guards on sizes are dropped",
        "    return tuple(code for code in wide if (read := inputs_of(code)) and read <= known and readable(code))",
        "    return ()",
        "frontend/test_hazards",
        "frontend/test_capture",
        "frontend/test_inputs",
    ),
    fault(
        "mask: a window is read as causal",
        "seen == sympy.true:",
        "seen != sympy.false:",
        "graph/test_masks",
    ),
    fault(
        "schedule: off by one step",
        "        self.number += 1\n        before =",
        "        before =",
        "training/test_schedule",
    ),
    fault(
        "schedule: AdaLoRA prunes during warmup",
        "        if step <= self.warmup:\n            return first\n",
        "",
        "training/test_schedule",
    ),
    fault(
        "training: batches of a step weigh the same",
        "factors = held * (len(batches) * processes.world() / total)",
        "factors = torch.ones_like(held)",
        "training/test_train",
    ),
    fault(
        "training: the last batch leaves examples out",
        "yield block[self.rank :: self.world] or block[:1]",
        "yield block[self.rank :: self.world][: self.count // self.world] or block[:1]",
        "training/test_distributed",
    ),
    fault(
        "evaluation: the mean is over batches",
        "sum(loss * count for loss, count in self.losses) / self.labels",
        "sum(loss for loss, _ in self.losses) / len(self.losses)",
        "training/test_train",
    ),
    fault(
        "checkpoint: another base is taken",
        "config.base.fingerprint != fingerprint(program, config.trained)",
        "False",
        "store/test_checkpoint",
    ),
    fault(
        "checkpoint: files of two saves",
        "if saved_with != digest(",
        "if False and digest(",
        "store/test_checkpoint",
    ),
    fault(
        "merged: a rename is missing",
        "return revert(self.model, dict(tensors))",
        "return dict(tensors)",
        "store/test_merged",
    ),
    fault(
        "peft: alpha of single modules is lost",
        "alpha = matched(options.alpha_pattern, site.owner, options.lora_alpha)",
        "alpha = options.lora_alpha",
        "oracle/test_interchange",
    ),
    fault(
        "peft: a LoRA of any update has twice its scale",
        "method = LoRA(r=A.shape[-2], alpha=A.shape[-2])",
        "method = LoRA(r=A.shape[-2], alpha=2 * A.shape[-2])",
        "oracle/test_interchange",
    ),
    fault(
        "export: a missing cast",
        'if operand.meta["val"].dtype != dtype:',
        "if False:",
        "export/test_legal",
    ),
    fault(
        "export: drift is no error",
        "    if not over:\n        return",
        "    return",
        "export/test_verification",
    ),
    fault(
        "export: places that are not finite are not compared",
        "not torch.allclose(expected[~finite], actual[~finite], equal_nan=True) or not actual[finite].isfinite().all()",
        "False",
        "export/test_verification",
    ),
    fault(
        "analysis: Cayley without its inverse",
        "torch.linalg.solve(identity + K, identity - K)",
        "(identity + K) @ (identity - K)",
        "method/test_svd",
        "compiler/test_laws",
    ),
)


def file_of(fault: Fault, tree: Path) -> Path:
    """The file that has the text once. Raises LookupError."""
    files = {path.resolve() for name in PACKAGE for path in (tree / name).rglob("*.py")}
    counts = {path: count for path in files if (count := path.read_text(encoding="utf-8").count(fault.old))}
    if sum(counts.values()) != 1:
        found = ", ".join(f"{path.name} ({count})" for path, count in counts.items()) or "nowhere"
        raise LookupError(f"{fault.name}: {fault.old!r} is {found}, not in one place")
    return next(iter(counts))


def failing(tree: Path, tests: Iterable[str]) -> str | None:
    """The first test of these files that fails in the tree."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    files = [f"tests/{name}.py" for name in tests]
    done = subprocess.run([*command, *files], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return next(lines, "a test") if done.returncode else None


def catcher(fault: Fault, tree: Path) -> str | None:
    """The first test that fails with the fault in the tree, which is as before then. Raises LookupError."""
    path = file_of(fault, tree)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return failing(tree, fault.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def main(words: Sequence[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    caught = 0
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for name in ("passes", "export"):  # so that the copy is whole, whatever is installed
            (tree / "subgraph_peft" / name).symlink_to(tree / name)
        if red := failing(tree, dict.fromkeys(name for fault in chosen for name in fault.tests)):
            print(f"{red} fails without a fault")
            return 1
        for fault in chosen:
            try:
                test = catcher(fault, tree)
                caught += test is not None
                print(f"{fault.name}: {f'caught by {test}' if test else 'MISSED'}", flush=True)
            except LookupError as error:
                print(f"NOT FOUND: {error}", flush=True)
    print(f"{caught} of {len(chosen)} faults were caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
