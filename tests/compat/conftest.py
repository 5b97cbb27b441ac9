"""The packages of these tests are the `compat` extra; a test whose package is missing is skipped.

They are other people's: their warnings are not errors here, and they must not call home.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["MEM0_TELEMETRY"] = "False"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
os.environ["ANONYMIZED_TELEMETRY"] = "False"

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == _HERE:
            item.add_marker(pytest.mark.compat)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def _home_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them write settings into the home folder when they are imported or used."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEM0_DIR", str(tmp_path / "mem0"))
