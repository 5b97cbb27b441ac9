"""The command line: help, exit statuses, and that help is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoal import cli
from shoal.settings import PROCESSES, setting_names
from shoal.version import VERSION


def test_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("serve", "demo", "import", "cluster", "storage-node", "settings", "version"):
        assert f"  {command} " in shown
    assert cli.main([]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"shoal {VERSION}\n"


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["serv"]) == 2
    assert "Did you mean `shoal serve`?" in capsys.readouterr().err


def test_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--http-prot=1"])
    assert caught.value.code == 2
    assert "Did you mean --http-port?" in capsys.readouterr().err


def test_wrong_value_exits_2_with_one_sentence(capsys):
    assert cli.main(["serve", "--http-port", "x"]) == 2
    error = capsys.readouterr().err
    assert "--http-port" in error
    assert error.count("\n") == 1


def test_settings_show_value_and_origin(capsys, tmp_path):
    file = tmp_path / "s.toml"
    file.write_text('api_key = "hidden"')
    arguments = ["settings", "--config", str(file), "--seal-bytes", "1MiB"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "seal_bytes = 1MiB  # --seal-bytes" in shown
    assert f"api_key = (set)  # {file}" in shown
    assert "http_port = 6333  # default" in shown
    assert "hidden" not in shown


@pytest.mark.parametrize("command", sorted(PROCESSES))
def test_help_describes_every_setting(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, *(["serve"] if command == "encoder" else []), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in setting_names(PROCESSES[command]):
        assert "--" + name.replace("_", "-") in shown
        assert "SHOAL_" + name.upper() in shown


def test_settings_of_a_role(capsys):
    arguments = ["settings", "--role", "monitor", "--rereplicate-after-s", "5"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "rereplicate_after_s = 5.0  # --rereplicate-after-s" in shown
    assert "grpc_port = 6337  # default" in shown
    assert "http_port" not in shown


def test_settings_of_an_unknown_role(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["settings", "--role", "moniter"])
    assert caught.value.code == 2
    assert "monitor" in capsys.readouterr().err


def test_health_of_nobody(capsys, tmp_path):
    assert cli.main(["health", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from shoal.cli import main; main(['--help']);"
        "print([m for m in ('numpy', 'faiss', 'pydantic', 'torch', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
