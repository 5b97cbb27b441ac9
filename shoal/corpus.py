"""The documentation of Python's standard library as a collection of some seven thousand texts: real
text that every machine with Python has, for the demo, tests and benchmarks.

Two sources, because half of the library is written in C:

    source files  *.py of the standard library, read with `ast`; nothing is imported or run
    live objects  functions and types written in C, from a fixed list of harmless modules

Public modules, classes, functions, methods and properties with a docstring count; names with a
leading underscore do not, nor do tests, idlelib and the like. A definition is listed under the name
by which people import it: `os.path.split`, not `posixpath.split`; `asyncio.run`, not
`asyncio.runners.run`. The order is that of the names; one Python on one kind of machine always
gives the same list.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import sysconfig
import types
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["CorpusEntry", "python_stdlib_corpus", "spoken"]

TEXT_CHARS_MAX = 320  # about 80 tokens; what a function does stands at the start of its docstring
DOC_CHARS_MAX = 4_000
SUMMARY_CHARS_MAX = 240
SIGNATURE_CHARS_MAX = 240

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://docs.python.org/3/library/")

_FOLDERS_SKIPPED = {
    "__pycache__",
    "distutils",  # gone since 3.12
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "turtledemo",
}
_MODULES_SKIPPED = {
    "ntpath",  # the twin of posixpath: every answer would come twice
    "antigravity",  # opens a browser when somebody tries what was found
    "this",
}
_MODULES_RENAMED = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_collections_abc": "collections.abc",
    "_weakrefset": "weakref",
}

# Public module -> where its C parts say that they are from. All are imported by an ordinary
# program sooner or later and do nothing when they are. One that is not built here is left out.
_C_MODULES: Mapping[str, tuple[str, ...]] = {
    "array": (),
    "asyncio": ("_asyncio",),
    "atexit": (),
    "binascii": (),
    "bisect": ("_bisect",),
    "builtins": ("io", "_io"),  # for `open`
    "bz2": ("_bz2",),
    "cmath": (),
    "codecs": ("_codecs",),
    "collections": ("_collections",),
    "contextvars": ("_contextvars",),
    "csv": ("_csv",),
    "ctypes": ("_ctypes",),
    "datetime": ("_datetime",),
    "decimal": ("_decimal",),
    "faulthandler": (),
    "fcntl": (),
    "functools": ("_functools",),
    "gc": (),
    "grp": (),
    "hashlib": ("_hashlib", "_blake2", "_sha1", "_sha2", "_sha3", "_md5"),
    "heapq": ("_heapq",),
    "hmac": ("_operator",),
    "io": ("_io",),
    "itertools": (),
    "json": ("_json",),
    "locale": ("_locale",),
    "lzma": ("_lzma",),
    "marshal": (),
    "math": (),
    "mmap": (),
    "operator": ("_operator",),
    "os": ("posix", "nt"),
    "pickle": ("_pickle",),
    "posix": (),
    "pwd": (),
    "pyexpat": (),
    "queue": ("_queue",),
    "random": ("_random",),
    "re": ("_sre",),
    "resource": (),
    "select": (),
    "signal": ("_signal",),
    "socket": ("_socket",),
    "sqlite3": ("_sqlite3",),
    "ssl": ("_ssl",),
    "statistics": ("_statistics",),
    "string": ("_string",),
    "struct": ("_struct",),
    "symtable": ("_symtable",),
    "sys": (),
    "syslog": (),
    "termios": (),
    "threading": ("_thread",),
    "time": (),
    "tracemalloc": ("_tracemalloc",),
    "types": ("builtins",),
    "typing": ("_typing",),
    "unicodedata": (),
    "warnings": ("_warnings",),
    "weakref": ("_weakref", "_weakrefset"),
    "xml.etree.ElementTree": ("_elementtree",),
    "zlib": (),
    "zoneinfo": ("_zoneinfo",),
}

_C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.WrapperDescriptorType,
)


@dataclass(frozen=True, slots=True)
class CorpusEntry:
    """One documented name.

    id       UUIDv5 of `name`: the same in every run and on every machine.
    name     as people write it: "os.path.split", "pathlib.Path.read_text".
    module   that one imports; `package` is its first part.
    kind     module, class, function, method or property.
    summary  the first sentence or so; `doc` the docstring, without indentation.
    line     in the source file, or None for what is written in C.
    """

    name: str
    module: str
    kind: str
    signature: str
    doc: str
    line: int | None

    @property
    def id(self) -> str:
        return str(uuid.uuid5(_NAMESPACE, self.name))

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def summary(self) -> str:
        return _first_sentence(self.doc)

    @property
    def text(self) -> str:
        """What is embedded: the name, the name in words, and the start of the docstring."""
        start = " ".join(self.doc.split())
        return _shortened(f"{self.name} ({spoken(self.name)}): {start}", TEXT_CHARS_MAX)

    def payload(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "module": self.module,
            "package": self.package,
            "kind": self.kind,
            "signature": self.signature,
            "summary": self.summary,
            "doc": self.doc,
            "line": self.line,
        }


def python_stdlib_corpus(root: Path | None = None) -> list[CorpusEntry]:
    """Every documented public name of the standard library of this Python, sorted by name.

    root    the folder of the standard library; None: that of the running Python.
    Cost    a few seconds: some five hundred files are parsed.
    """
    if root is None:
        root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, CorpusEntry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old spellings in library files, deprecated attributes
        for entry in (*_from_files(root), *_from_live_objects()):
            found.setdefault(entry.name, entry)
    return [found[name] for name in sorted(found)]


def spoken(name: str) -> str:
    """A dotted name as words: "tempfile.TemporaryDirectory" -> "tempfile temporary directory"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\s._]+", words)).strip().lower()


