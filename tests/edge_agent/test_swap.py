"""Which model answers: proofs, the canary set, trials, pins, going back, and all of it after a restart."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_agent.samples import LocalData, Part
from edge_agent.serving import canary, owner, record
from edge_agent.serving.admission import Handle, load
from edge_agent.serving.predictor import Predictor, Rules
from edge_agent.serving.trial import LEAST_REQUESTS, TRIAL_REQUESTS, TRIAL_S, Band, Trial, Window, p95
from export.folder import CURRENT, FALLBACK, GOOD, PINNED, PREVIOUS, SERVING, linked
from foundation.errors import DataError, ExportError, ProofFailed
from foundation.normalisation import Normalisation
from foundation.parameters import Array
from hedgerow.cli import app
from tests.artifacts import LABELS, Artifact, Family, blind_above, family, samples, slower

X = samples(3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("base"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "vault" / "artifacts"


def answers(predictor: Predictor, models: Family, round: int) -> None:
    found = predictor.predict(X)
    assert found.manifest.round == round
    np.testing.assert_allclose(found.logits, models.expected(X, round), rtol=0, atol=1e-4)


def links(root: Path) -> dict[str, str | None]:
    return {name: linked(root, name) for name in (CURRENT, PREVIOUS, SERVING, GOOD, FALLBACK, PINNED)}


def ask(predictor: Predictor, times: int, x: Array = X[:1]) -> None:
    for _ in range(times):
        predictor.predict(x)


def keep_canary(root: Path, y: Array, x: Array) -> None:
    path = root.parent / canary.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canary.to_bytes(canary.Canary(x, y, LABELS)))


# --- refused by name ----------------------------------------------------------------------------


def opset_99(model: object) -> None:
    model.opset_import[0].version = 99  # type: ignore[attr-defined]


def corrupt(folder: Path) -> None:
    path = folder / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 1000)


def without_probe(folder: Path) -> None:
    (folder / "probe.npz").unlink()


@pytest.mark.parametrize(
    ("bad", "damage", "reason"),
    [
        (lambda m: m.variant(2), corrupt, "is not the model of its manifest"),
        (lambda m: m.variant(2), truncated, "of 1000 bytes"),
        (lambda m: m.variant(2), without_probe, "probe.npz cannot be read"),
        (lambda m: m.variant(2, agent="d7"), None, "was made for 'd7', and this is 'd0'"),
        (lambda m: m.variant(2, change=opset_99), None, "opset 99 is not opened here"),
    ],
    ids=["corrupt", "truncated", "without probe", "wrong device", "wrong opset"],
)
def test_what_cannot_serve_is_refused_by_name_and_the_old_version_answers(
    root: Path,
    models: Family,
    bad: Callable[[Family], Artifact],
    damage: Callable[[Path], None] | None,
    reason: str,
) -> None:
    models.variant(1).publish(root)
    (root.parent / "identity.json").write_text('{"agent": "d0"}')
    predictor = Predictor(root)
    folder = bad(models).publish(root)
    if damage is not None:
        damage(folder)
    found = predictor.reload()
    assert (found.changed, reason in str(found.refusal)) == (False, True), found
    answers(predictor, models, 1)
    (verdict,) = record.read(root).verdicts
    assert (verdict.kind, verdict.sha256) == ("refused", folder.name)
    assert reason in verdict.reason
    assert predictor.reload() == found, "it is not tried again"
    answers(Predictor(root), models, 1)
    assert len(record.read(root).verdicts) == 1, "what was said is not said again after a restart"
    models.variant(3).publish(root)
    assert predictor.reload().changed
    answers(predictor, models, 3)


def test_a_damaged_artifact_that_is_written_again_is_taken(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor, second = Predictor(root), models.variant(2)
    corrupt(second.publish(root))
    assert predictor.reload().refusal is not None
    second.publish(root)
    assert predictor.reload().changed
    answers(predictor, models, 2)


def test_two_bad_ones_in_a_row_do_not_push_the_good_one_off_the_disk(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    for round in (2, 3, 4):
        corrupt(models.variant(round).publish(root))
        predictor.reload()
    answers(Predictor(root), models, 1)


def test_a_vault_that_does_not_say_whose_it_is_serves_nothing(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    (root.parent / "identity.json").write_text("{")
    with pytest.raises(ExportError, match="does not say whose vault"):
        Predictor(root)
    assert Predictor(root, Rules(agent="d0")).manifest.agent == "d0"


# --- the canary set -----------------------------------------------------------------------------


def toward(models: Family, round: int, count: int) -> tuple[Array, Array]:
    """Return samples and, as their labels, the answers of a round's model."""
    x = samples(count, seed=9)
    return x, models.expected(x, round).argmax(-1)


