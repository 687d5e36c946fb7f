"""The weight graph: a bijection with the network, with every position in the hands of the units that own it."""

from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune.graphs.errors import OptionError
from metaprune.metanet.layout import Part, Side
from metaprune.metanet.views import edges
from metaprune.metanet.weight_graph import WeightGraph
from tests.support import oracle
from tests.support.units import NAMES, orders, reordered, weights


def part(graph: WeightGraph, name: str) -> Part:
    return graph.layout.parts[name]


def owners(graph: WeightGraph, side: Side) -> list[set[str]]:
    """For each owner of a side's positions, the names of the unit sets."""
    found = []
    for row in side.units:
        found.append({s.name for s in graph.units if bool(((row >= s.start) & (row < s.start + s.size)).any())})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_in_one_place_and_comes_back_bit_for_bit(name: str) -> None:
    graph, inputs = weights(name)
    places = Counter(p.name for ps in (graph.blocks, graph.vectors, graph.layout.rest) for p in ps)
    assert places == Counter(list(graph.graph.tensors))
    for own, value in graph.tensors().items():
        assert torch.equal(value, graph.graph.values[own]), own
        assert value.dtype == graph.graph.values[own].dtype
    back = graph.to_graph()
    assert back.fingerprint == graph.graph.fingerprint
    assert oracle.distance(back.run(None, inputs), graph.graph.run(None, inputs)) <= 1e-14
    assert all(graph.values[p.name].ndim == 3 for p in graph.blocks)
    assert all(graph.values[p.name].ndim == 2 for p in graph.vectors)


def test_convolutions_are_seen_without_a_copy() -> None:
    graph, _ = weights("resnet")
    own = graph.graph.values
    assert all(graph.values[name].data_ptr() == own[name].data_ptr() for name in own)


@pytest.mark.parametrize("name", NAMES)
def test_positions_belong_to_the_units_that_take_them_away(name: str) -> None:
    # Marks the slices of one unit in the tensors themselves, then looks which positions of the views are marked.
    graph, _ = weights(name)
    for units, group in zip(graph.units, graph.graph.groups, strict=True):
        for unit in {0, group.size - 1}:
            for own in group.slices:
                mark = torch.zeros(graph.graph.tensors[own.tensor].shape)
                mark.index_fill_(own.dim, torch.from_numpy(own.index[unit]), 1.0)
                for number, side in enumerate(part(graph, own.tensor).sides):
                    if own.dim in side.dims:
                        seen = part(graph, own.tensor).view(mark).movedim(number, 0).flatten(1)
                        held = (side.units == units.start + unit).any(0)
                        assert held[seen[:, 0] == 1].all()
                        assert torch.equal(seen, seen[:, :1].expand_as(seen)), "a unit owns whole positions"


# Order matters only to a network that compares neighbours or two groups unit by unit; none of these does.
@pytest.mark.parametrize("name", NAMES)
def test_units_in_another_order_make_the_same_network(name: str) -> None:
    graph, inputs = weights(name)
    moved = reordered(graph, orders(graph.graph)).to_graph()
    assert any(not torch.equal(moved.values[n], graph.graph.values[n]) for n in moved.values)
    assert oracle.distance(moved.run(None, inputs), graph.graph.run(None, inputs)) <= 1e-9


def test_sides_of_each_construct() -> None:
    """(tensor, shape of the view, owners of the outputs, owners of the inputs) by hand."""
    expected: dict[str, list[tuple[str, tuple[int, ...], int, int]]] = {
        "inverted_residual": [("inner.0.weight", (24, 8, 1), 1, 1), ("inner.2.weight", (24, 9), 1, 0)],
        "grouped_chain": [("inner.0.weight", (8, 4, 9), 2, 1), ("tail.weight", (4, 8, 9), 1, 2)],
        "transposed_grouped": [("inner.weight", (3, 8, 4), 1, 2)],
        "dense_block": [("c2.weight", (8, 11, 9), 1, 1), ("c3.weight", (4, 27, 9), 1, 1)],
        "flatten_batch_norm": [("4.weight", (6, 128, 1), 1, 1), ("1.running_var", (8, 1), 1, 0)],
        "grouped_queries": [("q.weight", (24, 8, 1), 3, 1), ("o.weight", (8, 36, 1), 1, 3)],
        "einsum": [("1.q", (8, 8, 1), 2, 1), ("1.o", (8, 8, 1), 1, 2)],
        "stacked_experts": [("1.up", (30, 8, 1), 2, 1)],
        "llama_tied": [("embed.weight", (8, 11), 1, 0)],
        "vision_transformer": [("position", (8, 10), 1, 0), ("patch.weight", (8, 3, 4), 1, 1)],
        "lstm": [("layer.weight_hh_l0", (28, 7, 1), 1, 1)],
        "relative_bias": [("1.table", (2, 25), 1, 0)],
    }  # fmt: skip
    for name, rows in expected.items():
        graph, _ = weights(name)
        for tensor, shape, out, into in rows:
            assert tuple(graph.values[tensor].shape) == shape, tensor
            assert [len(side.units) for side in part(graph, tensor).sides] == [n for n in (out, into) if n], tensor


def test_a_concatenation_is_an_axis_of_ranges() -> None:
    graph, _ = weights("ghost")
    (found,) = owners(graph, part(graph, "tail.weight").sides[1])
    wide = torch.cat([torch.arange(6), torch.arange(6)])  # the same six channels, once more by a cheap convolution
    main = next(units for units in graph.units if units.name in found)
    assert torch.equal(part(graph, "tail.weight").sides[1].units[0], main.start + wide)