# -- source files ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Module:
    """What is kept of a source file. The tree itself is not: hundreds of them at once keep the
    garbage collector busy for seconds.

    doc           its own docstring, "" without one.
    definitions   (top-level name, entry) of everything documented, also of methods.
    listed        its `__all__`.
    imports       (level, module, names) of each `from ... import` at the top level.
    """

    doc: str
    definitions: list[tuple[str, CorpusEntry]]
    listed: frozenset[str]
    imports: list[tuple[int, str, frozenset[str]]]


def _from_files(root: Path) -> Iterator[CorpusEntry]:
    modules: dict[str, _Module] = {}
    for path in sorted(_source_files(root), key=Path.as_posix):
        parts = [part for part in path.with_suffix("").parts if part != "__init__"]
        dotted = ".".join(parts)
        if dotted not in _MODULES_SKIPPED and parts[-1] != "__main__":
            module = _read_module(root / path, dotted)
            if module is not None:
                modules[dotted] = module
    passed_on = _passed_on(modules)
    for dotted, module in modules.items():
        public = _MODULES_RENAMED.get(dotted, dotted)
        if module.doc and not _is_private(public):
            yield CorpusEntry(public, public, "module", f"import {public}", module.doc, 1)
        for top_name, entry in module.definitions:
            home = passed_on.get((dotted, top_name), public)
            if not _is_private(home):
                name = home + entry.name.removeprefix(dotted)
                yield replace(entry, name=name, module=home)


def _read_module(path: Path, dotted: str) -> _Module | None:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # a file that this Python cannot read documents nothing
    return _Module(
        doc=_cleaned(ast.get_docstring(tree, clean=False)),
        definitions=[
            (node.name, entry)
            for node in _statements(tree.body)
            for entry in _entries(node, dotted, parents=())
        ],
        listed=_listed_in_all(tree),
        imports=[
            (node.level, node.module, frozenset(_kept_names(node)))
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
        ],
    )