def test_a_worse_model_is_refused_with_both_accuracies_and_barred(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    x, y = toward(models, 1, 40)
    keep_canary(root, y, x)
    predictor, worse = Predictor(root), models.variant(2)
    share = float((models.expected(x, 2).argmax(-1) == y).mean())
    assert share < 0.8
    worse.publish(root)
    found = predictor.reload()
    assert f"{share:.1%} right, the model that serves 100.0%" in str(found.refusal)
    answers(predictor, models, 1)
    assert record.read(root).barred == (worse.sha256,)
    assert Predictor(root).reload().refusal is None, "after a restart it is not even tried"


def test_a_better_model_is_taken_and_so_is_one_that_chance_explains(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    x, y = toward(models, 2, 40)
    keep_canary(root, y, x)
    predictor = Predictor(root)
    models.variant(2).publish(root)
    assert predictor.reload().changed
    agree = models.expected(x, 3).argmax(-1) == y
    rows = [*np.flatnonzero(agree)[:20], *np.flatnonzero(~agree)[:4]]
    keep_canary(root, y[rows], x[rows])  # 4 lost of 24, none won: p = 1/16
    models.variant(3).publish(root)
    assert predictor.reload().changed


def test_the_owners_allowance_counts_instead_of_chance(root: Path, models: Family) -> None:
    models.variant(2).publish(root)
    x, y = toward(models, 2, 40)
    agree = models.expected(x, 3).argmax(-1) == y
    rows = [*np.flatnonzero(agree)[:9], *np.flatnonzero(~agree)[:1]]
    keep_canary(root, y[rows], x[rows])
    strict, lenient = Predictor(root, Rules(canary_drop=9.0)), Predictor(root, Rules(canary_drop=10.0))
    models.variant(3).publish(root)
    assert "90.0% right, the model that serves 100.0%" in str(strict.reload().refusal)
    (root / record.FILE).unlink()
    assert lenient.reload().changed


def test_a_canary_set_of_other_labels_or_shapes_compares_nothing(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    x, y = toward(models, 1, 40)
    other = canary.Canary(x, y, tuple("abcdx"))
    (root.parent / canary.FILE).write_bytes(canary.to_bytes(other))
    models.variant(2).publish(root)
    assert predictor.reload().changed


@pytest.mark.parametrize(
    ("lost", "won", "n", "drop", "refused"),
    [
        (5, 0, 64, None, True),  # p = 1/32
        (4, 0, 64, None, False),  # p = 1/16
        (10, 4, 64, None, False),  # p = 0.09
        (11, 3, 64, None, True),  # p = 0.03
        (3, 3, 64, 0.0, False),
        (1, 0, 64, 0.0, True),
        (1, 0, 64, 2.0, False),
    ],
)
def test_the_gate_is_the_sign_test_or_the_allowance(
    lost: int, won: int, n: int, drop: float | None, refused: bool
) -> None:
    new, old = np.ones(n), np.ones(n)
    new[:lost] = 0
    old[lost : lost + won] = 0
    assert (canary.worse(new, old, drop) is not None) is refused


@given(st.integers(1, 64), st.data())
def test_the_tail_is_that_of_a_fair_coin(pairs: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, pairs))
    assert canary.tail(pairs, 0) == 1
    assert canary.tail(pairs, lost) + canary.tail(pairs, pairs - lost + 1) == pytest.approx(1)


def test_text_is_compared_by_sample() -> None:
    y = np.array([[1, 2], [0, 1]])
    logits = np.eye(3)[np.array([[1, 2], [1, 1]])]
    np.testing.assert_array_equal(canary.hits(logits, y), [1.0, 0.5])


def data_of(validation: int, side: int = 2) -> LocalData:
    rng = np.random.default_rng(0)

    def part(n: int) -> Part:
        return Part(rng.integers(0, 255, (n, 1, side, side), np.uint8), rng.integers(0, 2, n))

    return LocalData(
        "image", (1, side, side), ("a", "b"), part(9), part(validation), part(5), Normalisation()
    )


def test_the_set_is_of_the_validation_part_bounded_and_always_the_same() -> None:
    data = data_of(200)
    found, again = canary.choose(data), canary.choose(data)
    assert found is not None
    assert again is not None
    assert len(found.y) == 64
    np.testing.assert_array_equal(found.x, again.x)
    rows = {(x.tobytes(), int(y)) for x, y in zip(data.validation.x, data.validation.y, strict=True)}
    assert {(x.tobytes(), int(y)) for x, y in zip(found.x, found.y, strict=True)} <= rows
    assert canary.choose(data_of(0)) is None
    assert canary.choose(data, 0) is None
    few = canary.choose(data_of(20, side=1024))
    assert few is not None
    assert few.x.nbytes <= canary.LARGEST_BYTES


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 700), st.integers(0, 255))
def test_any_bytes_are_a_canary_set_or_none(noise: bytes, at: int, value: int) -> None:
    found = canary.choose(data_of(6))
    assert found is not None
    content = bytearray(canary.to_bytes(found))
    content[at % len(content)] = value
    for candidate in (noise, bytes(content), bytes(content)[:at]):
        read = canary.parse(candidate)
        assert read is None or len(read.x) == len(read.y) > 0


