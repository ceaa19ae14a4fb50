"""Settings: environment over file, unknown keys refused, every one documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import SettingsError
from shared.settings import Settings
from shared.settings_sources import load_settings, settings_in_force


def test_defaults_hold_without_anything() -> None:
    assert load_settings({}) == Settings()


def test_environment_goes_over_the_file_and_overrides_over_both(tmp_path: Path) -> None:
    file = tmp_path / "podium.toml"
    file.write_text('gateway_port = 1\nslot = "b"\nmax_hours = 48\n[models]\n"org/m" = "/m"\n')
    environ = {
        "PODIUM_CONFIG": str(file),
        "PODIUM_GATEWAY_PORT": "2",
        "PODIUM_MAX_HOURS": "12.5",
        "HOME": "/h",
    }
    settings = load_settings(environ, max_hours=1.0)
    assert (settings.gateway_port, settings.slot, settings.max_hours) == (2, "b", 1.0)
    assert settings.models == {"org/m": "/m"}


@pytest.mark.parametrize(("text", "value"), [("a,b, c", ("a", "b", "c")), ('["a"]', ("a",)), ("a", ("a",))])
def test_lists_are_json_or_separated_by_commas(text: str, value: tuple[str, ...]) -> None:
    assert load_settings({"PODIUM_SLOTS": text}).slots == value


def test_tables_and_truth_values_from_the_environment() -> None:
    settings = load_settings({"PODIUM_MODELS": '{"org/m": "/m"}', "PODIUM_ALLOW_PRIVATE_URLS": "true"})
    assert settings.models == {"org/m": "/m"}
    assert settings.allow_private_urls is True


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"PODIUM_GATEWAY_PROT": "1"}, "unknown setting PODIUM_GATEWAY_PROT"),
        ({"PODIUM_GATEWAY_PORT": "many"}, "gateway_port"),
        ({"PODIUM_GATEWAY_PORT": "70000"}, "gateway_port"),
        ({"PODIUM_MODELS": "{"}, "PODIUM_MODELS is not JSON"),
        ({"PODIUM_MODELS": '{"\udcff": "/m"}'}, "PODIUM_MODELS is not JSON"),
        ({"PODIUM_SLOTS": "a,a"}, "slots: 'a' is there more than once"),
        ({"PODIUM_SLOTS": "a,b.c"}, "slots: 'b.c' is no name of a slot: use 1 to 32 letters"),
        ({"PODIUM_SLOTS": "a,*"}, r"slots: '\*' is no name of a slot"),
        ({"PODIUM_SLOTS": '["a", ""]'}, "slots: '' is no name of a slot"),
        ({"PODIUM_SLOTS": '["a", "a\\n"]'}, "slots: .* is no name of a slot"),
        ({"PODIUM_SLOTS": f"a,{33 * 'b'}"}, "is no name of a slot"),
        ({"PODIUM_SLOT": "c"}, "slot 'c' is not one of slots a, b"),
        ({"PODIUM_LEASE_TRUST_S": "20"}, "lease_renew_s < lease_trust_s < lease_ttl_s"),
        ({"PODIUM_CONFIG": "/nowhere/podium.toml"}, "can't be read"),
        ({"PODIUM_LOG_LEVEL": "loud"}, "log_level"),
        ({"PODIUM_ARTIFACTS_KIND": "cloud"}, "artifacts_kind"),
        ({"PODIUM_ARTIFACTS_KIND": "hub"}, "needs hub_namespace"),
    ],
)
def test_bad_settings_are_refused_by_name(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        load_settings(environ)


def test_a_bad_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "podium.toml"
    file.write_text("slot = \n")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_settings({}, file=file)
    file.write_text('slott = "a"\n')
    with pytest.raises(SettingsError, match=r"unknown setting .*slott"):
        load_settings({}, file=file)


def test_every_setting_says_what_it_is() -> None:
    found = settings_in_force({})
    assert [one.name for one in found] == list(Settings.__struct_fields__)
    assert all(one.variable.startswith("PODIUM_") and one.type and one.meaning for one in found)
    assert all(one.value == one.default and one.source == "default" for one in found)


def test_settings_in_force_name_their_source(tmp_path: Path) -> None:
    file = tmp_path / "podium.toml"
    file.write_text('log_level = "debug"\nmax_hours = 12\n')
    environ = {"PODIUM_CONFIG": str(file), "PODIUM_MAX_HOURS": "24"}
    found = {one.name: (one.value, one.source) for one in settings_in_force(environ)}
    assert found["log_level"] == ("debug", str(file))
    assert found["max_hours"] == (24.0, "environment")
    assert found["slot"] == ("a", "default")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://user:secret@host:4222", "nats://user:***@host:4222"),
        ("nats://s3cr3t-t0k3n@host", "nats://***@host"),
        ("nats://host:4222/a@b", "nats://host:4222/a@b"),
        ("https://huggingface.co", "https://huggingface.co"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    found = {one.name: one.value for one in settings_in_force({"PODIUM_NATS_URL": url})}
    assert found["nats_url"] == shown


def test_folders_follow_from_the_data_folder() -> None:
    settings = load_settings({}, data_dir="/d", slot="b")
    assert (str(settings.node), str(settings.artifacts)) == ("/d/nodes/b", "/d/artifacts")


def test_an_empty_variable_is_not_set_and_compose_has_variables_of_its_own() -> None:
    environ = {"PODIUM_HOTKEY": "", "PODIUM_SLOTS": " ", "PODIUM_PUBLISH": "0.0.0.0", "PODIUM_GPUS": ""}
    assert load_settings(environ) == Settings(gpus="")
    sources = {each.name: each.source for each in settings_in_force(environ)}
    assert (sources["hotkey"], sources["gpus"]) == ("default", "environment")


def test_an_empty_variable_must_be_known_too() -> None:
    with pytest.raises(SettingsError, match="unknown setting PODIUM_HOTKEI"):
        load_settings({"PODIUM_HOTKEI": ""})


@pytest.mark.parametrize("content", [b'slot = "\xff"', b"slots = " + b"[" * 10_000])
def test_a_settings_file_that_can_not_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "podium.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"settings file .*podium\.toml is not TOML"):
        load_settings({"PODIUM_CONFIG": str(file)})
