"""Measure how many small faults in the code the tests notice.

    python tools/mutate.py --list                      # the number of mutants of each file
    python tools/mutate.py --sample 40 --seed 0        # 40 mutants of each file, and the table
    python tools/mutate.py pez_core/pez.py --tests tests/test_pez.py tests/test_tasks.py
    python tools/mutate.py --report                    # the table of the mutants so far

A mutant is a copy of a file with one fault: another comparison, operator or constant, a negated
condition, a removed statement, `and` for `or`. A mutant that lets all tests pass, or that no test
runs, survives.

All tests run once, without any fault, to record which of them run each line and how long they take.
A mutant then runs the tests of its statement alone, the quick ones first, until one fails. A fault
outside of functions, such as another constant of a module, runs all tests. Each run is a fork of a
process that has collected the tests and replaces code in memory (see `run_mutants.py`), so that no
file changes and a mutant costs little more than its tests. A mutant may loop for ever: each has a
limit of processor time and of memory, and counts as killed at the limit.

Results are appended to OUT.jsonl; a run that is started again skips mutants that were killed,
unless the source of the file has changed, and runs the survivors again. Equivalent mutants, which
change nothing, survive as well: read the list of survivors before the share.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from run_mutants import Record, all_pass, fork, replace_code

ROOT = Path(__file__).resolve().parent.parent
# File -> tests that cover it.
TESTS = {
    "pez_core/pez.py": ("tests/test_pez.py",),
    "pez_core/tracker.py": ("tests/test_pez.py",),
    "pez_core/swaps.py": ("tests/test_swaps.py",),
    **dict.fromkeys(
        (
            "pez_core/problem.py",
            "pez_core/runner.py",
            "pez_core/best.py",
            "pez_core/verify.py",
        ),
        (
            "tests/test_runner_parts.py",
            "tests/test_runner.py",
            "tests/test_research.py",
            "tests/test_tags.py",
        ),
    ),
    "pez_core/vocabulary.py": ("tests/test_vocabulary.py",),
    "pez_core/prompt_text.py": ("tests/test_prompt_text.py",),
}
# Seconds of processor time that a mutant has beside three times those of its tests.
LEAST_LIMIT = 30
FORK = multiprocessing.get_context("fork")

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult,
}
# Statements that are removed; each leaves a `pass`.
REMOVED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Break, ast.Continue)


# The way from the root of a tree to a node: names of fields and places in lists.
Path_ = tuple["str | int", ...]


@dataclass(frozen=True)
class Mutant:
    """A fault in a file.

    Attributes:
        file: its path in the repository.
        source: a hash of the file without the fault.
        number: of the fault in the file.
        line: where it is.
        lines: first and last one of its statement, of a compound one the head; None: it is outside
            of functions and runs when the file is imported.
        kind: of the fault.
        before, after: the code without and with it.
    """

    file: str
    source: str
    number: int
    line: int
    lines: tuple[int, int] | None
    kind: str
    before: str
    after: str


def mutants(file: str, text: str) -> list[Mutant]:
    """Every fault of a file."""
    source = hashlib.sha256(text.encode()).hexdigest()[:16]
    found = []
    tree = ast.parse(text)
    for number, (path, old, kind, new) in enumerate(_faults(tree)):
        lines, changed = _lines(tree, path), (_short(old), _short(new))
        found.append(Mutant(file, source, number, old.lineno, lines, kind, *changed))
    return found


def _lines(tree: ast.Module, path: Path_) -> tuple[int, int] | None:
    """See `Mutant.lines`."""
    node: Any = tree
    statement, inside = node, False
    for step, after in zip(path, [*path[1:], None], strict=True):
        node = node[step] if isinstance(step, int) else getattr(node, step)
        if isinstance(node, ast.stmt):
            statement = node
        inside |= isinstance(node, (ast.FunctionDef, ast.Lambda)) and after == "body"
    if not inside:
        return None
    if body := getattr(statement, "body", None):
        return statement.lineno, max(statement.lineno, body[0].lineno - 1)
    return statement.lineno, statement.end_lineno


def with_fault(text: str, number: int) -> ast.Module:
    """The code of a file with one fault."""
    tree = ast.parse(text)
    path, _, _, new = next(islice(_faults(tree), number, None))
    _replace(tree, path, new)
    return ast.fix_missing_locations(tree)


def _faults(tree: ast.Module) -> Iterator[tuple[Path_, ast.AST, str, ast.AST]]:
    """The place of each fault, the code there, its kind and the new code."""
    for path, node in _walk(tree, ()):
        for kind, new in _faults_of(node):
            yield path, node, kind, new


def _walk(node: ast.AST, path: Path_) -> Iterator[tuple[Path_, ast.AST]]:
    """All nodes with code that runs: neither annotations nor docstrings."""
    yield path, node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        if isinstance(value, ast.AST):
            yield from _walk(value, (*path, name))
        elif isinstance(value, list):
            for k, one in enumerate(value):
                if isinstance(one, ast.AST) and not _is_documentation(one):
                    yield from _walk(one, (*path, name, k))


def _is_documentation(node: ast.AST) -> bool:
    """Docstrings, imports and `if TYPE_CHECKING`."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _faults_of(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield "comparison", _with(node, ops=[COMPARISONS[type(node.ops[0])]()])
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield "arithmetic", _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and, or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield "unary", node.operand
    if isinstance(node, ast.Constant):
        yield from (("constant", _with(node, value=value)) for value in _other_values(node.value))
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        negated = ast.UnaryOp(op=ast.Not(), operand=node.test)
        yield "condition", _with(node, test=ast.copy_location(negated, node.test))
    if isinstance(node, REMOVED):
        yield "removed", ast.copy_location(ast.Pass(), node)


