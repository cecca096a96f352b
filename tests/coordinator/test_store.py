"""The store: verbs, durability, migrations, blobs, and kill -9 at random instants."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.store import schema
from coordinator.store.blobs import Blobs
from coordinator.store.place import StoreSettings
from coordinator.store.records import NewEvent, PlugReading, RunRecord, dumps, loads
from coordinator.store.sql import Store
from foundation.artifact import Manifest
from foundation.errors import StoreError
from foundation.messages import AgentCard
from foundation.normalisation import Normalisation

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """A clock one can turn."""

    def __init__(self) -> None:
        self.now = NOON.timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> StoreSettings:
    """Where rows are: every law of the store holds in both databases."""
    if request.param == "sqlite":
        return StoreSettings()
    return StoreSettings(database=request.getfixturevalue("database"))


@pytest.fixture
def store(tmp_path: Path, clock: Clock, place: StoreSettings) -> Iterator[Store]:
    with Store.open(tmp_path / "store", clock=clock, place=place) as store:
        yield store


def a_run(run: str = "r1", rounds: int = 3, settings: str = '{"lr": 0.1, "mu": 1}') -> RunRecord:
    return RunRecord(run, "fedavg", settings, '{"width": 16}', rounds, 7)


def blobs_of(store: Store) -> set[str]:
    return set(store._blobs.all())


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def manifest(agent: str = "pi", round: int = 1, run: str = "r1") -> Manifest:
    return Manifest(
        agent=agent,
        run=run,
        round=round,
        strategy="fedavg",
        sha256=sha(f"{agent}{round}".encode()),
        bytes=90_000,
        dense_bytes=140_000,
        parameters=22_000,
        dense_parameters=35_000,
        input="image",
        shape=(1, 8, 8),
        labels=("0", "1"),
        normalisation=Normalisation(),
        kept_units=(20, 31),
        hidden_units=64,
        opset=17,
        tolerance=1e-4,
        parity=2e-6,
    )


def test_a_run_is_opened_once_and_keeps_its_settings(store: Store) -> None:
    store.open_run(a_run())
    store.open_run(a_run(settings='{"mu": 1, "lr": 0.1}'))
    assert store.run("r1").state == "waiting"
    assert store.run("r1").created == NOON
    with pytest.raises(StoreError, match="another settings_json and rounds"):
        store.open_run(a_run(settings='{"lr": 0.2}', rounds=4))
    assert store.run("r1").rounds == 3


def test_runs_come_newest_first_and_tell_their_state(store: Store, clock: Clock) -> None:
    store.open_run(a_run("old"))
    clock.now += 60
    store.open_run(a_run("new"))
    store.set_run_state("old", "failed", "quorum missed")
    assert [r.run for r in store.runs()] == ["new", "old"]
    assert (store.run("old").state, store.run("old").reason) == ("failed", "quorum missed")
    assert store.run("old").changed == NOON + timedelta(seconds=60)
    assert store.has_run("new")
    assert not store.has_run("nobody")
    with pytest.raises(StoreError, match="no state of a run"):
        store.set_run_state("old", "napping")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no run 'nobody'"):
        store.set_run_state("nobody", "running")
    with pytest.raises(StoreError, match="no run 'nobody'"):
        store.run("nobody")


def test_agents_keep_their_latest_card(store: Store) -> None:
    card = AgentCard(
        agent="pi", version="0.1.0", profile="raspberry_pi_5", examples=100, terms=frozenset({"b", "a"})
    )
    store.upsert_agent(card, NOON)
    newer = card.model_copy(update={"examples": 120})
    store.upsert_agent(newer, NOON + timedelta(hours=1))
    store.upsert_agent(newer, NOON)  # heard late
    (kept,) = store.agents()
    assert kept.card == newer
    assert (kept.first_seen, kept.last_seen) == (NOON, NOON + timedelta(hours=1))


def test_a_round_opens_once_and_closes_with_its_state(store: Store, clock: Clock) -> None:
    store.open_run(a_run())
    store.save_initial_state("r1", b"zero")
    assert store.latest_state("r1") == (0, b"zero")
    store.open_round("r1", 1, ["b", "a"], deadline=clock.now + 30)
    clock.now += 12.5
    store.open_round("r1", 1, ["c"], deadline=0)
    opened = store.round_record("r1", 1)
    assert opened is not None
    assert (opened.state, opened.agents, opened.seconds) == ("open", ("b", "a"), None)
    store.close_round("r1", 1, b"one", {"accuracy": 0.5, "loss": math.nan})
    store.close_round("r1", 1, b"one", {})
    (closed,) = store.rounds("r1")
    assert (closed.state, closed.seconds, closed.deadline) == ("closed", 12.5, NOON.timestamp() + 30)
    assert closed.metrics == {"accuracy": 0.5, "loss": None}
    assert store.latest_state("r1") == (1, b"one")
    with pytest.raises(StoreError, match="another state"):
        store.close_round("r1", 1, b"other", {})
    with pytest.raises(StoreError, match="never opened"):
        store.close_round("r1", 2, b"two", {})
    with pytest.raises(StoreError, match="no run"):
        store.open_round("nobody", 1, [], 0)
    assert store.round_record("r1", 2) is None


def test_a_round_keeps_the_decisions_that_it_was_opened_with(store: Store) -> None:
    store.open_run(a_run())
    store.open_round("r1", 1, ["a"], 0, eased={"a": {"epochs": 1}}, skipped={"b": "it is offline"})
    store.open_round("r1", 1, ["a"], 0, eased={}, skipped={})
    kept = store.round_record("r1", 1)
    assert kept is not None
    assert (kept.eased, kept.skipped) == ({"a": {"epochs": 1}}, {"b": "it is offline"})
    store.open_round("r1", 2, ["a"], 0)
    with store._writing() as connection:  # as an earlier version wrote it
        rounds = schema.rounds
        old = sa.update(rounds).where(rounds.c.round == 2).values(agents_json='{"agents": ["a"]}')
        connection.execute(old)
    before = store.round_record("r1", 2)
    assert before is not None
    assert (before.agents, before.eased, before.skipped) == (("a",), {}, {})


def test_the_last_updates_of_each_agent_and_those_of_today(store: Store, clock: Clock) -> None:
    for run in ("r1", "r2", "other"):
        store.open_run(a_run(run))
        for number in (1, 2, 3):
            store.open_round(run, number, ["a", "b"], 0)
            for agent in ("a", "b"):
                store.add_update(run, number, agent, b"f", {})
            clock.now += 60
    found = store.latest_of(["r1", "r2"], ["a", "nobody"], 4)
    assert [(u.run, u.round, u.agent) for u in found] == [
        ("r2", 3, "a"),
        ("r2", 2, "a"),
        ("r2", 1, "a"),
        ("r1", 3, "a"),
    ]
    assert [u.agent for u in store.latest_of(["r1"], ["a", "b"], 1)] == ["a", "b"]
    assert store.latest_of([], ["a"], 4) == []
    late = store.updates_since(NOON.timestamp() + 7 * 60, ["a"])
    assert [(u.run, u.round) for u in late] == [("other", 2), ("other", 3)]


def test_a_round_closed_without_a_state_keeps_what_it_is_made_of(store: Store) -> None:
    store.open_run(a_run())
    store.save_initial_state("r1", b"zero")
    store.open_round("r1", 1, ["a", "b", "c"], 60.0)
    for agent in ("a", "b", "c"):
        store.add_update("r1", 1, agent, agent.encode() * 9, {})
    store.close_round("r1", 1, None, {"updates": 2}, absorbed=["a", "b"])
    assert store.latest_state("r1") == (0, b"zero")
    frames = {u.agent: u.frame_sha256 is not None for u in store.updates("r1", 1)}
    assert frames == {"a": True, "b": True, "c": False}, "what came too late must not be absorbed later"
    store.save_state("r1", 1, b"one")
    store.save_state("r1", 1, b"one")
    assert store.latest_state("r1") == (1, b"one")
    with pytest.raises(StoreError, match="another state"):
        store.save_state("r1", 1, b"two")
    with pytest.raises(StoreError, match="not closed"):
        store.save_state("r1", 2, b"two")


def test_only_the_last_two_states_are_kept(store: Store) -> None:
    store.open_run(a_run())
    store.save_initial_state("r1", b"zero")
    store.save_initial_state("r1", b"zero")
    for round in (1, 2, 3):
        store.open_round("r1", round, ["a"], 0)
        store.close_round("r1", round, b"state %d" % round, {})
    assert blobs_of(store) == {sha(b"state 2"), sha(b"state 3")}
    assert store.latest_state("r1") == (3, b"state 3")
    with pytest.raises(StoreError, match="resume from it"):
        store.save_initial_state("r1", b"zero")
    assert store.latest_state("other") is None


def test_a_state_that_does_not_change_outlives_its_older_twins(store: Store) -> None:
    store.open_run(a_run(rounds=4))
    store.save_initial_state("r1", b"same")
    for round in (1, 2, 3, 4):
        store.open_round("r1", round, ["a"], 0)
        store.close_round("r1", round, b"same", {})
    assert store.latest_state("r1") == (4, b"same")


def test_the_first_update_stays(store: Store) -> None:
    store.open_run(a_run())
    store.open_round("r1", 1, ["a", "b"], 0)
    assert store.add_update("r1", 1, "b", b"frame b", {"examples": 3, "metrics": {"loss": math.inf}})
    assert store.add_update("r1", 1, "a", b"frame a", {"examples": 4})
    assert not store.add_update("r1", 1, "a", b"another", {"examples": 5})
    assert [u.agent for u in store.updates("r1", 1)] == ["a", "b"]
    assert store.updates("r1", 1)[0].summary == {"examples": 4}
    assert store.updates("r1", 1)[1].summary["metrics"] == {"loss": None}
    assert store.update_frame("r1", 1, "a") == b"frame a"
    with pytest.raises(StoreError, match="never opened"):
        store.add_update("r1", 2, "a", b"x", {})
    with pytest.raises(StoreError, match="no update of 'c'"):
        store.update_frame("r1", 1, "c")
    with pytest.raises(StoreError, match="cannot be kept as JSON"):
        store.add_update("r1", 1, "c", b"x", {"what": object()})
    assert [u.agent for u in store.history("r1")] == ["a", "b"]


def test_frames_of_closed_rounds_can_be_released(store: Store) -> None:
    store.open_run(a_run())
    for round in (1, 2, 3):
        store.open_round("r1", round, ["a", "b"], 0)
        store.add_update("r1", round, "a", b"shared" if round != 2 else b"frame 2", {"examples": round})
        if round < 3:
            store.close_round("r1", round, b"state", {})
    assert store.drop_frames("r1", before_round=4) == 2  # round 3 is open: its frame stays
    assert store.drop_frames("r1", before_round=4) == 0
    assert sha(b"frame 2") not in blobs_of(store)
    assert store.update_frame("r1", 3, "a") == b"shared"
    assert [u.summary["examples"] for u in store.history("r1")] == [1, 2, 3]
    assert store.history("r1")[0].frame_sha256 is None
    with pytest.raises(StoreError, match="released"):
        store.update_frame("r1", 1, "a")


def test_history_pages_by_key(store: Store) -> None:
    store.open_run(a_run())
    for round in (1, 2):
        store.open_round("r1", round, [], 0)
        for agent in "cab":
            store.add_update("r1", round, agent, b"f", {})
    first = store.history("r1", limit=4)
    rest = store.history("r1", after=(first[-1].round, first[-1].agent))
    assert [(u.round, u.agent) for u in first + rest] == [(r, a) for r in (1, 2) for a in "abc"]
    assert [r.round for r in store.rounds("r1", after=1, limit=5)] == [2]


def test_refusals_artifacts_and_events(store: Store) -> None:
    first = store.add_refusal("r1", 1, "pi", "deadline passed", NOON)
    store.add_refusal("r2", 1, "pi", "unknown term", NOON)
    assert [r.reason for r in store.refusals("r1")] == ["deadline passed"]
    assert [r.reason for r in store.refusals(after_id=first)] == ["unknown term"]
    assert store.add_artifact(manifest(round=1))
    assert store.add_artifact(manifest(round=2))
    assert not store.add_artifact(manifest(round=2))
    assert store.artifacts("r1") == [manifest(round=2), manifest(round=1)]
    assert store.artifacts(after=1, limit=1) == [manifest(round=1)]
    assert store.artifacts("r2") == []
    one = store.add_event("round", "r1", 1, None, "round opened", {"agents": 2})
    two, three = store.add_events([NewEvent("note", "a"), NewEvent("note", "b", when=NOON + timedelta(1))])
    assert one < two < three
    assert [e.id for e in store.events(after_id=one)] == [two, three]
    assert [e.id for e in store.events(limit=1)] == [one]
    assert store.events()[0].data == {"agents": 2}
    assert store.events()[2].when == NOON + timedelta(1)
    assert [e.id for e in store.latest_events(2)] == [three, two]
    assert [e.id for e in store.latest_events(run="r1")] == [one]


def test_everything_is_there_after_reopening(tmp_path: Path, place: StoreSettings) -> None:
    folder = tmp_path / "it's 100 % ok?"
    with Store.open(folder, place=place) as store:
        store.open_run(a_run())
        store.open_round("r1", 1, ["a"], 5.0)
        store.add_update("r1", 1, "a", b"frame", {"examples": 1})
        store.close_round("r1", 1, b"state", {"accuracy": 1.0})
    with Store.open(folder, place=place) as store:
        assert store.latest_state("r1") == (1, b"state")
        assert store.update_frame("r1", 1, "a") == b"frame"
        store.check()
    with Store.open_to_read(folder) as store:  # which finds the database by itself
        assert store.update_frame("r1", 1, "a") == b"frame"
        with pytest.raises(StoreError):
            store.open_run(a_run("r2"))


def test_a_damaged_or_missing_blob_is_named(store: Store) -> None:
    store.open_run(a_run())
    store.save_initial_state("r1", b"state")
    path = store._blobs._path(sha(b"state"))
    path.write_bytes(b"stale")
    with pytest.raises(StoreError, match=f"{sha(b'state')} is damaged"):
        store.latest_state("r1")
    assert store._blobs.put(b"state") == sha(b"state")  # written again over the damage
    assert store.latest_state("r1") == (0, b"state")
    path.unlink()
    with pytest.raises(StoreError, match=f"{sha(b'state')} is missing"):
        store.latest_state("r1")


def test_a_sweep_takes_what_nothing_names(store: Store, tmp_path: Path) -> None:
    store.open_run(a_run())
    store.save_initial_state("r1", b"state")
    store._blobs.put(b"orphan")
    leftover = tmp_path / "store" / "blobs" / "new" / "half"
    leftover.write_bytes(b"ha")
    assert store.sweep() == 1
    assert blobs_of(store) == {sha(b"state")}
    assert not leftover.exists()


def test_blob_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    for name in ("../../etc/passwd", "", "a" * 63, "A" * 64):
        with pytest.raises(StoreError, match="not the name of a blob"):
            blobs.get(name)


def test_migrations_lead_to_the_declared_tables(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert (
            connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == schema.REVISION
        )
        if connection.dialect.name == "postgresql":
            return
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(sa.text("PRAGMA foreign_keys")).scalar() == 1


def test_a_store_from_before_plugs_keeps_what_it_has(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.open_run(a_run())
    with sqlite3.connect(tmp_path / schema.FILE) as connection:
        for table in (
            "seal_counters",
            "arrivals",
            "parts",
            "transfers",
            "rollout_members",
            "rollouts",
            "orders",
            "walls",
            "plug_readings",
            "plugs",
            "invites",
            "devices",
            "api_tokens",
            "audit",
        ):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
    with pytest.raises(StoreError, match="revision 0001, this Hedgerow reads 0005: a coordinator of this"):
        Store.open_to_read(tmp_path)
    with Store.open(tmp_path) as store:
        assert store.has_run("r1")
        assert store.walls("r1") == []
        test_migrations_lead_to_the_declared_tables(store)


def test_plugs_keep_each_reading_once_and_their_finest_steps(store: Store) -> None:
    row = store.plug("pi", "shelly:x", 100.0)
    assert store.plug("pi", "shelly:x", 200.0) == row
    other = store.plug("pi", "shelly:y", 200.0)
    readings = [PlugReading(float(at), 5.0, None) for at in range(10)]
    store.add_plug_readings(row.id, readings, step_w=1.0)
    store.add_plug_readings(row.id, [PlugReading(9.0, 6.0, 1.5)], step_w=0.1, step_j=3.6)
    store.add_plug_readings(row.id, [], step_w=1.0, step_j=None)
    store.add_plug_readings(other.id, readings[:2])
    kept = store.plug("pi", "shelly:x", 0.0)
    assert (kept.since, kept.step_j, kept.step_w) == (100.0, 3.6, 0.1)
    assert store.plug_readings(row.id, 8.0, 20.0, 100) == [readings[8], PlugReading(9.0, 6.0, 1.5)]
    assert len(store.plug_readings(row.id, 0.0, 20.0, 3)) == 3
    assert store.forget_plug_readings(2.0, 4) == 2 + 4 + 2
    assert [r.at for r in store.plug_readings(row.id, 0.0, 20.0, 100)] == [6.0, 7.0, 8.0, 9.0]


def test_an_update_is_joined_once(store: Store) -> None:
    store.open_run(a_run())
    store.open_round("r1", 1, ["a", "b"], 0)
    for agent in ("a", "b"):
        store.add_update("r1", 1, agent, agent.encode(), {"examples": 1})
    assert [found[:3] for found in store.unjoined(["a"], 0.0)] == [("r1", 1, "a")]
    assert store.unjoined(["a"], 4e9) == []
    store.add_wall("r1", 1, "a", "first")
    store.add_wall("r1", 1, "a", "second")
    assert store.unjoined(["a", "c"], 0.0) == []
    assert store.walls("r1") == [(1, "a", "first")]
    with pytest.raises(StoreError):
        store.add_wall("r1", 9, "a", "of no update")


def test_migrating_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Store.open(tmp_path):
        assert caplog.records == []


def test_a_database_of_a_newer_hedgerow_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with sqlite3.connect(tmp_path / schema.FILE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreError, match="revision 9999"):
        Store.open(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / schema.FILE).write_bytes(b"certainly no database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store.open(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be made"):
        Store.open(tmp_path / "file")


def test_many_threads_write_and_read_at_once(store: Store) -> None:
    store.open_run(a_run())
    store.open_round("r1", 1, [], 0)

    def one(i: int) -> bool:
        fresh = store.add_update("r1", 1, f"agent-{i % 20}", b"%d" % (i % 20), {"examples": i})
        assert store.update_frame("r1", 1, f"agent-{i % 20}") == b"%d" % (i % 20)
        return fresh

    with ThreadPoolExecutor(24) as pool:
        assert sum(pool.map(one, range(60))) == 20
    assert len(store.updates("r1", 1)) == 20


def test_two_stores_on_one_folder_do_not_sweep_each_others_blobs(
    tmp_path: Path, place: StoreSettings
) -> None:
    with Store.open(tmp_path, place=place) as writer:
        writer.open_run(a_run())
        writer.open_round("r1", 1, [], 0)
        with ThreadPoolExecutor(1) as pool, Store.open(tmp_path, place=place) as reader:
            sweeps = pool.submit(lambda: [reader.sweep() for _ in range(30)])
            for i in range(30):
                writer.add_update("r1", 1, f"a{i}", os.urandom(64), {})
            assert sum(sweeps.result()) == 0
        for i in range(30):
            assert len(writer.update_frame("r1", 1, f"a{i}")) == 64


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=10,
        ),
    )
)
def test_json_survives_and_never_holds_what_is_not_finite(value: dict[str, object]) -> None:
    text = dumps(value)
    assert dumps(loads(text)) == text


@given(st.text())
def test_broken_json_is_a_store_error(text: str) -> None:
    with suppress(StoreError):
        assert isinstance(loads(text), dict)


ROOT = Path(__file__).parents[2]

WRITER = """
import sys
from pathlib import Path
from coordinator.store.records import RunRecord
from coordinator.store.sql import Store
with Store.open(Path(sys.argv[1])) as store:
    store.open_run(RunRecord("r", "fedavg", "{}", "{}", 10**6, 0))
    found = store.latest_state("r")
    if found is None:
        store.save_initial_state("r", b"state 0")
    round = (found or (0, b""))[0]
    while True:
        round += 1
        store.open_round("r", round, ["a", "b", "c"], 0.0)
        for agent in "abc":
            store.add_update("r", round, agent, f"{round} {agent} ".encode() * 5000, {"round": round})
            print("update", round, agent, flush=True)
        store.close_round("r", round, f"state {round}".encode(), {"round": round})
        print("closed", round, flush=True)
        store.drop_frames("r", round - 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_at_random_instants_it_loses_nothing_it_said_it_had(tmp_path: Path) -> None:
    rng = random.Random(20260301)
    acknowledged: list[list[str]] = []
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
        )
        assert process.stdout is not None
        with process.stdout:
            acknowledged.append(process.stdout.readline().split())
            time.sleep(rng.uniform(0.0, 0.15))
            process.kill()
            acknowledged += [line.split() for line in process.stdout if line.endswith("\n")]
        assert process.wait() == -signal.SIGKILL
        _is_consistent(tmp_path, [words for words in acknowledged if words])
    assert sum(words[0] == "closed" for words in acknowledged if words) > 2


def _is_consistent(folder: Path, acknowledged: list[list[str]]) -> None:
    with Store.open(folder) as store:
        with store._engine.connect() as connection:
            assert connection.execute(sa.text("PRAGMA integrity_check")).scalar() == "ok"
            assert connection.execute(sa.text("PRAGMA foreign_key_check")).all() == []
        closed = [record.round for record in store.rounds("r") if record.state == "closed"]
        last = closed[-1] if closed else 0
        assert closed == list(range(1, last + 1))
        assert store.latest_state("r") == (last, f"state {last}".encode())
        assert {int(words[1]) for words in acknowledged if words[0] == "closed"} <= set(closed)
        kept = {(update.round, update.agent): update for update in store.history("r")}
        assert {(int(words[1]), words[2]) for words in acknowledged if words[0] == "update"} <= set(kept)
        for (round, agent), update in kept.items():
            if update.frame_sha256 is not None:
                assert store.update_frame("r", round, agent) == f"{round} {agent} ".encode() * 5000
        named = {update.frame_sha256 for update in kept.values()} - {None}
        assert (
            len(blobs_of(store) - named) <= 2
        )  # the two last states, and no orphan after the sweep at opening
