"""Prints what pip needs for some extras of pyproject.toml, one requirement a line.

    python requirements.py cpu,encoder

The image installs dependencies before it has the sources, so that a change of the sources alone
leaves that layer as it is.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(extras: str) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        if extra not in project["optional-dependencies"]:
            known = ", ".join(sorted(project["optional-dependencies"]))
            raise SystemExit(f"EXTRAS names {extra!r}; pyproject.toml has {known}")
        wanted += project["optional-dependencies"][extra]
    return wanted


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
