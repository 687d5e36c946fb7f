"""The evaluator counts, remembers and refuses; the ledger survives kills and names damage."""

import json
import math
import os
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from numpy.typing import NDArray

from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.search.evaluate import Evaluator, Fidelity
from metaprune.search.ledger import Ledger, Result
from tests.support.toy import Toy

TOY = Toy(groups=3)


class Counting:
    """The toy's measure, which notes what it is asked; given values stand in for some configurations'."""

    def __init__(self, **instead: tuple[float, ...] | None) -> None:
        self.asked: list[tuple[tuple[int, ...], Fidelity]] = []
        self.instead = instead

    def __call__(self, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        self.asked.append((tuple(config.tolist()), fidelity))
        name = "c" + "".join(map(str, config.tolist()))
        if name in self.instead:
            return Result(self.instead[name], 0.5, "broken" if self.instead[name] is None else "")
        return TOY.measure(config, fidelity)


def _evaluator(measure: Counting, evaluations: int = 10, ledger: Ledger | None = None) -> Evaluator:
    return Evaluator(TOY.space, ("error", "macs"), measure, evaluations, ledger=ledger, forwards=2.0)


def test_each_configuration_is_evaluated_and_counted_once() -> None:
    measure = Counting()
    evaluate = _evaluator(measure)
    configs = [[0, 1, 2], [7, 7, 7], [0, 1, 2]]
    values = evaluate(configs)
    assert values.tolist() == [list(TOY.measure(np.array(c), Fidelity()).values or ()) for c in configs]
    assert evaluate([[7, 7, 7]]).tolist() == [values[1].tolist()]
    assert [config for config, _ in measure.asked] == [(0, 1, 2), (7, 7, 7)]
    assert (evaluate.evaluations, evaluate.left, evaluate.forwards) == (2, 8, 4.0)
    assert evaluate.known([0, 1, 2])
    assert not evaluate.known([0, 1, 3])
    assert evaluate([]).shape == (0, 2)


def test_fidelities_are_told_apart_and_fronts_hold_the_highest() -> None:
    measure, low = Counting(), Fidelity(8, "recalibrate")
    evaluate = _evaluator(measure)
    evaluate([[0, 0, 0]], low)
    assert evaluate.known([0, 0, 0], low)
    assert not evaluate.known([0, 0, 0])
    assert len(evaluate.front()) == 0
    evaluate([[0, 0, 0]])
    assert [level for _, level in measure.asked] == [low, Fidelity()]
    (point,) = evaluate.front().points
    assert point.info == {"evaluation": 2, "fidelity": "least_squares on 500", "forwards": 1.0}
    assert point.plan.provenance["evaluation"] == 2
    assert evaluate.front().evaluations == 2


def test_no_more_than_the_limit_is_evaluated() -> None:
    measure = Counting()
    evaluate = _evaluator(measure, 2)
    with pytest.raises(OptionError, match="evaluations: 3 more are asked for, 2 are left"):
        evaluate([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    assert measure.asked == []
    with pytest.raises(OptionError, match="evaluations: at least 1"):
        _evaluator(measure, 0)


@pytest.mark.parametrize("broken", [None, (math.nan, 0.0), (0.0, math.inf), (-math.inf, 0.0)])
def test_what_is_not_finite_never_enters_a_ranking(broken: tuple[float, ...] | None, tmp_path: Path) -> None:
    for _ in range(2):  # measured, and read from the ledger
        with Ledger(tmp_path / "ledger", {}) as ledger:
            evaluate = _evaluator(Counting(c000=broken), ledger=ledger)
            values = evaluate([[0, 0, 0], [3, 3, 3]])
            assert values[0].tolist() == [math.inf, math.inf]
            assert np.isfinite(values[1]).all()
            assert [point.config for point in evaluate.front().points] == [(3, 3, 3)]
            assert evaluate.forwards == 2.0 + 0.5 + 1.0


def test_a_ledger_gives_back_every_bit_and_spares_the_work(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    configs = TOY.space.sample(np.random.default_rng(0), 9)
    with Ledger(path, {"seed": 1}) as ledger:
        first = _evaluator(Counting(), ledger=ledger)
        expected = first(configs)
    again, measure = path.read_bytes(), Counting()
    with Ledger(path, {"seed": 1}) as ledger:
        second = _evaluator(measure, ledger=ledger)
        assert second(configs).tobytes() == expected.tobytes()
        assert second.front() == first.front()
    assert measure.asked == []
    assert path.read_bytes() == again


def test_a_result_is_on_the_disk_before_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    seen: list[tuple[int, int]] = []
    synced: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    class Looking(Counting):
        def __call__(self, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
            seen.append((path.read_bytes().count(b"\n"), len(synced)))
            return super().__call__(config, fidelity)

    with Ledger(path, {}) as ledger:
        _evaluator(Looking(), ledger=ledger)([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_ledger_cut_at_any_byte_holds_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, {"seed": 1}) as ledger:
        _evaluator(Counting(), ledger=ledger)([[0, 0, 0], [1, 1, 1]])
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with Ledger(path, {"seed": 1}) as ledger:
            assert len(ledger.results) == max(0, content[:cut].count(b"\n") - 1)
        head = content[: content.find(b"\n") + 1]
        assert path.read_bytes() == (content[: content[:cut].rfind(b"\n") + 1] or head)


def _line(text: str) -> bytes:
    return b"%08x %s\n" % (crc32(text.encode()), text.encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "line 2 is damaged"),
        (_line("[1, 2]"), "line 2 is damaged"),
        (_line('{"key": "a"}'), "line 2 is no evaluation"),
        (_line('{"key": "a", "values": ["x"], "forwards": 1, "note": ""}'), "line 2 is no evaluation"),
        (_line('{"key": "a", "values": [NaN], "forwards": 1, "note": ""}'), "line 2 holds a value that is not finite"),
    ],
)
def test_a_damaged_ledger_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {}).__exit__(None, None, None)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(LoadError, match=f"{path}: {message}"):
        Ledger(path, {})


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, {}) as ledger:
        _evaluator(Counting(), ledger=ledger)([[0, 0, 0], [1, 1, 1]])
    content = bytearray(path.read_bytes())
    content[content.index(b"values") + 12] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match="line 2 is damaged"):
        Ledger(path, {})


def test_a_ledger_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"network": "a", "seed": 0}).__exit__(None, None, None)
    with pytest.raises(OptionError, match=f"out: {tmp_path} holds another search, with other network"):
        Ledger(path, {"network": "b", "seed": 1})
    with pytest.raises(OptionError, match="with other seed"):
        Ledger(path, {"network": "a", "seed": 1})
    with pytest.raises(OptionError, match="with other seed"):
        Ledger(path, {"network": "a"})
    assert json.loads(path.read_bytes().partition(b" ")[2]) == {"schema": 1, "network": "a", "seed": 0}


def test_a_ledger_in_use_or_out_of_reach_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, {}), pytest.raises(OptionError, match="is in use by another search"):
        Ledger(path, {})
    with Ledger(path, {}):
        pass
    with pytest.raises(MetapruneError, match="can not be opened"):
        Ledger(path / "below", {})


@pytest.mark.parametrize(
    ("samples", "repair", "message"),
    [
        (0, "none", "samples: at least 1"),
        (1.5, "none", "samples: at least 1"),
        (5, "pray", "repair: 'pray' is none of"),
    ],
)
def test_a_fidelity_that_means_nothing_is_refused(samples: int, repair: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Fidelity(samples, repair)
