"""What only PostgreSQL can get wrong: order of names, NUL, two coordinators, a restart, secrets."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator.settings import CoordinatorSettings
from coordinator.store import schema
from coordinator.store.place import NOTE, StoreSettings
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
from foundation import settings
from foundation.errors import SettingsError, StoreError
from tests.postgres import Cluster

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
RUN = RunRecord("r", "fedavg", "{}", "{}", 3, 2**62)


def test_names_come_in_the_order_of_code_points_whatever_the_database_thinks(
    tmp_path: Path, database: str
) -> None:
    names = ["a-b", "A", "b", "a_b", "B", "a", "a.b", "a10", "a9"]
    with Store.open(tmp_path, place=StoreSettings(database=database)) as store:
        store.open_run(RUN)
        store.open_round("r", 1, names, 0)
        for name in names:
            store.add_update("r", 1, name, name.encode(), {})
        assert [u.agent for u in store.updates("r", 1)] == sorted(names)
        first = store.history("r", limit=4)
        rest = store.history("r", after=(1, first[-1].agent))
        assert [u.agent for u in first + rest] == sorted(names)


def test_a_nul_that_a_device_says_does_not_stop_the_store(tmp_path: Path, database: str) -> None:
    with Store.open(tmp_path, place=StoreSettings(database=database)) as store:
        store.add_refusal("r", 1, "pi", "no\0room", NOON)
        store.add_event("problem", text="a\0b", data={"c": "d\0"})
        assert [r.reason for r in store.refusals()] == ["no\ufffdroom"]
        (event,) = store.events()
        assert (event.text, event.data) == ("a\ufffdb", {"c": "d\0"})


def test_a_database_has_one_coordinator(tmp_path: Path, database: str) -> None:
    place = StoreSettings(database=database)
    with Store.open(tmp_path / "a", place=place) as a, Store.open(tmp_path / "b", place=place) as b:
        with a.alone(), pytest.raises(StoreError, match="another coordinator works on this"), b.alone():
            pass
        with b.alone():
            b.open_run(RUN)
        assert a.has_run("r")


def test_two_stores_may_make_one_database_at_one_time(tmp_path: Path, database: str) -> None:
    def opened(name: str) -> str:
        with Store.open(tmp_path / name, place=StoreSettings(database=database)) as store:
            store.open_run(RUN)
            return store.run("r").strategy

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(opened, "ab")] == ["fedavg"] * 2


def test_verbs_wait_for_a_server_that_crashed_and_is_started_again(
    tmp_path: Path, database: str, postgres_cluster: Cluster
) -> None:
    with Store.open(tmp_path, place=StoreSettings(database=database)) as store:
        store.open_run(RUN)
        store.check()
        postgres_cluster.stop(signal.SIGQUIT)
        back = threading.Thread(target=postgres_cluster.start)
        try:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(store.run, "r")
                back.start()
                assert waiting.result(60).strategy == "fedavg"
        finally:
            back.join()
        store.open_round("r", 1, ["a"], 0)


def test_a_store_that_cannot_be_opened_says_so_without_the_password(
    tmp_path: Path, postgres_cluster: Cluster
) -> None:
    nowhere = f"postgresql://hedgerow:hunter2@/nowhere?host={postgres_cluster.folder}"
    with pytest.raises(StoreError, match="nowhere") as caught:
        Store.open(tmp_path, place=StoreSettings(database=nowhere))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in (tmp_path / NOTE).read_text()
    with pytest.raises(StoreError, match="keeps LATIN1: make one with ENCODING 'UTF8'"):
        Store.open(tmp_path, place=StoreSettings(database=postgres_cluster.database("LATIN1")))


def test_a_database_of_a_newer_hedgerow_is_refused(tmp_path: Path, database: str) -> None:
    place = StoreSettings(database=database)
    with Store.open(tmp_path, place=place) as store, store._writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="revision 9999"):
        Store.open(tmp_path, place=place)
    with pytest.raises(StoreError, match=f"this Hedgerow reads {schema.REVISION}"):
        Store.open_to_read(tmp_path)


@pytest.mark.parametrize("url", ["mysql://a@b/c", "postgresql://host-alone", "what", "sqlite:///x"])
def test_another_kind_of_database_is_no_setting(url: str) -> None:
    with pytest.raises(SettingsError, match="write it as postgresql://"):
        settings.load(CoordinatorSettings, None, {}, [f"store.database={url}"])


def test_settings_are_shown_without_the_password() -> None:
    url = "store.database=postgresql://anna:hunter2@db.lan/hedgerow"
    loaded, origins = settings.load(CoordinatorSettings, None, {}, [url])
    assert "hunter2" not in settings.show(loaded, origins)
    assert loaded.store.url is not None
    assert loaded.store.url.password == "hunter2"