def test_a_flattening_repeats_units() -> None:
    graph, _ = weights("flatten_batch_norm")
    positions = part(graph, "4.weight").sides[1].units[0]
    assert torch.equal(positions - positions[0], torch.arange(8).repeat_interleave(16))


@pytest.mark.parametrize("name", ["resnet", "grouped_chain", "vision_transformer", "flatten_batch_norm"])
def test_share_is_what_a_cut_saves(name: str) -> None:
    graph, _ = weights(name)
    macs = graph.graph.cost().macs
    for units in graph.units:
        if units.free:
            keep = {units.name: tuple(range(units.size - 1))}
            pruned = mp.apply(graph.graph, mp.Plan(keep, graph.graph.fingerprint), certify=False)
            assert units.share == pytest.approx(1 - pruned.cost["after"].macs / macs, abs=1e-12)
        else:
            assert units.share == 0.0


def test_depth_granularity_and_roles_of_a_small_network() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    graph = WeightGraph.of(mp.trace(net, torch.randn(2, 1, 4, 4)))
    units = {u.name: u for u in graph.units}
    assert (units["0"].size, units["0"].granularity, units["0"].first, units["0"].last) == (4, 4, 1 / 3, 2 / 3)
    assert (units["4"].first, units["4"].last, units["4"].free) == (2 / 3, 1.0, True)
    assert not units["6"].free
    readings = {name: (p.reading.family, p.reading.argument) for name, p in graph.layout.parts.items()}
    assert readings["0.weight"] == readings["4.weight"] == ("sum", "weight")
    assert readings["0.bias"] == ("sum", "bias")
    assert [readings[f"1.{n}"][1] for n in ("weight", "bias", "running_mean", "running_var")] == [
        "weight", "bias", "running_mean", "running_var",
    ]  # fmt: skip
    assert readings["1.weight"][0] == "norm"
    assert readings["1.num_batches_tracked"] == ("none", "other")
    shares = [part(graph, f"{i}.weight").reading.share for i in (0, 4, 6)]
    assert shares == pytest.approx([n / (144 + 96 + 18) for n in (144, 96, 18)])


@pytest.mark.parametrize("name", ["resnet", "grouped_chain", "vision_transformer", "lstm", "ghost"])
@pytest.mark.filterwarnings("ignore:The node types:UserWarning")
def test_hetero_view_holds_every_weight(name: str) -> None:
    graph, _ = weights(name)
    view = graph.to_hetero()
    assert view.validate()
    assert {n: view[n].num_nodes for n in view.node_types} == {u.name: u.size for u in graph.units}
    for block in graph.blocks:
        value = graph.values[block.name]
        rebuilt = torch.full_like(value, float("nan"))
        for kind in view.edge_types:
            if kind[1] == block.name:
                store = view[kind]
                rebuilt[store.position[1], store.position[0]] = store.edge_attr
        assert torch.equal(rebuilt, value)
        owned = [int((side.units >= 0).sum()) for side in block.sides]
        assert sum(e.units.shape[1] for e in edges(block, graph.units)) == owned[0] * owned[1]
    for vector in graph.vectors:
        held = [view[u.name][vector.name] for u in graph.units if vector.name in view[u.name]]
        assert held
        for copy in held:
            assert torch.equal(copy.flatten().sort().values, graph.values[vector.name].flatten().sort().values)


def test_networkx_view_follows_the_data() -> None:
    graph, _ = weights("resnet")
    view = graph.to_networkx()
    assert set(view) == {u.name for u in graph.units}
    assert sum(view.nodes[n]["free"] for n in view) == 4
    assert {key for *_, key in view.edges(keys=True)} == {block.name for block in graph.blocks}
    source, target = next((a, b) for a, b, key in view.edges(keys=True) if key == graph.blocks[0].name)
    assert view.nodes[source]["size"] == 3  # image channels come first
    assert view.edges[source, target, graph.blocks[0].name]["shape"] == (8, 3, 9)


def test_other_tensors_keep_gradients_and_are_checked() -> None:
    graph, _ = weights("resnet")
    name = graph.blocks[0].name
    fresh = torch.randn(part(graph, name).shape, dtype=torch.float64, requires_grad=True)
    changed = graph.with_tensors({name: fresh})
    changed.values[name].sum().backward()
    assert fresh.grad is not None
    assert torch.equal(graph.tensors()[name], graph.graph.values[name]), "the original stays"
    with pytest.raises(OptionError, match="no tensor nothing"):
        graph.with_tensors({"nothing": fresh})
    with pytest.raises(OptionError, match=r"must be \[8, 3, 3, 3\]"):
        graph.with_tensors({name: fresh[0]})


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 2, 5)])
def test_views_of_any_sides_are_undone(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    reading = weights("resnet")[0].blocks[0].reading

    def side(*dims: int) -> Side:
        size = torch.Size([shape[d] for d in dims]).numel()
        return Side(dims, torch.zeros(1, size, dtype=torch.long))

    for out, into in product(range(len(shape)), repeat=2):
        sides: tuple[Side, ...] = (side(out),) if out == into else (side(out), side(into))
        seen = Part("t", shape, sides, reading)
        assert_same(seen.restore(seen.view(tensor)), tensor)
    merged = Part("t", shape, (side(2, 0), side(1)), reading)
    assert_same(merged.restore(merged.view(tensor)), tensor)
    assert float(merged.view(tensor)[1 * shape[0] + 2 % shape[0], 1, 0]) == float(
        tensor[(2 % shape[0], 1, 1, *[0] * (len(shape) - 3))]
    )


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.equal(found, wanted)