# --- on trial -----------------------------------------------------------------------------------


def test_a_model_that_passes_its_trial_is_the_last_good_one(root: Path, models: Family) -> None:
    first, second = models.variant(1), models.variant(2)
    first.publish(root)
    predictor = Predictor(root)
    second.publish(root)
    predictor.reload()
    assert predictor.on_trial
    assert (links(root)[SERVING], links(root)[GOOD]) == (second.sha256, first.sha256)
    ask(predictor, TRIAL_REQUESTS - 1)
    predictor.reload()
    assert predictor.on_trial
    ask(predictor, 1)
    predictor.reload()
    assert not predictor.on_trial
    found = links(root)
    assert (found[SERVING], found[GOOD], found[FALLBACK]) == (second.sha256, second.sha256, first.sha256)


def test_what_the_new_model_cannot_answer_the_old_one_does_and_then_takes_over(
    root: Path, models: Family
) -> None:
    first, blind = models.variant(1), models.variant(2, change=blind_above(1e6))
    first.publish(root)
    predictor = Predictor(root)
    blind.publish(root)
    assert predictor.reload().changed, "neither probe nor canary set has such values"
    ask(predictor, LEAST_REQUESTS - 2)
    large = X[:1] + 2e6
    for _ in range(2):
        assert predictor.predict(large).manifest.round == 1, (
            "no request fails, and the answer says whose it is"
        )
    found = predictor.reload()
    assert "could not answer 2 of 100 requests that the model before it could; 1.0% is allowed" in str(
        found.rolled_back
    )
    answers(predictor, models, 1)
    assert not predictor.on_trial
    said = record.read(root)
    assert said.barred == (blind.sha256,)
    assert [v.kind for v in said.verdicts] == ["rolled_back"]
    assert links(root)[SERVING] == first.sha256
    assert not predictor.reload().changed, "the link still names it, and it is not taken again"
    answers(Predictor(root), models, 1)


def test_what_neither_can_answer_is_the_inputs_fault(root: Path, models: Family) -> None:
    models.variant(1, change=blind_above(1e6)).publish(root)
    predictor = Predictor(root)
    models.variant(2, change=blind_above(1e6)).publish(root)
    predictor.reload()
    for _ in range(LEAST_REQUESTS):
        with pytest.raises(DataError, match="no finite answer"):
            predictor.predict(X[:1] + 2e6)
    ask(predictor, LEAST_REQUESTS)
    assert predictor.reload().rolled_back is None
    assert predictor.manifest.round == 2


