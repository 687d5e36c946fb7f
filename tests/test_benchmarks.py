"""The benchmarks' oracle: it accepts right cuts, names wrong ones, and needs no engine."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("allowances", "chains", "networks", "operations", "oracle", "random_weights", "report", "rewriting", "scaling")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8), norm or nn.Identity(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


KEEP = torch.tensor([0, 2, 3, 7])


def cut(model: nn.Module, a: Tensor = KEEP, b: Tensor = KEEP) -> nn.Module:
    small = copy.deepcopy(model)
    small.a.weight, small.a.bias = (nn.Parameter(p.detach()[a]) for p in (model.a.weight, model.a.bias))
    small.b.weight = nn.Parameter(model.b.weight.detach()[:, b])
    if isinstance(model.norm, nn.LayerNorm | nn.RMSNorm):
        small.norm.normalized_shape = (len(a),)
        for name, p in model.norm.named_parameters():
            setattr(small.norm, name, nn.Parameter(p.detach()[a]))
    return small


def judged(bench: dict[str, ModuleType], model: nn.Module, small: nn.Module, stated: Any = None) -> dict[str, Any]:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    return bench["oracle"].judge(model, small, (x,), lambda y: y, stated)


@pytest.fixture
def net(bench: dict[str, ModuleType]) -> nn.Module:
    return bench["random_weights"].randomise(Net())


def test_a_right_cut_is_exact(bench: dict[str, ModuleType], net: nn.Module) -> None:
    stated = {"a.weight": {0: KEEP}, "a.bias": {0: KEEP}, "b.weight": {1: KEEP}}
    for indices in (None, stated):
        report = judged(bench, net, cut(net), indices)
        assert report["verdict"] == "exact"
        assert report["error"] < 1e-12


def test_a_swapped_index_is_inexact(bench: dict[str, ModuleType], net: nn.Module) -> None:
    assert judged(bench, net, cut(net, b=KEEP[[1, 0, 2, 3]]))["verdict"] == "inexact"
    assert judged(bench, net, cut(net, b=torch.tensor([0, 2, 3, 6])))["verdict"] == "inexact"


def test_a_changed_value_is_unmatched(bench: dict[str, ModuleType], net: nn.Module) -> None:
    small = cut(net)
    with torch.no_grad():
        small.a.weight[0, 0] += 1e-6
    report = judged(bench, net, small)
    assert report["verdict"] == "unmatched"
    assert report["unmatched"] == ["a.weight"]


def test_wrongly_stated_positions_are_unmatched(bench: dict[str, ModuleType], net: nn.Module) -> None:
    stated = {"a.weight": {0: KEEP + 0}, "a.bias": {0: KEEP}, "b.weight": {1: torch.tensor([0, 2, 3, 6])}}
    assert judged(bench, net, cut(net), stated)["verdict"] == "unmatched"


def test_an_untouched_network_has_nothing_pruned(bench: dict[str, ModuleType], net: nn.Module) -> None:
    assert judged(bench, net, copy.deepcopy(net))["verdict"] == "nothing_pruned"


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_statistics_over_kept_channels_are_an_allowance(bench: dict[str, ModuleType], norm: Any) -> None:
    net = bench["random_weights"].randomise(Net(norm(8)))
    report = judged(bench, net, cut(net))
    assert report["verdict"] == "exact_aware"
    assert report["error"] < 1e-12 < 1e-3 < report["error_plain"]
    assert judged(bench, net, cut(net, b=KEEP[[1, 0, 2, 3]]))["verdict"] == "inexact"


def test_a_rescaled_gain_is_allowed_where_positions_are_stated(bench: dict[str, ModuleType]) -> None:
    net = bench["random_weights"].randomise(Net(nn.RMSNorm(8, eps=0.25)))
    small = cut(net)
    with torch.no_grad():
        small.norm.weight *= 2**0.5
    small.norm.eps = 0.5
    stated = {"a.weight": {0: KEEP}, "a.bias": {0: KEEP}, "norm.weight": {0: KEEP}, "b.weight": {1: KEEP}}
    assert judged(bench, net, small)["verdict"] == "unmatched"
    report = judged(bench, net, small, stated)
    assert (report["verdict"], report["tensors_rescaled"]) == ("exact", 1)


def test_positions_are_found_by_value(bench: dict[str, ModuleType]) -> None:
    old = torch.randn(12, 7, 3, generator=torch.Generator().manual_seed(1))
    keep = [torch.tensor([11, 0, 5]), torch.tensor([6, 2]), torch.arange(3)]
    new = old[torch.meshgrid(*keep, indexing="ij")]
    found = bench["oracle"].find_slice(old, new)
    assert [k.tolist() for k in found] == [k.tolist() for k in keep]


def test_every_operation_gives_the_classes(bench: dict[str, ModuleType]) -> None:
    operations = bench["operations"]
    for name, make in operations.OPERATIONS.items():
        with torch.no_grad():
            y = make().eval()(*operations.example(name))
        assert y.shape[-1] in (13, 131), name
        assert bench["networks"].output_layers(make()) or name == "tied_table", name


def test_the_exponent_of_a_power_is_found(bench: dict[str, ModuleType]) -> None:
    points = [(x, 3e-3 * x**1.25) for x in (10.0, 20.0, 40.0, 80.0)]
    assert bench["scaling"].exponent(points) == pytest.approx(1.25)


def test_tables_replace_what_stands_between_the_markers(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n")
    monkeypatch.setattr(bench["report"], "README", path)
    bench["report"].put_table("t", "new \\1\n")
    assert path.read_text() == "a\n<!-- t:begin -->\nnew \\1\n<!-- t:end -->\nb\n"


def test_the_table_of_rewriting_pairs_arms_by_network(bench: dict[str, ModuleType]) -> None:
    rewriting = bench["rewriting"]
    rows = [
        {"key": (name, budget, arm), "accuracy": accuracy + gain, "kl": 1.0, "dense": 0.8, "seconds": 2.0}
        for name, accuracy in (("a", 0.1), ("b", 0.3))
        for budget in rewriting.BUDGETS
        for arm, gain in (
            (rewriting.MASKS, 0.0), (rewriting.REFIT, 0.1 + accuracy), (rewriting.DATA, 0.4), ("own", 0.2),
        )
    ]  # fmt: skip
    rows.append({**rows[0], "key": ("c", 0.5, rewriting.MASKS)})  # a network that is not through yet
    found = rewriting.table(rows, {"own": {"step": 2, "steps": 4, "history": [[0, 1.0, 2.0], [2, 0.5, 1.0]]}})
    lines = found.splitlines()
    assert "| masked, nothing else | 20.0 (1.00) | 20.0 (1.00) | 20.0 (1.00) |" in lines
    error = 1.645 * 200**0.5 / 2**0.5  # gains of 20 and 40 points: a standard deviation of the root of 200
    assert f"| refit without data | +30.0 ± {error:.1f} (+20.0) | " in found
    assert "| own | +20.0 ± 0.0 (+20.0) | " in found
    assert "own: step 2 of 4, 0.50" in lines[-1]
    assert lines[-1].startswith("2 networks of the families")
