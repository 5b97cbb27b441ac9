"""Settings: precedence, origins, and what people are told when something is wrong."""

from __future__ import annotations

import os

import pytest

from shoal.configuration import display, load_settings
from shoal.errors import SettingsError
from shoal.settings import (
    ENV_PREFIX,
    PROCESSES,
    CoordinatorProcess,
    MonitorProcess,
    ServeSettings,
    StorageProcess,
    StorageSettings,
    setting_names,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_flags_over_variables_over_file_over_defaults(tmp_path, monkeypatch):
    file = tmp_path / "shoal.toml"
    file.write_text('http_port = 1\nhttp_host = "0.0.0.0"\nseal_bytes = "1MiB"\n')
    monkeypatch.setenv("SHOAL_HTTP_PORT", "2")
    monkeypatch.setenv("SHOAL_SEAL_BYTES", "2 MiB")
    loaded = load_settings({"http_port": "3"}, file)
    settings = loaded.settings
    assert (settings.http_port, settings.seal_bytes, settings.http_host) == (3, 2 << 20, "0.0.0.0")
    assert settings.default_shard_number == 1
    assert {name: loaded.origins[name] for name in ("http_port", "seal_bytes", "log_level")} == {
        "http_port": "--http-port",
        "seal_bytes": "SHOAL_SEAL_BYTES",
        "log_level": "default",
    }
    assert loaded.origins["http_host"] == str(file)


def test_config_variable_names_the_file_and_the_flag_wins(tmp_path, monkeypatch):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("http_port = 1")
    two.write_text("http_port = 2")
    monkeypatch.setenv("SHOAL_CONFIG", str(one))
    assert load_settings({}).settings.http_port == 1
    assert load_settings({}, two).settings.http_port == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("1MiB", 1 << 20),
        ("1 mib", 1 << 20),
        ("1.5MiB", 3 << 19),
        ("2MB", 2_000_000),
        ("2G", 2_000_000_000),
        ("70000B", 70_000),
    ],
)
def test_sizes(text, size):
    assert load_settings({"seal_bytes": text}).settings.seal_bytes == size


@pytest.mark.parametrize("text", ["1XB", "MiB", "-1MiB", "", "1 2MiB", "64KiBs", "1"])
def test_wrong_sizes(text):
    with pytest.raises(SettingsError, match="seal_bytes") as caught:
        load_settings({"seal_bytes": text})
    assert "16MiB" in caught.value.message


@pytest.mark.parametrize(
    ("flags", "variables", "toml", "told"),
    [
        ({"http_port": "99999"}, {}, "", ["http_port", "'99999'", "--http-port", "0 to 65535"]),
        ({}, {"SHOAL_HTTP_PORT": "many"}, "", ["SHOAL_HTTP_PORT", "'many'", "0 to 65535"]),
        ({}, {}, "http_port = [1]", ["shoal.toml", "http_port", "[1]"]),
        ({}, {"SHOAL_HTTP_PROT": "1"}, "", ["SHOAL_HTTP_PROT", "Did you mean SHOAL_HTTP_PORT"]),
        ({}, {}, "seal_byte = 1", ["shoal.toml", "seal_byte,", "Did you mean seal_bytes"]),
        ({}, {}, "http_port = \n", ["shoal.toml", "TOML", "line 1"]),
        ({"log_level": "loud"}, {}, "", ["log_level", "debug, info, warning or error"]),
        ({}, {"SHOAL_API_KEY": ""}, "", ["api_key", "SHOAL_API_KEY", "not empty"]),
        ({"read_only_api_key": "k"}, {}, "", ["set api_key too"]),
        ({"read_only_api_key": "k", "api_key": "k"}, {}, "", ["make them differ"]),
        ({"default_shard_number": "0"}, {}, "", ["default_shard_number", "1 to 64"]),
        ({"shutdown_grace_s": "nan"}, {}, "", ["shutdown_grace_s", "seconds"]),
    ],
)
def test_what_is_wrong_is_told(flags, variables, toml, told, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "shoal.toml"
    file.write_text(toml)
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, file)
    for part in told:
        assert part in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_settings_file(tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings({}, tmp_path / "no.toml")


def test_secrets_are_never_shown(monkeypatch):
    secret = "ee-very-secret"
    monkeypatch.setenv("SHOAL_API_KEY", secret)
    loaded = load_settings({})
    assert loaded.settings.api_key.get_secret_value() == secret
    assert secret not in repr(loaded)
    assert display("api_key", loaded.settings.api_key) == "(set)"
    monkeypatch.setenv("SHOAL_READ_ONLY_API_KEY", secret)
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    assert secret not in caught.value.message
    with pytest.raises(SettingsError) as caught:
        load_settings({"api_key": 12345678})
    assert "12345678" not in caught.value.message


def test_fault_points_are_no_settings(monkeypatch):
    monkeypatch.setenv("SHOAL_FAULT", "log.after_fsync:3")
    load_settings({})


@pytest.mark.parametrize("command", sorted(PROCESSES))
def test_every_setting_is_documented(command):
    process = PROCESSES[command]
    for name in setting_names(process):
        field = process.model_fields[name]
        assert (field.description or "").endswith("."), name
        assert field.json_schema_extra["right"], name


def test_parts_take_the_whole_for_their_own():
    assert isinstance(ServeSettings(), StorageSettings)
    assert StorageSettings(seal_bytes=65_536).seal_bytes == 65_536


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("seal_bytes", 16 << 20, "16MiB"),
        ("seal_bytes", 100_000, "100000"),
        ("disk_free_bytes_min", 0, "0"),
        ("http_port", 1024, "1024"),
        ("api_key", None, "none"),
    ],
)
def test_display(name, value, shown):
    assert display(name, value) == shown