def _passed_on(modules: Mapping[str, _Module]) -> dict[tuple[str, str], str]:
    """(module, name) -> the package that offers it: `from ._local import Path` in pathlib makes
    ("pathlib._local", "Path") -> "pathlib"."""
    offered: dict[tuple[str, str], str] = {}
    for package, module in modules.items():
        for level, imported, names in module.imports:
            source = f"{package}.{imported}" if level == 1 else imported
            if source.startswith(package + ".") and source in modules:
                for name in modules[source].listed if "*" in names else names:
                    offered[source, name] = package
    return offered


def _kept_names(node: ast.ImportFrom) -> Iterator[str]:
    return (alias.name for alias in node.names if alias.asname in (None, alias.name))


def _source_files(root: Path) -> Iterator[Path]:
    """Relative paths of the *.py below `root`, without the folders that are skipped."""
    pending = [root]
    while pending:
        for item in pending.pop().iterdir():
            if item.is_dir():
                if item.name not in _FOLDERS_SKIPPED and item.name.isidentifier():
                    pending.append(item)
            elif item.suffix == ".py":
                yield item.relative_to(root)


def _is_private(dotted: str) -> bool:
    return any(part.startswith("_") for part in dotted.split("."))


def _statements(
    body: Iterable[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Definitions of a body, also those under `if` and `try`, in order."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from _statements([*node.body, *handled, *node.orelse])


def _entries(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
    module: str,
    parents: tuple[str, ...],
) -> Iterator[CorpusEntry]:
    if node.name.startswith("_"):
        return
    path = (*parents, node.name)
    doc = _cleaned(ast.get_docstring(node, clean=False))
    if doc:
        yield CorpusEntry(
            name=_qualified(module, path),
            module=module,
            kind=_kind(node, inside_class=bool(parents)),
            signature=_signature(node, inside_class=bool(parents)),
            doc=doc,
            line=node.lineno,
        )
    if isinstance(node, ast.ClassDef):
        for child in _statements(node.body):
            yield from _entries(child, module, path)


def _kind(node: ast.AST, *, inside_class: bool) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if any(name.endswith("property") for name in _decorators(node)):
        return "property"
    return "method" if inside_class else "function"


def _decorators(node: ast.AST) -> list[str]:
    listed: list[ast.expr] = getattr(node, "decorator_list", [])
    return [ast.unparse(decorator) for decorator in listed]


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, *, inside_class: bool
) -> str:
    """name(arguments) -> result, without `self`; of a class, what its constructor takes."""
    if isinstance(node, ast.ClassDef):
        for child in _statements(node.body):
            if child.name == "__init__" and not isinstance(child, ast.ClassDef):
                return _shortened(
                    f"{node.name}({_arguments(child, bound=True)})", SIGNATURE_CHARS_MAX
                )
        return node.name
    decorators = _decorators(node)
    if any(name.endswith("property") for name in decorators):
        return node.name
    bound = inside_class and "staticmethod" not in decorators
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return _shortened(
        f"{prefix}{node.name}({_arguments(node, bound=bound)}){result}", SIGNATURE_CHARS_MAX
    )


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool) -> str:
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    if bound and positional:
        first = positional[0]
        given = ast.arguments(
            posonlyargs=[a for a in given.posonlyargs if a is not first],
            args=[a for a in given.args if a is not first],
            vararg=given.vararg,
            kwonlyargs=given.kwonlyargs,
            kw_defaults=given.kw_defaults,
            kwarg=given.kwarg,
            defaults=given.defaults[-(len(positional) - 1) :] if len(positional) > 1 else [],
        )
    return ast.unparse(given)