def _other_values(value: object) -> list[object]:
    """Values for a constant; texts are left alone, since most are parts of messages."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1]
    return []


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    vars(changed).update(fields)
    return changed


def _replace(tree: ast.AST, path: Path_, new: ast.AST) -> None:
    """Put `new` at a place of `tree`."""
    *way, last = path
    node: object = tree
    for step in way:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    if isinstance(last, int):
        node[last] = new
    else:
        setattr(node, last, new)


def _short(node: ast.AST) -> str:
    line = " ".join(ast.unparse(node).split())
    return line if len(line) <= 70 else line[:67] + "..."


class Session:
    """A plugin of pytest that runs mutants in place of the tests.

    Args:
        file: the one that changes, in `ROOT`.
        chosen: its mutants.
        out: a file to which the results are appended.
    """

    def __init__(self, file: str, chosen: Sequence[Mutant], out: Path) -> None:
        self._file, self._chosen, self._out = file, chosen, out
        self._text = (ROOT / file).read_text(encoding="utf-8")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed or not session.items:
            pytest.exit("Tests cannot be collected.", 1)
        module = importlib.import_module(self._file.removesuffix(".py").replace("/", "."))
        if Path(str(module.__file__)).resolve() != (ROOT / self._file).resolve():
            pytest.exit(f"Tests import {module.__file__}.", 1)
        record = Record(str(module.__file__), session.items)
        runs = [record.tests(mutant.lines) for mutant in self._chosen]
        every = list(dict.fromkeys(item for items in runs for item in items))
        if fork(lambda: replace_code(module, ast.parse(self._text)) and all_pass(every)):
            pytest.exit("Tests fail without any fault, in another order.", 1)
        for k, (mutant, items) in enumerate(zip(self._chosen, runs, strict=True), start=1):
            code, began = with_fault(self._text, mutant.number), time.monotonic()
            limit = math.ceil(LEAST_LIMIT + 3 * record.seconds(items))
            killed = fork(partial(_survives, module, code, items), limit) if items else ""
            self._add(mutant, killed, len(items), time.monotonic() - began)
            shown = f"{self._file} {k}/{len(runs)} line {mutant.line}: {killed or 'SURVIVED'}"
            print(shown, file=sys.__stderr__, flush=True)
        return True

    def _add(self, mutant: Mutant, killed: str, tests: int, seconds: float) -> None:
        row = asdict(mutant) | {"killed": killed, "tests": tests, "seconds": round(seconds, 1)}
        with self._out.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")


def _survives(module: ModuleType, code: ast.Module, items: Sequence[pytest.Item]) -> bool:
    return replace_code(module, code) and all_pass(items)


def run_mutants(file: str, chosen: Sequence[Mutant], tests: Sequence[str], out: Path) -> None:
    """Run the tests on each mutant, and append the results to `out`."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # before an installed package
    options = ["-q", "-s", "-p", "no:cacheprovider", "-W", "ignore"]
    raise SystemExit(pytest.main([*options, *tests], plugins=[Session(file, chosen, out)]))


def results(out: Path) -> list[dict]:
    """The results for the files as they are now."""
    if not out.exists():
        return []
    rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    found = {}
    for row in rows:
        path = ROOT / row["file"]
        if path.exists() and row["source"] == _source_of(path):
            found[row["file"], row["number"]] = row
    return list(found.values())


def _source_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def report(rows: Sequence[dict]) -> str:
    """A table of the shares, and the survivors."""
    lines = ["| file | mutants | killed |", "|---|---|---|"]
    for file in [*dict.fromkeys(row["file"] for row in rows), "all"]:
        some = [bool(row["killed"]) for row in rows if file in ("all", row["file"])]
        share = f"{sum(some) / len(some):.0%} ({sum(some)}/{len(some)})" if some else "-"
        lines.append(f"| {file} | {len(some)} | {share} |")
    lines += ["", "Survivors:", ""]
    for row in sorted(rows, key=lambda row: (row["file"], row["line"])):
        if not row["killed"]:
            change = f"`{row['before']}` -> `{row['after']}`"
            lines.append(f"- {row['file']}:{row['line']} ({row['kind']}): {change}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), help="default: those of TESTS")
    parser.add_argument("--tests", nargs="+", help="for files that TESTS does not list")
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--list", action="store_true", help="count the mutants and end")
    parser.add_argument("--report", action="store_true", help="print the table and end")
    parser.add_argument("--out", type=Path, default=ROOT / "build/mutants.jsonl")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = results(arguments.out)
    done = {(row["file"], row["number"]) for row in rows if row["killed"]}
    if arguments.list:
        for file in arguments.files:
            print(f"{len(mutants(file, (ROOT / file).read_text(encoding='utf-8'))):5}  {file}")
        return
    if not arguments.report:
        for file in arguments.files:
            every = mutants(file, (ROOT / file).read_text(encoding="utf-8"))
            draw = random.Random(arguments.seed)
            chosen = draw.sample(every, min(arguments.sample or len(every), len(every)))
            left = [mutant for mutant in chosen if (file, mutant.number) not in done]
            tests = arguments.tests or TESTS.get(file)
            if tests is None:
                raise SystemExit(f"TESTS does not list {file}; give --tests.")
            if left:  # each file in a process of its own, whose modules are new
                run = FORK.Process(target=run_mutants, args=(file, left, tests, arguments.out))
                run.start()
                run.join()
                if run.exitcode:
                    raise SystemExit(run.exitcode)
    print(report(results(arguments.out)))


if __name__ == "__main__":
    main()
