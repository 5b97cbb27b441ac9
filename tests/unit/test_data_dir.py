"""The data folder: made, locked, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from shoal.data_dir import FORMAT, DataDirectory, Membership, ServerInfo
from shoal.errors import DataDirectoryLocked, FormatTooNew, StartupError

INFO = ServerInfo(4711, "127.0.0.1", 6333, "1.2.3")


def test_a_new_folder_is_made_and_used_again(tmp_path):
    path = tmp_path / "deep" / "data"
    for _ in range(2):
        with DataDirectory(path) as directory:
            assert (path / "FORMAT").read_text() == f"shoal data, format {FORMAT}\n"
            assert (path / "LOCK").read_text() == f"{os.getpid()}\n"
            directory.metadata.write_bytes(b"")
            (directory.shards / "1").mkdir(parents=True, exist_ok=True)


def test_second_opener_is_told_who_holds_it(tmp_path):
    with DataDirectory(tmp_path / "data") as directory:
        with (
            pytest.raises(DataDirectoryLocked, match=f"process {os.getpid()}, which is starting"),
            DataDirectory(directory.path),
        ):
            pass
        directory.announce(INFO)
        with (
            pytest.raises(DataDirectoryLocked, match=r"4711 at http://127\.0\.0\.1:6333"),
            DataDirectory(directory.path),
        ):
            pass
        assert directory.holder() == INFO  # the refused one took nothing away
    with DataDirectory(tmp_path / "data"):
        pass


def test_lock_and_announcement_of_a_killed_server_are_taken_over(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from shoal.data_dir import DataDirectory, ServerInfo\n"
        "with DataDirectory(Path(sys.argv[1])) as d:\n"
        "    d.announce(ServerInfo(os.getpid(), 'h', 1, 'v')); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "data"
    died = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert died.returncode == -9
    assert (path / "server.json").exists()
    with DataDirectory(path) as directory:
        assert not (path / "server.json").exists()
        directory.announce(INFO)
        assert json.loads((path / "server.json").read_text())["http_port"] == 6333
        directory.withdraw()
        directory.withdraw()
        assert not (path / "server.json").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.doc").write_text("")
    with pytest.raises(StartupError, match=r"thesis\.doc"), DataDirectory(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.doc"]


def test_the_root_of_a_fresh_file_system_will_do(tmp_path):
    (tmp_path / "lost+found").mkdir()
    with DataDirectory(tmp_path):
        pass


def test_newer_format_is_refused(tmp_path):
    (tmp_path / "FORMAT").write_text(f"shoal data, format {FORMAT + 1}\n")
    with pytest.raises(FormatTooNew, match=f"format {FORMAT + 1}"), DataDirectory(tmp_path):
        pass
    assert (tmp_path / "FORMAT").read_text() == f"shoal data, format {FORMAT + 1}\n"


@pytest.mark.parametrize("content", ["", "shoal data, format x", "\x00\x00"])
def test_damaged_format_is_refused(tmp_path, content):
    (tmp_path / "FORMAT").write_text(content)
    with pytest.raises(StartupError, match="damaged"), DataDirectory(tmp_path):
        pass


def test_shards_without_a_catalog_are_not_thrown_away(tmp_path):
    with DataDirectory(tmp_path / "data") as directory:
        (directory.shards / "1").mkdir(parents=True)
    with pytest.raises(StartupError, match="Restore the catalog"), DataDirectory(directory.path):
        pass
    assert (directory.shards / "1").is_dir()


def test_a_node_folder_remembers_whose_it_is(tmp_path):
    with DataDirectory(tmp_path / "data", of_node=True) as directory:
        assert directory.membership() is None
        directory.remember(Membership("s1", "c"))
        (directory.shards / "1").mkdir(parents=True)
    with DataDirectory(tmp_path / "data", of_node=True) as directory:
        assert directory.membership() == Membership("s1", "c")
        (directory.path / "NODE").write_text("{")
        with pytest.raises(StartupError, match="damaged"):
            directory.membership()


def test_servers_and_nodes_keep_out_of_each_others_folders(tmp_path):
    with DataDirectory(tmp_path / "node", of_node=True) as directory:
        directory.remember(Membership("s1", "c"))
    with pytest.raises(StartupError, match="shoal storage-node"), DataDirectory(directory.path):
        pass
    with DataDirectory(tmp_path / "server") as directory:
        directory.metadata.touch()
    node = DataDirectory(directory.path, of_node=True)
    with pytest.raises(StartupError, match="shoal serve"), node:
        pass


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(StartupError, match="--data-dir"), DataDirectory(tmp_path / "data"):
        pass


def test_url_of_an_ipv6_server():
    assert ServerInfo(1, "::1", 5, "v").url == "http://[::1]:5"
