"""The documents tell the truth: their settings tables are made from the settings, the lists of the
README name what is there. (tests/http/test_readme_programs.py runs its programs.)

`python tests/unit/test_readme.py` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from shoal.configuration import display
from shoal.settings import PROCESSES, ServeSettings, setting_names

README = Path(__file__).resolve().parents[2] / "README.md"
OPERATING = README.parent / "docs/operating.md"
TABLE = re.compile(r"(<!-- settings:[^\n]*-->\n).*?(<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    """What `shoal serve` can be told."""
    rows = ["| Setting | Default | |", "|---|---|---|"]
    for name in setting_names(ServeSettings):
        field = ServeSettings.model_fields[name]
        rows.append(f"| `{name}` | {shown_default(name, field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def cluster_table() -> str:
    """What the processes of a cluster can be told beyond that."""
    takers: dict[str, list[str]] = {}
    for role, process in PROCESSES.items():
        if role != "serve":
            for name in setting_names(process):
                if name not in setting_names(ServeSettings) or name == "grpc_port":
                    takers.setdefault(name, []).append(role)
    rows = ["| Setting | Default | Of | |", "|---|---|---|---|"]
    for name, roles in takers.items():
        defaults = {shown_default(name, PROCESSES[role].model_fields[name]): None for role in roles}
        who = "all" if len(roles) == len(PROCESSES) - 1 else ", ".join(roles)
        about = PROCESSES[roles[0]].model_fields[name].description
        rows.append(f"| `{name}` | {', '.join(defaults)} | {who} | {about} |")
    return "\n".join(rows) + "\n"


def shown_default(name: str, field: FieldInfo) -> str:
    return "by cores" if field.default_factory is not None else f"`{display(name, field.default)}`"


TABLES = {README: settings_table, OPERATING: cluster_table}


@pytest.mark.parametrize("document", TABLES, ids=lambda path: path.name)
def test_the_settings_table_is_fresh(document):
    found = TABLE.search(document.read_text())
    assert found is not None
    assert found[0] == found[1] + TABLES[document]() + found[2], f"run: python {__file__}"


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)`", README.read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_benchmarks_are_there():
    for name in re.findall(r"\| `([a-z_]+)` \|$", README.read_text(), re.MULTILINE):
        assert (README.parent / "benchmarks" / f"{name}.py").exists(), name


if __name__ == "__main__":
    for path, table in TABLES.items():
        fresh = TABLE.sub(lambda found: found[1] + table() + found[2], path.read_text())  # noqa: B023
        path.write_text(fresh)