def _listed_in_all(tree: ast.Module) -> frozenset[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            with contextlib.suppress(ValueError):  # computed, not written down
                return frozenset(ast.literal_eval(node.value))
    return frozenset()


# -- live objects ---------------------------------------------------------------------------------


def _from_live_objects() -> Iterator[CorpusEntry]:
    for module_name, origins in _C_MODULES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        listed = "os" if module_name == "posix" else module_name
        allowed = {module_name, *origins}
        for name in sorted(vars(module)):
            if not name.startswith("_"):
                yield from _live_entries(vars(module)[name], name, listed, allowed)


def _live_entries(item: object, name: str, module: str, allowed: set[str]) -> Iterator[CorpusEntry]:
    """A C function or type that belongs to the module, and the C methods of a type, also of one
    that is written in Python on top of a C type (socket.socket, random.Random)."""
    origin = getattr(item, "__module__", None)
    if isinstance(item, types.BuiltinFunctionType):
        if origin is None:  # random.random: a method of an instance that the module holds
            origin = type(item.__self__).__module__
        if origin in allowed:
            yield from _live_entry(item, (name,), module, "function")
    elif isinstance(item, type) and origin in allowed:
        if _written_in_c(item):
            yield from _live_entry(item, (name,), module, "class")
            yield from _live_members(item, name, module)
        else:
            for base in item.__mro__[1:]:
                if base.__module__ in allowed - {"builtins"} and _written_in_c(base):
                    yield from _live_members(base, name, module)


def _written_in_c(item: type) -> bool:
    return not any(isinstance(value, types.FunctionType) for value in vars(item).values())


def _live_members(item: type, name: str, module: str) -> Iterator[CorpusEntry]:
    for member, value in sorted(vars(item).items()):
        if member.startswith("_"):
            continue
        if isinstance(value, (*_C_FUNCTIONS, staticmethod)):
            yield from _live_entry(value, (name, member), module, "method")
        elif isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType):
            yield from _live_entry(value, (name, member), module, "property")


def _live_entry(
    item: object, path: tuple[str, ...], module: str, kind: str
) -> Iterator[CorpusEntry]:
    doc = _cleaned(getattr(item, "__doc__", None))
    if not doc:
        return
    signature = path[-1]
    if kind != "property":
        try:
            live = inspect.signature(item)  # type: ignore[arg-type]
        except Exception:  # no signature, or one whose defaults cannot be evaluated any more
            # Older C docstrings begin with the signature instead.
            match = re.match(rf"(?:\w+\.)?({re.escape(path[-1])}\(.*\)(?: -+> .+)?)$", doc, re.M)
            signature = match[1] if match else f"{path[-1]}(…)"
        else:
            shown = [p for p in live.parameters.values() if p.name not in ("self", "type")]
            signature = path[-1] + str(live.replace(parameters=shown))
    yield CorpusEntry(
        name=_qualified(module, path),
        module=module,
        kind=kind,
        signature=_shortened(signature, SIGNATURE_CHARS_MAX),
        doc=_without_signature(doc),
        line=None,
    )


# -- text -----------------------------------------------------------------------------------------


def _qualified(module: str, path: tuple[str, ...]) -> str:
    return ".".join(path if module == "builtins" else (module, *path))


def _cleaned(doc: str | None) -> str:
    # Lone surrogates occur in no file that Python accepts as UTF-8, but in a literal they may.
    text = inspect.cleandoc(doc).strip() if isinstance(doc, str) else ""
    return _shortened(text.encode("utf-8", "replace").decode("utf-8"), DOC_CHARS_MAX)


def _without_signature(doc: str) -> str:
    """Drop a first line such as "sleep(seconds)" that stands alone before the real text."""
    head, _, rest = doc.partition("\n\n")
    is_signature = re.fullmatch(r"[\w.]+\(.*\)(\s*-+> .*)?", head)
    return rest.strip() if is_signature and rest.strip() else doc


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(re.split(r"\n\s*\n", doc, maxsplit=1)[0].split())
    sentence = re.match(r".{20,}?[.!?](?=\s+[A-Z(`]|$)", paragraph)
    return _shortened(sentence[0] if sentence else paragraph, SUMMARY_CHARS_MAX)


def _shortened(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[: chars_max - 1].rstrip() + "…"
