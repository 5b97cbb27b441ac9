"""The programs of the README run as they stand, against a server of their own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Server

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
ADDRESS, GRPC_ADDRESS = "http://localhost:6333", "localhost:6334"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CURLS = re.findall(r"^```sh\n(curl .*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme_server(tmp_path_factory: pytest.TempPathFactory):
    server = Server(tmp_path_factory.mktemp("readme") / "data")
    server.start()
    yield server
    server.kill9()


def test_the_readme_has_programs():
    assert (len(PROGRAMS), len(CURLS)) == (3, 1)
    assert all(ADDRESS in program or GRPC_ADDRESS in program for program in PROGRAMS)


def test_the_programs_run(readme_server):
    for program in PROGRAMS:
        here = program.replace(ADDRESS, readme_server.url)
        here = here.replace(GRPC_ADDRESS, readme_server.grpc)
        exec(compile(here, "README.md", "exec"), {})
    if shutil.which("curl") is None:
        pytest.skip("the programs ran; there is no curl here for the last example")
    command = shlex.split(CURLS[0].replace("localhost:6333", readme_server.url))
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "renew the passport" in answer.stdout, answer.stdout + answer.stderr
