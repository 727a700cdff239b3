"""Measure how many small faults in the code the tests notice.

    python tools/mutate.py --list                      # the number of mutants of each file
    python tools/mutate.py --sample 40 --seed 0        # 40 mutants of each file, and the table
    python tools/mutate.py pez_core/pez.py --tests tests/test_pez.py tests/test_tasks.py
    python tools/mutate.py --report                    # the table of the mutants so far

A mutant is a copy of a file with one fault: another comparison, operator or constant, a negated
condition, a removed statement, `and` for `or`. A mutant that lets all tests pass, or that no test
runs, survives. The tests run with `-x`, at first without any fault. Three times the processor time
of this run is the limit of the others, since a mutant may loop for ever, which counts as killed.

Mutants are written to a temporary copy of the repository, never to the tree itself. Results are
appended to OUT.jsonl; a run that is started again skips mutants that are there, unless the source
of the file has changed. Equivalent mutants, which change nothing, survive as well: read the list of
survivors before the share.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# File -> tests that cover it.
TESTS = {
    "pez_core/pez.py": ("tests/test_pez.py", "tests/test_tasks.py"),
    "pez_core/tracker.py": ("tests/test_pez.py", "tests/test_runner.py", "tests/test_capture.py"),
    "pez_core/swaps.py": ("tests/test_swaps.py", "tests/test_capture.py"),
    "pez_core/runner.py": (
        "tests/test_runner.py",
        "tests/test_tasks.py",
        "tests/test_swaps.py",
        "tests/test_steering.py",
    ),
    "pez_core/vocabulary.py": ("tests/test_vocabulary.py", "tests/test_steering.py"),
    "pez_core/prompt_text.py": ("tests/test_prompt_text.py", "tests/test_tasks_on_text.py"),
}
# Folders that the copy does without, or shares with the tree.
LEFT_OUT = (".git", ".venv", ".venv-comfyui", "build", "dist", "__pycache__", ".pytest_cache")
SHARED = ("build",)
LEAST_LIMIT = 30  # seconds of processor time
# A run that waits instead of computing ends after this many times its limit, and ten minutes.
WAITING, AT_LEAST = 10, 600

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


@dataclass(frozen=True)
class Mutant:
    """A fault in a file.

    Attributes:
        file: its path in the repository.
        source: a hash of the file without the fault.
        number: of the fault in the file.
        line: where it is.
        kind: of the fault.
        before, after: the code without and with it.
    """

    file: str
    source: str
    number: int
    line: int
    kind: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.source, self.number


def mutants(file: str, text: str) -> list[Mutant]:
    """Every fault of a file."""
    source = hashlib.sha256(text.encode()).hexdigest()[:16]
    found = []
    for number, (_, old, kind, new) in enumerate(_faults(ast.parse(text))):
        before, after = _short(old), _short(new)
        found.append(Mutant(file, source, number, old.lineno, kind, before, after))
    return found


def with_fault(text: str, number: int) -> str:
    """The content of a file with one fault."""
    tree = ast.parse(text)
    path, _, _, new = next(islice(_faults(tree), number, None))
    _replace(tree, path, new)
    return ast.unparse(ast.fix_missing_locations(tree))


# The way from the root of a tree to a node: names of fields and places in lists.
Path_ = tuple["str | int", ...]


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
    for name, value in fields.items():
        setattr(changed, name, value)
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


class Workplace:
    """A copy of the repository in which the tests run.

    Args:
        python: the interpreter of the tests.
    """

    def __init__(self, python: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.root, self.python = Path(self._folder.name) / "repository", python

    def __enter__(self) -> Workplace:
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        for name in SHARED:
            if (ROOT / name).exists():
                (self.root / name).symlink_to(ROOT / name)
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def fails(self, tests: Sequence[str], limit: int | None) -> str:
        """Why the tests fail: "failed" or "time limit"; "" if all pass.

        Args:
            tests: files.
            limit: seconds of processor time; other load of the machine does not count.
        """
        # the copy comes before an installed package; a changed file has no stale bytecode
        environment = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header"]
        process = subprocess.Popen(
            [self.python, "-m", "pytest", *options, *tests],
            cwd=self.root,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=limit and partial(resource.setrlimit, resource.RLIMIT_CPU, (limit, limit)),
        )
        try:
            code = process.wait(limit and WAITING * limit + AT_LEAST)
        except subprocess.TimeoutExpired:
            return "time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that tests started
                process.wait()
        if code == 5:
            raise SystemExit(f"There are no tests in {' '.join(tests)}.")
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "time limit"
        return "failed" if code else ""

    def write(self, file: str, content: str) -> None:
        (self.root / file).write_text(content, encoding="utf-8")


def run_mutants(
    work: Workplace, file: str, chosen: Sequence[Mutant], tests: Sequence[str], out: Path
) -> None:
    """Run the tests on each mutant, and append the results to `out`."""
    original = (ROOT / file).read_text(encoding="utf-8")
    # formatted as the mutants are, so that only the fault differs
    work.write(file, ast.unparse(ast.parse(original)))
    began = _seconds_of_children()
    if work.fails(tests, None):
        raise SystemExit(f"{' '.join(tests)} fail without any fault in {file}.")
    limit = max(LEAST_LIMIT, math.ceil(3 * (_seconds_of_children() - began)))
    for k, mutant in enumerate(chosen, start=1):
        work.write(file, with_fault(original, mutant.number))
        began = time.monotonic()
        row = asdict(mutant) | {"killed": work.fails(tests, limit)}
        row |= {"seconds": round(time.monotonic() - began, 1), "tests": list(tests)}
        with out.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")
        state = row["killed"] or "SURVIVED"
        print(f"{file} {k}/{len(chosen)} line {mutant.line}: {state}", file=sys.stderr, flush=True)
    work.write(file, original)


def _seconds_of_children() -> float:
    """Processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
    kinds = sorted({row["kind"] for row in rows})
    lines = [f"| file | mutants | killed | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for file in [*dict.fromkeys(row["file"] for row in rows), None]:
        some = [row for row in rows if file in (None, row["file"])]
        cells = [_share([row for row in some if row["kind"] == kind]) for kind in kinds]
        name = "all" if file is None else file
        lines.append(f"| {name} | {len(some)} | {_share(some)} | {' | '.join(cells)} |")
    lines += ["", "Survivors:", ""]
    for row in sorted(rows, key=lambda row: (row["file"], row["line"])):
        if not row["killed"]:
            change = f"`{row['before']}` -> `{row['after']}`"
            lines.append(f"- {row['file']}:{row['line']} ({row['kind']}): {change}")
    return "\n".join(lines)


def _share(rows: Sequence[dict]) -> str:
    killed = sum(bool(row["killed"]) for row in rows)
    return f"{killed / len(rows):.0%} ({killed}/{len(rows)})" if rows else "-"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), help="default: those of TESTS")
    parser.add_argument("--tests", nargs="+", help="for files that TESTS does not list")
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--list", action="store_true", help="count the mutants and end")
    parser.add_argument("--report", action="store_true", help="print the table and end")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the tests")
    parser.add_argument("--out", type=Path, default=ROOT / "build/mutants.jsonl")
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["file"], row["source"], row["number"]) for row in results(arguments.out)}
    if arguments.list:
        for file in arguments.files:
            print(f"{len(mutants(file, (ROOT / file).read_text(encoding='utf-8'))):5}  {file}")
        return
    if not arguments.report:
        with Workplace(arguments.python) as work:
            for file in arguments.files:
                every = mutants(file, (ROOT / file).read_text(encoding="utf-8"))
                draw = random.Random(arguments.seed)
                chosen = draw.sample(every, min(arguments.sample or len(every), len(every)))
                left = [mutant for mutant in chosen if mutant.key not in done]
                tests = arguments.tests or TESTS.get(file)
                if tests is None:
                    raise SystemExit(f"TESTS does not list {file}; give --tests.")
                if left:
                    run_mutants(work, file, left, tests, arguments.out)
    print(report(results(arguments.out)))


if __name__ == "__main__":
    main()
