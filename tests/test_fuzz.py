"""Random networks, random plans, an oracle of its own: no wrong answer, no crash, hardly a refusal."""

from collections import Counter

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.support.random_builder import OPERATORS
from tests.support.random_cases import draw, examine, operators_in, operators_of, random_plan
from tests.support.random_networks import STARTS, Program, build, describe

CASES = 75  # for each of four parts; torch.export takes most of the time
PARTS = (("image",), ("vector", "image+vector"), ("sequence", "tokens"), ("sequence+sequence", "image"))
_NUMBERS = st.integers(0, 63)


@st.composite
def programs(draw_one: st.DrawFn, starts: tuple[str, ...]) -> Program:
    """A network as data: mostly operators on the kind of value it starts with."""
    start = draw_one(st.sampled_from(starts))
    names = st.sampled_from(operators_of(start)) | st.sampled_from(sorted(OPERATORS))
    steps = st.lists(st.tuples(names, _NUMBERS, _NUMBERS, _NUMBERS), min_size=4, max_size=14)
    return Program(start, tuple(draw_one(steps)), draw_one(st.integers(0, 2**16)))


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_random_networks_are_cut_exactly(part: int) -> None:
    verdicts: Counter[str] = Counter()

    @settings(max_examples=CASES, derandomize=True, database=None, deadline=None)
    @given(programs(PARTS[part]))
    def run(program: Program) -> None:
        outcome = examine(program)
        verdicts[outcome.verdict] += 1
        verdicts["cut"] += outcome.verdict == "exact" and outcome.removed > 0 and outcome.change > 1e-6
        if outcome.verdict not in ("exact", "refused"):
            note(describe(build(program)[2]))
        assert outcome.verdict in ("exact", "refused"), f"{outcome}"

    run()
    assert verdicts["exact"] + verdicts["refused"] >= CASES
    assert verdicts["refused"] <= 0.02 * CASES
    assert verdicts["cut"] >= 0.6 * CASES, f"too few networks are cut to prove anything: {verdicts}"


def test_programs_are_data() -> None:
    program = draw(7)
    again = eval(repr(program), {"Program": Program})  # what a failure prints can be pasted
    assert again == program
    first, second = build(program)[0].state_dict(), build(again)[0].state_dict()
    assert first.keys() == second.keys()
    assert all(value.equal(second[name]) for name, value in first.items())


def test_every_operator_and_start_is_drawn() -> None:
    found, starts = set[str](), set[str]()
    for seed in range(400):
        program = draw(seed)
        starts.add(program.start)
        found.update(build(program)[2].names)
    assert starts == set(STARTS)
    assert set(OPERATORS) <= found


def test_a_plan_keeps_random_units_of_random_groups() -> None:
    import metaprune as mp

    net, inputs, _ = build(Program("image", (("image.conv", 0, 3, 1), ("image.norm", 0, 0, 0)), 5))
    graph = mp.trace(net, inputs)
    plans = [random_plan(graph, seed) for seed in range(20)]
    assert len({plan.to_json() for plan in plans}) > 10
    assert operators_in(graph) >= 3
    for plan in plans:
        assert all(len(units) < graph.group(name).size for name, units in plan.keep.items())