# -- processes of a cluster ------------------------------------------------------------------------


def test_one_file_and_one_environment_serve_all_processes_of_a_cluster(tmp_path, monkeypatch):
    file = tmp_path / "cluster.toml"
    file.write_text(
        'metadata = "etcd://a:2379,[::1]:2380"\nrereplicate_after_s = 5\nhttp_port = 7000\n'
    )
    monkeypatch.setenv("SHOAL_SEAL_BYTES", "1MiB")
    coordinator = load_settings({}, file, CoordinatorProcess).settings
    storage = load_settings({}, file, StorageProcess).settings
    monitor = load_settings({}, file, MonitorProcess).settings
    assert coordinator.etcd_endpoints == ("a:2379", "[::1]:2380")
    assert (coordinator.http_port, storage.seal_bytes) == (7000, 1 << 20)
    assert monitor.rereplicate_after_s == 5
    assert "seal_bytes" not in load_settings({}, file, MonitorProcess).origins


def test_a_single_server_refuses_the_settings_of_a_cluster(monkeypatch):
    monkeypatch.setenv("SHOAL_METADATA", "etcd://a:1")
    with pytest.raises(SettingsError, match="SHOAL_METADATA is no setting of `shoal serve`"):
        load_settings({})


def test_a_name_that_no_process_knows_is_refused_by_each(tmp_path):
    file = tmp_path / "cluster.toml"
    file.write_text("rereplicate_afters = 5")
    with pytest.raises(SettingsError, match="Did you mean rereplicate_after_s") as caught:
        load_settings({}, file, StorageProcess)
    assert "`shoal settings --role storage-node`" in caught.value.message


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"metadata": "a:2379"}, ["metadata", "only etcd:// is known", "etcd://host1:2379"]),
        ({"metadata": "etcd://a:2379,b"}, ["'b' is no host:port"]),
        ({"metadata": "etcd://a:0"}, ["'a:0' is no host:port"]),
        ({"node_id": "s 1"}, ["node_id", "letters"]),
        ({"cluster_name": ""}, ["cluster_name", "letters"]),
        ({"etcd_cert_file": "c.pem"}, ["etcd_key_file go together"]),
        ({"etcd_cert_file": "c", "etcd_key_file": "k"}, ["set etcd_ca_file too"]),
        ({"node_ca_file": "ca.pem"}, ["node_key_file go together"]),
        ({"etcd_user": "u"}, ["etcd_password go together"]),
        ({"node_lease_s": "0"}, ["node_lease_s", "1 to 300"]),
    ],
)
def test_what_is_wrong_with_a_cluster_is_told(flags, told):
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, None, StorageProcess)
    for part in told:
        assert part in caught.value.message


def test_the_password_is_never_shown():
    with pytest.raises(SettingsError) as caught:
        load_settings({"etcd_user": "u", "etcd_password": 12345678}, None, StorageProcess)
    assert "12345678" not in caught.value.message
