from __future__ import annotations

from pathlib import Path

import pytest

from podium.commands.up import EXAMPLES, chosen_settings, make_stack
from podium.local.stack import Stack
from shared.errors import PodiumError, SettingsError


def test_chosen_settings_come_from_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "podium.toml"
    file.write_text('slots = ["a"]\n')
    assert chosen_settings({"PODIUM_CONFIG": str(file), "PODIUM_SEED": "1", "HOME": "/"}) >= {"slots", "seed"}


async def stack(folder: Path, **environment: str) -> Stack:
    overrides = {"data_dir": str(folder), "gateway_port": 0, "hardware": "cpu"}
    return await make_stack({"nats_url": "nats://127.0.0.1:0", **overrides}, environment)


async def test_defaults_of_one_machine_give_way_to_what_the_operator_chose(tmp_path: Path) -> None:
    settings = (await stack(tmp_path)).settings
    assert settings.dataset_roots == (str(EXAMPLES),)
    assert settings.expected_hardware == "cpu"
    chosen = (
        await stack(tmp_path, PODIUM_DATASET_ROOTS="/srv", PODIUM_EXPECTED_HARDWARE="2xA100-80GB")
    ).settings
    assert chosen.dataset_roots == ("/srv",)
    assert chosen.expected_hardware == "2xA100-80GB"


async def test_a_wrong_policy_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown policy 'greedy'"):
        await stack(tmp_path, PODIUM_POLICY="greedy")


async def test_a_broker_elsewhere_is_used_and_none_is_started(tmp_path: Path) -> None:
    made = await make_stack({"data_dir": str(tmp_path), "nats_url": "nats://far:4222", "hardware": "cpu"}, {})
    assert made.broker_port == 0
    assert made.settings.nats_url == "nats://far:4222"


async def test_services_get_every_setting_and_each_node_its_own_slot(tmp_path: Path) -> None:
    made = await stack(tmp_path)
    specs = {spec.name: spec for spec in made._specs()}
    assert list(specs) == ["broker", "gateway", "node-a", "node-b"]
    assert specs["node-b"].environment["PODIUM_SLOT"] == "b"
    assert specs["node-b"].environment["PODIUM_NODE_DIR"] == str(tmp_path / "nodes" / "b")
    assert specs["gateway"].environment["PODIUM_NATS_URL"] == f"nats://127.0.0.1:{made.broker_port}"
    for name in ("gateway", "node-a", "node-b"):  # each takes its own key from there
        assert specs[name].environment["PODIUM_NATS_NKEY_SEED_FILE"] == str(tmp_path / "keys")


async def test_nothing_is_deleted_in_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    made = await stack(tmp_path)
    with pytest.raises(PodiumError, match="not Podium"):
        await made.start(fresh=True)
    assert (tmp_path / "logs").is_dir()


async def test_one_data_folder_has_one_stack(tmp_path: Path) -> None:
    first, second = await stack(tmp_path), await stack(tmp_path)
    await first.start()
    try:
        with pytest.raises(PodiumError, match="already runs"):
            await second.start()
    finally:
        await second.stop()
        await first.stop()
