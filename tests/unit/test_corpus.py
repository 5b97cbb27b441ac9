"""The documentation of the standard library: found under public names, and read without running."""

from __future__ import annotations

import ast
import json
import uuid
from pathlib import Path

import pytest

from shoal.corpus import CorpusEntry, python_stdlib_corpus, spoken


@pytest.fixture(scope="module")
def corpus() -> dict[str, CorpusEntry]:
    return {entry.name: entry for entry in python_stdlib_corpus()}


def test_there_are_thousands_of_entries_with_distinct_names_and_ids(
    corpus: dict[str, CorpusEntry],
) -> None:
    assert len(corpus) > 6_000
    assert len({entry.id for entry in corpus.values()}) == len(corpus)
    assert list(corpus) == sorted(corpus)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("os.path.split", "function"),  # from posixpath.py
        ("os.getcwd", "function"),  # C, from posix
        ("subprocess.run", "function"),
        ("asyncio.run", "function"),  # from asyncio/runners.py
        ("json.JSONDecoder", "class"),  # from json/decoder.py
        ("pathlib.Path.read_text", "method"),  # a private file since 3.13
        ("datetime.datetime.strptime", "method"),  # Python, or C since 3.12
        ("tempfile.TemporaryDirectory", "class"),
        ("zlib.compress", "function"),  # C
        ("dict.get", "method"),  # a builtin
        ("open", "function"),
        ("socket.socket.send", "method"),  # C base of a Python class
        ("random.random", "function"),  # method of a hidden instance
        ("collections.abc.Mapping.get", "method"),
        ("csv", "module"),
        ("pathlib.PurePath.parent", "property"),
    ],
)
def test_names_are_those_by_which_people_import(
    corpus: dict[str, CorpusEntry], name: str, kind: str
) -> None:
    assert corpus[name].kind == kind
    assert corpus[name].doc
    assert corpus[name].package == name.partition(".")[0] or corpus[name].module == "builtins"


def test_nothing_private_and_no_tests(corpus: dict[str, CorpusEntry]) -> None:
    for entry in corpus.values():
        assert not any(part.startswith("_") for part in entry.name.split(".")), entry.name
        assert entry.package not in ("test", "idlelib", "lib2to3", "antigravity", "this")


def test_every_entry_is_fit_to_send(corpus: dict[str, CorpusEntry]) -> None:
    for entry in corpus.values():
        assert uuid.UUID(entry.id).version == 5
        assert 0 < len(entry.summary) <= 240
        assert len(entry.text) <= 320
        assert len(entry.doc) <= 4_000
        json.dumps(entry.payload()).encode("utf-8")


def test_signatures_leave_self_out(corpus: dict[str, CorpusEntry]) -> None:
    assert corpus["os.path.split"].signature == "split(p)"
    assert corpus["list.sort"].signature == "sort(*, key=None, reverse=False)"
    assert corpus["pathlib.Path.iterdir"].signature == "iterdir()"
    assert corpus["tempfile.TemporaryDirectory"].signature.startswith(
        "TemporaryDirectory(suffix=None, prefix=None, dir=None"
    )
    methods = [entry for entry in corpus.values() if entry.kind == "method"]
    assert not [entry.name for entry in methods if "(self" in entry.signature]


def test_signatures_from_files_are_python(corpus: dict[str, CorpusEntry]) -> None:
    for entry in corpus.values():
        if entry.line and entry.kind == "function" and not entry.signature.endswith("…"):
            ast.parse(f"async def {entry.signature.removeprefix('async ')}: pass")


def test_a_leading_signature_is_not_the_summary(corpus: dict[str, CorpusEntry]) -> None:
    assert corpus["time.sleep"].summary == "Delay execution for a given number of seconds."


def test_source_is_read_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "harmful.py").write_text(
        '"""Never run."""\nraise SystemExit("it was run")\n\n'
        'if True:\n    def hidden(a, *, b=1):\n        "Found under if."\n'
        'def _private():\n    "Not listed."\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from ._inner import *\nfrom .other import Shown\n")
    (package / "_inner.py").write_text(
        '__all__ = ["Star"]\nclass Star:\n    "Passed on."\nclass Kept:\n    "Not passed on."\n'
    )
    (package / "other.py").write_text(
        'class Shown:\n    "Named by the package."\nclass Own:\n    "Stays."\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "module.py").write_text('"""A test."""\n')
    from_files = {e.name: e for e in python_stdlib_corpus(tmp_path) if e.line is not None}
    assert sorted(from_files) == [
        "harmful",
        "harmful.hidden",
        "package.Shown",
        "package.Star",
        "package.other.Own",
    ]
    assert from_files["harmful.hidden"].signature == "hidden(a, *, b=1)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tempfile.TemporaryDirectory", "tempfile temporary directory"),
        ("os.path.split", "os path split"),
        ("xml.etree.ElementTree.XMLParser", "xml etree element tree xml parser"),
        ("str.isidentifier", "str isidentifier"),
        ("base64.b64encode", "base64 b64encode"),
    ],
)
def test_names_as_words(name: str, words: str) -> None:
    assert spoken(name) == words
