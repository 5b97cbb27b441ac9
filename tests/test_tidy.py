"""The rules of the house, checked on the source. Every rule has a test that it can fail.

A rule is a function from a source file to complaints. `test_the_tree_is_tidy` runs all of them on
everything; `test_each_rule_can_fail` runs each on a file that breaks it.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODE_PACKAGES = ("coordinator", "storage_node", "index_node", "monitor", "encoder")
PACKAGES = ("shoal", *NODE_PACKAGES)
GENERATED = ("_pb2.py", "_pb2_grpc.py")

# Composition roots know the parts; the command line and the demo reach them when they run.
MAY_IMPORT_NODES = {
    "shoal/all_in_one.py",
    "shoal/front.py",
    "shoal/roles/coordinator.py",
    "shoal/roles/encoder.py",
    "shoal/roles/index_node.py",
    "shoal/roles/monitor.py",
    "shoal/roles/storage_node.py",
}
MAY_IMPORT_NODES_LAZILY = {"shoal/cli.py", "shoal/demo.py"}
FAISS_HOME = "shoal/faiss_index.py"
ETCD_HOME = "shoal/metadata/etcd"
MAY_PRINT = ("shoal/cli.py", "shoal/demo.py", "shoal/importing/", "shoal/migrating.py")
ALL_PUBLIC = ("__init__.py", "__main__.py", "limits.py", "handlers.py")  # lists by nature
FILE_LINES_MAX = 900

# What decides stands apart from what does: these are given time, dice and bytes; they fetch none.
PURE = (
    "coordinator/binding.py",
    "coordinator/cluster.py",
    "coordinator/creation.py",
    "coordinator/freshness.py",
    "coordinator/gather.py",
    "coordinator/generations.py",
    "coordinator/parse.py",
    "coordinator/render.py",
    "coordinator/routing.py",
    "encoder/batching.py",
    "encoder/train/gate.py",
    "encoder/train/metrics.py",
    "encoder/families.py",
    "encoder/liveness.py",
    "index_node/jobs.py",
    "monitor/failover.py",
    "monitor/health.py",
    "monitor/view.py",
    "shoal/api/filter.py",
    "shoal/rpc/codec.py",
    "shoal/placement.py",
    "storage_node/planner.py",
    "storage_node/replica.py",
    "storage_node/replica_types.py",
    "storage_node/replica_wire.py",
    "storage_node/row_filter.py",
)
IMPURE_MODULES = {
    *("asyncio", "concurrent", "multiprocessing", "os", "random", "secrets", "select", "selectors"),
    *("shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "uvloop"),
}


@dataclass(frozen=True)
class File:
    """path: from the root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        return self.path.partition("/")[0]

    @property
    def is_product(self) -> bool:
        return self.package in PACKAGES and not self.path.endswith(GENERATED)

    def imports(self) -> Iterator[tuple[str, int, bool]]:
        """(top-level package or full name, line, at module level) of every import that runs."""
        for node, at_top in _walk(self.tree, at_top=True):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno, at_top
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module, node.lineno, at_top

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def _walk(node: ast.AST, *, at_top: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is imported. `if TYPE_CHECKING:` never runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, at_top
        yield from _walk(child, at_top=at_top and not function)


Rule = Callable[[File], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    RULES[function.__name__] = function
    return function


@rule
def nodes_meet_over_the_wire_only(file: File) -> Iterator[str]:
    """shoal imports no node package, a node package none but itself."""
    if not file.is_product or file.path in MAY_IMPORT_NODES:
        return
    for name, line, at_top in file.imports():
        package = name.partition(".")[0]
        lazily = file.path in MAY_IMPORT_NODES_LAZILY and not at_top
        if package in NODE_PACKAGES and package != file.package and not lazily:
            yield f"{file.path}:{line} imports {name}"


@rule
def product_imports_no_tests(file: File) -> Iterator[str]:
    if file.is_product:
        for name, line, _ in file.imports():
            if name.partition(".")[0] in ("tests", "benchmarks", "pytest", "hypothesis"):
                yield f"{file.path}:{line} imports {name}"


@rule
def faiss_has_one_home(file: File) -> Iterator[str]:
    if file.is_product and file.path != FAISS_HOME:
        for name, line, _ in file.imports():
            if name.partition(".")[0] == "faiss":
                yield f"{file.path}:{line} imports faiss; ask {FAISS_HOME}"


@rule
def etcd_has_one_home(file: File) -> Iterator[str]:
    """All others know `shoal/metadata/contract.py`."""
    if not file.path.startswith(ETCD_HOME):
        for node, _ in _walk(file.tree, at_top=True):
            if isinstance(node, ast.Import | ast.ImportFrom) and "etcd_pb2" in ast.unparse(node):
                yield f"{file.path}:{node.lineno} imports etcd_pb2; ask {ETCD_HOME}*.py"


@rule
def pure_modules_are_pure(file: File) -> Iterator[str]:
    if file.path in PURE:
        for name, line, _ in file.imports():
            if name.partition(".")[0] in IMPURE_MODULES:
                yield f"{file.path}:{line} imports {name} and is a pure module"
        for name, call in file.calls():
            if name == "open":
                yield f"{file.path}:{call.lineno} opens a file and is a pure module"


@rule
def nobody_sleeps(file: File) -> Iterator[str]:
    """Waiting is for something: an event, a process, a deadline. The harnesses poll processes."""
    if file.package != "benchmarks" and file.path != "tests/harness.py":
        for name, call in file.calls():
            if name == "time.sleep":
                yield f"{file.path}:{call.lineno} sleeps"


@rule
def times_have_zones(file: File) -> Iterator[str]:
    for name, call in file.calls():
        naive = name.endswith("datetime.utcnow") or (
            name.endswith(("datetime.now", "datetime.today"))
            and not call.args
            and not call.keywords
        )
        if naive:
            yield f"{file.path}:{call.lineno} makes a time without a zone"


@rule
def only_commands_print(file: File) -> Iterator[str]:
    if file.is_product and not file.path.startswith(MAY_PRINT):
        for name, call in file.calls():
            if name == "print":
                yield f"{file.path}:{call.lineno} prints; use shoal.telemetry"


@rule
def nothing_is_left_for_later(file: File) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            yield f"{file.path}:{token.start[0]} {token.string.strip()}"
    for name, call in file.calls():
        if name in ("breakpoint", "pdb.set_trace"):
            yield f"{file.path}:{call.lineno} stops in the debugger"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Raise) and node.exc is not None and file.is_product:
            name = ast.unparse(node.exc).partition("(")[0]
            if name == "NotImplementedError" and not _is_abstract(file.tree, node):
                yield f"{file.path}:{node.lineno} is not implemented"


def _is_abstract(tree: ast.Module, wanted: ast.Raise) -> bool:
    """A method that says nothing but "override me", in a class that others in the file extend."""
    bases = {
        ast.unparse(base)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    return any(
        wanted in function.body
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in bases
        for function in node.body
        if isinstance(function, ast.FunctionDef)
    )


@rule
def files_stay_readable(file: File) -> Iterator[str]:
    lines = file.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{file.path} has {lines} lines, {FILE_LINES_MAX} are allowed: split it"


@rule
def modules_say_what_they_are(file: File) -> Iterator[str]:
    if file.is_product and not ast.get_docstring(file.tree):
        yield f"{file.path} has no docstring"


@rule
def modules_name_what_is_public(file: File) -> Iterator[str]:
    if not file.is_product or Path(file.path).name in ALL_PUBLIC:
        return
    names = [
        ast.unparse(target)
        for node in file.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    if "__all__" not in names and "main" not in file.text:
        yield f"{file.path} has no __all__"


@rule
def nobody_swallows_errors(file: File) -> Iterator[str]:
    """`except:` and `except BaseException: pass` hide the end of the process."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("BaseException", "Exception")
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            if node.type is None or (broad and silent):
                yield f"{file.path}:{node.lineno} swallows every error"


# -- on the tree -----------------------------------------------------------------------------------


@cache
def source_files() -> list[File]:
    folders = [*PACKAGES, "tests", "benchmarks", "examples"]
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    files = [File(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]
    return [file for file in files if not file.path.endswith(GENERATED)]


@pytest.mark.parametrize("name", RULES)
def test_the_tree_is_tidy(name):
    complaints = [complaint for file in source_files() for complaint in RULES[name](file)]
    assert not complaints, "\n".join(complaints)


def test_the_lists_name_files_that_exist():
    for path in {*PURE, *MAY_IMPORT_NODES, *MAY_IMPORT_NODES_LAZILY, FAISS_HOME, *MAY_PRINT}:
        assert (ROOT / path).exists(), path


DOC = '"""What it is."""\n__all__ = []\n'
BROKEN = {
    "nodes_meet_over_the_wire_only": [
        ("coordinator/x.py", DOC + "from storage_node.node import StorageNode"),
        ("shoal/x.py", DOC + "def f():\n    import monitor.service"),
        ("shoal/cli.py", DOC + "import coordinator"),
    ],
    "product_imports_no_tests": [("shoal/x.py", DOC + "from tests import harness")],
    "faiss_has_one_home": [("storage_node/x.py", DOC + "def f():\n    import faiss")],
    "etcd_has_one_home": [
        ("shoal/roles/x.py", DOC + "from shoal.metadata import etcd_pb2 as pb"),
        ("monitor/x.py", DOC + "def f():\n    import shoal.metadata.etcd_pb2"),
        ("tests/x.py", "from shoal.metadata.etcd_pb2 import KeyValue"),
    ],
    "pure_modules_are_pure": [
        ("monitor/health.py", DOC + "from time import monotonic"),
        ("coordinator/gather.py", DOC + "import os.path"),
        ("coordinator/gather.py", DOC + "open('x')"),
    ],
    "nobody_sleeps": [("shoal/x.py", "time.sleep(1)"), ("tests/x.py", "time.sleep(0)")],
    "times_have_zones": [
        ("shoal/x.py", "datetime.now()"),
        ("tests/x.py", "datetime.datetime.utcnow()"),
    ],
    "only_commands_print": [("shoal/x.py", "print(1)")],
    "nothing_is_left_for_later": [
        ("shoal/x.py", "x = 1  # TO" + "DO later"),
        ("tests/x.py", "breakpoint()"),
        ("shoal/x.py", "def f():\n    raise NotImplementedError"),
    ],
    "files_stay_readable": [("tests/x.py", "\n" * (FILE_LINES_MAX + 1))],
    "modules_say_what_they_are": [("shoal/x.py", "x = 1"), ("shoal/__init__.py", "")],
    "modules_name_what_is_public": [("shoal/x.py", '"""Doc."""\nx = 1')],
    "nobody_swallows_errors": [
        ("shoal/x.py", "try:\n    f()\nexcept:\n    g()"),
        ("tests/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    ],
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_can_fail(name):
    for path, text in BROKEN[name]:
        assert list(RULES[name](File(path, text))), f"{name} lets {path} pass: {text[-60:]}"


def test_rules_let_the_right_thing_pass():
    fine = [
        File("shoal/cli.py", DOC + "def f():\n    from coordinator import app\n    print(app)"),
        File("shoal/x.py", DOC + "if TYPE_CHECKING:\n    from coordinator import app"),
        File("coordinator/x.py", DOC + "from coordinator.gather import merge_hits"),
        File("shoal/x.py", DOC + "datetime.now(UTC)"),
        File("shoal/metadata/etcd_watch.py", DOC + "from shoal.metadata import etcd_pb2"),
        File(
            "shoal/x.py",
            DOC + "class A:\n    def f(self):\n        raise NotImplementedError\n"
            "class B(A):\n    def f(self): return 1",
        ),
    ]
    for file in fine:
        for name, check in RULES.items():
            assert not list(check(file)), (name, file.path)


# -- generated code and dependencies ---------------------------------------------------------------


def descriptors(text: str) -> bytes:
    """The schema inside a generated module: what must be equal. The rest is the generator's own and
    changes with its version."""
    match = re.search(r"AddSerializedFile\((b'.*')\)\n", text)
    assert match is not None
    return ast.literal_eval(match[1])


def test_generated_code_is_fresh(tmp_path):
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    assert protos
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    subprocess.run(
        [*command, f"--python_out={tmp_path}", *map(str, protos)], check=True, timeout=60
    )
    for proto in protos:
        name = proto.relative_to(ROOT / "proto").with_suffix("").as_posix() + "_pb2.py"
        fresh, kept = (tmp_path / name).read_text(), (ROOT / name).read_text()
        assert descriptors(fresh) == descriptors(kept), f"{name} is stale: run `make proto`"


def test_stale_generated_code_is_noticed(tmp_path):
    kept = (ROOT / "shoal/wire/ops_pb2.py").read_text()
    assert descriptors(kept) != descriptors(kept.replace("PointIds", "PointIdx", 1))


def test_every_dependency_has_a_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    reasons = (ROOT / "docs/dependencies.md").read_text()
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        assert f"`{name[0]}`" in reasons, f"docs/dependencies.md does not say why {name[0]}"


def test_documents_link_to_what_exists():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
