"""One fuzz case: a random network is pruned by a random plan, and judged by the independent oracle."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

import torch

import metaprune as mp
from metaprune.graphs.errors import MetapruneError
from tests.support import random_oracle
from tests.support.random_builder import OPERATORS
from tests.support.random_networks import STARTS, Program, Step, build

TOLERANCE = 1e-8
_KINDS = {
    "image": ("image",),
    "vector": ("vector",),
    "sequence": ("sequence",),
    "tokens": ("sequence",),
    "image+vector": ("image", "vector"),
    "sequence+sequence": ("sequence",),
}
_WEIGHTS = (4, 2, 2, 1, 2, 1)  # of the starts, in the order of STARTS


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        verdict: `exact`, `refused` (an error with a name), `silent` (returned, but wrong), `miscounted` (exact, but its
            cost is wrong) or `crash`.
        detail: The error.
        removed: Fraction of the parameters that went.
        change: How far the masked original is from the original; 0 when nothing went.
        nodes: Operators in the graph.
        kind: `native` or `portable`.
    """

    verdict: str
    detail: str = ""
    removed: float = 0.0
    change: float = 0.0
    nodes: int = 0
    kind: str = ""


def draw(seed: int) -> Program:
    """A random program, by seed."""
    rng = random.Random(seed)
    start = rng.choices(STARTS, _WEIGHTS)[0]
    steps: list[Step] = []
    for _ in range(rng.randint(3, 18)):
        names = operators_of(start) if rng.random() < 0.7 else sorted(OPERATORS)
        steps.append((rng.choice(names), rng.randrange(64), rng.randrange(64), rng.randrange(64)))
    return Program(start, tuple(steps), rng.randrange(2**16))


def operators_of(start: str) -> list[str]:
    """Operators on the kinds of values a network starts with."""
    return [name for name in sorted(OPERATORS) if name.partition(".")[0] in _KINDS[start]]


def random_plan(graph: mp.Graph, seed: int) -> mp.Plan:
    """Random subsets of random groups."""
    rng = random.Random(seed)
    keep: dict[str, tuple[int, ...]] = {}
    for group in graph.groups:
        if not group.pinned and group.size > group.minimum and rng.random() < 0.75:
            count = rng.randint(group.minimum, group.size - 1)
            keep[group.name] = tuple(sorted(rng.sample(range(group.size), count)))
    return mp.Plan(keep=keep, graph=graph.fingerprint)


def operators_in(graph: mp.Graph) -> int:
    """Number of operators a graph runs."""
    return sum(node.op not in ("input", "tensor") for node in graph.nodes.values())


def examine(program: Program) -> Outcome:
    """Builds, prunes and judges; never raises for what the engine does."""
    net, inputs, _ = build(program)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = None
    try:
        graph = mp.trace(net, inputs)
        if program.seed % 4:
            pruned = mp.apply(graph, random_plan(graph, program.seed))
        else:
            pruned = mp.prune(graph, budget="width=0.5")
    except MetapruneError as error:
        nodes = operators_in(graph) if graph is not None else 0
        return Outcome("refused", f"{type(error).__name__}: {error}"[:300], nodes=nodes)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("crash", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:400])
    wrong = random_oracle.misplaced(net, pruned.module, pruned.kept)
    if wrong:
        return Outcome("silent", f"tensors are not the kept part: {wrong[:4]}")
    try:
        error, change = random_oracle.error(net, pruned.module, pruned.kept, inputs)
    except Exception as failure:  # the pruned network does not run on other inputs
        return Outcome("crash", f"pruned network: {type(failure).__name__}: {failure}"[:300])
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pruned.module, net)]
    notes = "; ".join(note for note in pruned.notes if "kept whole" in note)
    outcome = Outcome("exact", notes, 1 - sizes[0] / sizes[1], change, operators_in(graph), pruned.kind)
    if error > TOLERANCE:
        return Outcome(
            "silent",
            f"{pruned.kind}: oracle {error:.1e}, certificate {pruned.certificate}"[:300],
            nodes=operators_in(graph),
        )
    if any(not torch.equal(value, before[name]) for name, value in net.state_dict().items()):
        return Outcome("silent", "the input network was changed")
    if sizes != [pruned.cost["after"].params, pruned.cost["before"].params]:
        costs = [pruned.cost["after"].params, pruned.cost["before"].params]
        return Outcome("miscounted", f"cost says {costs} parameters, there are {sizes}")
    return outcome
