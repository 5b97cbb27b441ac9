"""The README tells the truth: its settings table is made from the settings, its lists name what is
there. (tests/http/test_readme_programs.py runs its programs.)

`python tests/unit/test_readme.py` writes the table anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from shoal.configuration import display
from shoal.settings import ServeSettings, setting_names

README = Path(__file__).resolve().parents[2] / "README.md"
TABLE = re.compile(r"(<!-- settings:[^\n]*-->\n).*?(<!-- /settings -->)", re.DOTALL)


def settings_table() -> str:
    rows = ["| Setting | Default | |", "|---|---|---|"]
    for name in setting_names(ServeSettings):
        field = ServeSettings.model_fields[name]
        if field.default_factory is not None:
            shown = "by cores"
        else:
            shown = f"`{display(name, field.default)}`"
        rows.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_settings_table_is_fresh():
    found = TABLE.search(README.read_text())
    assert found is not None
    assert found[0] == found[1] + settings_table() + found[2], f"run: python {__file__}"


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)`", README.read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_benchmarks_are_there():
    for name in re.findall(r"\| `([a-z_]+)` \|$", README.read_text(), re.MULTILINE):
        assert (README.parent / "benchmarks" / f"{name}.py").exists(), name


if __name__ == "__main__":
    os.chdir(README.parent)
    README.write_text(
        TABLE.sub(lambda found: found[1] + settings_table() + found[2], README.read_text())
    )