def test_a_slow_model_is_rolled_back(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    ask(predictor, LEAST_REQUESTS)
    models.variant(2, change=slower(512, 4)).publish(root)
    predictor.reload()
    assert predictor.manifest.round == 2
    ask(predictor, LEAST_REQUESTS)
    found = predictor.reload()
    assert "side by side it takes" in str(found.rolled_back)
    answers(predictor, models, 1)


def test_without_rollback_a_model_that_was_taken_stays(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root, Rules(band=None))
    models.variant(2, change=blind_above(1e6)).publish(root)
    predictor.reload()
    assert not predictor.on_trial
    with pytest.raises(DataError):
        predictor.predict(X + 2e6)


def window_of(ms: float, requests: int = LEAST_REQUESTS) -> Window:
    window = Window()
    for _ in range(requests):
        window.answered(ms / 1e3)
    return window


def test_a_trial_needs_enough_requests_and_a_busy_neighbour_is_no_fault_of_the_model() -> None:
    asked: list[float] = []

    def same() -> float:
        asked.append(1.0)
        return 1.0

    assert Trial(window_of(50, LEAST_REQUESTS - 1), 1.0, Band(), same).judge() is None
    assert Trial(window_of(50), None, Band(), same).judge() is None, "of the one before nobody knows"
    assert Trial(window_of(1.5), 0.5, Band(), same).judge() is None, "a millisecond is the system's"
    assert not asked
    window = window_of(50)
    trial = Trial(window, 1.0, Band(), same)
    assert trial.judge() is None
    assert asked == [1.0]
    assert window.p95_ms() is None, "it is looked at again after 100 more"
    found = Trial(window_of(50), 1.0, Band(), lambda: 3.0).judge()
    assert isinstance(found, tuple)
    assert "p95 is 50.00 ms, that of the model before it was 1.00 ms" in found[1]


def test_a_trial_ends_with_its_requests_or_its_hour() -> None:
    now = [0.0]
    trial = Trial(window_of(1, 5), 1.0, Band(), lambda: 1.0, clock=lambda: now[0])
    assert trial.judge() is None
    now[0] = TRIAL_S
    assert trial.judge() == "passed"
    assert Trial(window_of(1, TRIAL_REQUESTS), 1.0, Band(), lambda: 1.0).judge() == "passed"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_the_p95_is_the_smallest_that_19_in_20_do_not_exceed(values: list[float]) -> None:
    found, ordered = p95(sorted(values)), sorted(values)
    assert sum(v <= found for v in values) * 100 >= 95 * len(values)
    below = [v for v in ordered if v < found]
    assert len(below) * 100 < 95 * len(values)


# --- the owner ----------------------------------------------------------------------------------


def hedgerow(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["model", *words])
    return done.exit_code, done.output


def test_a_pinned_model_stays_whatever_comes_also_after_a_restart(root: Path, models: Family) -> None:
    first = models.variant(1)
    first.publish(root)
    predictor = Predictor(root)
    assert hedgerow("pin", str(root.parent))[0] == 0
    for round in (2, 3, 4):
        models.variant(round).publish(root)
        assert not predictor.reload().changed
    answers(predictor, models, 1)
    answers(Predictor(root), models, 1)
    code, said = hedgerow("rollback", str(root))
    assert (code, "unpin it first" in said) == (1, True)
    assert json.loads(hedgerow("unpin", str(root), "--json")[1]) == {"was_pinned": True}
    assert predictor.reload().changed
    answers(predictor, models, 4)
    assert predictor.on_trial
    assert hedgerow("pin", str(root), "1")[0] == 0
    predictor.reload()
    answers(predictor, models, 1)
    assert not predictor.on_trial
    code, said = hedgerow("pin", str(root), "77")
    assert (code, "no artifact is '77'; there are rounds 1 (" in said) == (1, True)


def test_a_pinned_model_that_does_not_prove_itself_is_refused_and_the_others_serve(
    root: Path, models: Family
) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    second = models.variant(2).publish(root)
    assert hedgerow("pin", str(root), "2")[0] == 0
    corrupt(second)
    assert "is not the model" in str(predictor.reload().refusal)
    answers(predictor, models, 1)
    answers(Predictor(root), models, 1)


def test_going_back_by_hand_before_and_after_the_trial(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    code, said = hedgerow("rollback", str(root))
    assert (code, "there is no earlier model" in said) == (1, True)
    models.variant(2).publish(root)
    predictor.reload()
    code, said = hedgerow("rollback", str(root), "--reason", "smells", "--json")
    assert (code, json.loads(said)["round"]) == (0, 1)
    found = predictor.reload()
    assert (found.changed, found.rolled_back) == (True, "smells")
    answers(predictor, models, 1)
    models.variant(3).publish(root)
    predictor.reload()
    ask(predictor, TRIAL_REQUESTS)
    predictor.reload()
    assert hedgerow("rollback", str(root))[0] == 0
    answers(Predictor(root), models, 1)
    assert predictor.reload().rolled_back == "rolled back by hand"
    answers(predictor, models, 1)
    assert not predictor.reload().changed
    assert [v.round for v in record.read(root).verdicts] == [2, 3]


def test_with_nothing_whole_to_go_back_to_a_barred_model_serves_on(root: Path, models: Family) -> None:
    first = models.variant(1).publish(root)
    predictor = Predictor(root)
    models.variant(2).publish(root)
    predictor.reload()
    assert hedgerow("rollback", str(root))[0] == 0
    corrupt(first)
    for _ in range(2):
        assert not predictor.reload().changed
    answers(predictor, models, 2)
    answers(Predictor(root), models, 2)
    models.variant(3).publish(root)
    assert predictor.reload().changed
    answers(predictor, models, 3)


def test_show_says_which_is_which_and_why(
    root: Path, models: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    models.variant(1).publish(root)
    predictor = Predictor(root)
    models.variant(2).publish(root)
    predictor.reload()
    hedgerow("rollback", str(root), "--reason", "smells")
    code, said = hedgerow("show", str(root))
    assert code == 0
    assert "the model of round 2 was rolled back: smells" in said
    told = json.loads(hedgerow("show", str(root), "--json")[1])
    assert [(m["manifest"]["round"], m["barred"]) for m in told["models"]] == [(1, False), (2, True)]
    assert told["models"][0]["links"] == [PREVIOUS, GOOD]
    code, said = hedgerow("show", str(root / "nothing"))
    assert (code, "name a vault" in said) == (1, True)


# --- one artifact, a folder that cannot be written, records of any bytes ------------------------------


def test_one_artifacts_own_folder_is_served_without_a_trace(root: Path, models: Family) -> None:
    folder = models.variant(1).publish(root)
    before = sorted(p.name for p in folder.iterdir())
    predictor = Predictor(folder)
    predictor.reload()
    answers(predictor, models, 1)
    assert sorted(p.name for p in folder.iterdir()) == before
    assert not (root / record.FILE).exists()


def test_a_disk_that_refuses_costs_the_memory_of_it_and_no_answer(
    root: Path, models: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    models.variant(2).publish(root)

    def full(*_: object, **__: object) -> None:
        raise ExportError("no space left")

    monkeypatch.setattr(record, "note", full)
    with caplog.at_level(logging.WARNING):
        assert predictor.reload().changed
        answers(predictor, models, 2)
    assert "will be forgotten at the next start: no space left" in caplog.text


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
    ).map(lambda value: json.dumps({"barred": value, "verdicts": value}).encode())
)
def test_any_bytes_are_a_record_or_an_empty_one(content: bytes) -> None:
    found = record.parse(content)
    assert record.parse(found.model_dump_json().encode()) == found


def test_a_record_is_bounded(root: Path, models: Family) -> None:
    folder = models.variant(1).publish(root)
    manifest = load(folder).manifest
    found = record.Record()
    for i in range(100):
        verdict = record.verdict_on(folder, "refused", f"reason {i}", manifest)
        found = found.with_verdict(verdict.model_copy(update={"sha256": f"{i:064d}"}), bar=True)
    assert (len(found.verdicts), len(found.barred)) == (record.KEPT_VERDICTS, record.KEPT_BARRED)
    assert record.parse(found.model_dump_json().encode()) == found


def test_a_request_is_answered_by_the_model_it_was_read_for(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    held: Handle = predictor.handle
    models.variant(2).publish(root)
    predictor.reload()
    assert predictor.predict(X, held).manifest.round == 1
    answers(predictor, models, 2)


def test_models_that_are_gone_are_gone_from_memory(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    predictor = Predictor(root)
    for round in range(2, 6):
        models.variant(round).publish(root)
        assert predictor.reload().changed
    gc.collect()
    held = [one for one in gc.get_objects() if type(one) is Handle and one.folder.parent == root]
    assert sorted(one.version for one in held) == ["4", "5"], "the one that serves and the one before"


def test_admission_says_what_failed(root: Path, models: Family) -> None:
    folder = models.variant(1, change=opset_99).publish(root)
    with pytest.raises(ProofFailed, match="opset 99"):
        load(folder)


def test_owner_finds_the_folder_in_a_vault(root: Path, models: Family) -> None:
    models.variant(1).publish(root)
    assert owner.folder_of(root.parent) == owner.folder_of(root) == root
