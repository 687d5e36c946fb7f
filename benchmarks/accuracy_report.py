"""The accuracy benchmark's rows as JSON, as the README's tables and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_arms import DEFAULTS, PEER, TABLES
from ledger import Row, read_rows
from report import provenance, put_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
PLOT = HERE / "results" / "accuracy.png"
MARGIN = 0.3
"""Points by which an arm that is at least as good may fall short."""
TITLES = {"none": "no training steps", "equal FLOPs": "equal training FLOPs"}


@dataclass(frozen=True)
class Difference:
    """What one arm scores above another, in points, paired by network and seed.

    Attributes:
        mean: Over the pairs.
        error: Standard error of the mean; NaN of a single pair.
        spread: Standard deviation of the first arm's score over seeds, a mean over networks; NaN of a single seed.
    """

    mean: float
    error: float
    spread: float

    @property
    def verdict(self) -> str:
        """Whether the first arm is at least as good: yes when two standard errors do not reach past the margin."""
        if self.mean < -MARGIN:
            return "no"
        return "yes" if self.mean - 2 * self.error >= -MARGIN else "open"


class Scores:
    """Rows of complete cells: a network, seed and budget that every arm of a table was measured on; none is favoured.

    Args:
        rows: What was measured; what is of no arm of the tables is left out.
        tables: Names of the arms by table.

    Attributes:
        rows: The rows of complete cells, sorted.
    """

    def __init__(self, rows: Iterable[Row], tables: Mapping[str, Collection[str]]) -> None:
        found: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
        for row in rows:
            *cell, arm = row["key"]
            if arm in tables.get(cell[3], ()):
                found[tuple(cell)][arm] = row
        complete = [row for cell, arms in found.items() if len(arms) == len(tables[cell[3]]) for row in arms.values()]
        self.rows = sorted(complete, key=lambda row: [str(part) for part in row["key"]])

    def of(
        self, table: str, arm: str, budget: float | None = None, field: str = "score"
    ) -> dict[tuple[str, ...], float]:
        """A figure of an arm by network, seed and budget, at one budget or at all."""
        found = {}
        for row in self.rows:
            name, seed, at, kind, label = row["key"]
            if (kind, label) == (table, arm) and budget in (None, at):
                found[name, seed, at] = row[field]
        return found

    def arms(self, table: str) -> list[str]:
        """The arms of a table, by their mean score."""
        labels = {row["key"][4] for row in self.rows if row["key"][3] == table}
        return sorted(labels, key=lambda arm: (statistics.mean(self.of(table, arm).values()), arm))

    def budgets(self, table: str, name: str | None = None) -> list[float]:
        """The budgets of a table, or of one of its networks, from the largest."""
        keys = [row["key"] for row in self.rows]
        return sorted({key[2] for key in keys if key[3] == table and name in (None, key[0])}, reverse=True)

    def difference(self, table: str, arm: str, other: str, budget: float, name: str | None = None) -> Difference:
        """An arm less another at a budget, over all networks or on one."""
        first, second = self.of(table, arm, budget), self.of(table, other, budget)
        cells = [cell for cell in first if name in (None, cell[0])]
        apart = [100 * (first[cell] - second[cell]) for cell in cells]
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        return Difference(statistics.mean(apart), error, _spread({cell: first[cell] for cell in cells}))


def write_report(folder: Path) -> None:
    """Gathers the ledgers of all processes and writes everything that is made from them."""
    scores = Scores(read_rows(folder), TABLES)
    cpu = round(sum(row["cpu_seconds"] for row in scores.rows))
    about = provenance("python benchmarks/accuracy.py")
    RESULTS.write_text(json.dumps({**about, "cpu_seconds": cpu, "rows": scores.rows}, indent=1) + "\n")
    put_table("accuracy", readme(scores))
    _plot(scores)


def readme(scores: Scores) -> str:
    """The generated part of the README."""
    tables = [table for table in TITLES if scores.arms(table)]
    texts = [_table(scores, table) for table in tables]
    texts += [_differences(scores, table) for table in tables if table != "none"]
    texts += [_verdicts(scores, tables), _footnote(scores)]
    return "\n\n".join(texts) + "\n"


def _table(scores: Scores, table: str) -> str:
    """Means over networks, the spread over seeds, and CPU seconds of a row."""
    budgets = scores.budgets(table)
    lines = [_header(f"accuracy, {TITLES[table]}", budgets, "CPU s")]
    for arm in scores.arms(table):
        cells = [_cell(scores.of(table, arm, budget)) for budget in budgets]
        seconds = statistics.mean(scores.of(table, arm, field="cpu_seconds").values())
        lines.append(_line(arm, cells, f"{seconds:.1f}"))
    return "\n".join(lines)


def _differences(scores: Scores, table: str) -> str:
    """The default arm less every other."""
    budgets, default = scores.budgets(table), DEFAULTS[table]
    lines = [_header(f"{default}, less", budgets)]
    for arm in scores.arms(table):
        if arm != default and default in scores.arms(table):
            found = [scores.difference(table, default, arm, budget) for budget in budgets]
            lines.append(_line(arm, [_signed(d) for d in found]))
    spreads = [_spread(scores.of(table, default, budget)) for budget in budgets]
    return "\n".join([*lines, _line("its spread over seeds", [f"{s:.1f}" if s == s else "-" for s in spreads])])


def _verdicts(scores: Scores, tables: list[str]) -> str:
    """Whether the default arm is at least as good as every arm of the peer, by network and budget."""
    budgets = sorted({budget for table in tables for budget in scores.budgets(table)}, reverse=True)
    lines = [_header(f"at least as good as every {PEER} arm, margin {MARGIN:g}", budgets)]
    for table in tables:
        names = sorted({row["key"][0] for row in scores.rows if row["key"][3] == table})
        for name in names:
            measured = scores.budgets(table, name)
            cells = [_verdict(scores, table, budget, name) if budget in measured else "-" for budget in budgets]
            lines.append(_line(f"{name}, {TITLES[table]}", cells))
    return "\n".join(lines)


def _verdict(scores: Scores, table: str, budget: float, name: str) -> str:
    """The least sure of the comparisons with the peer's arms."""
    peers = [arm for arm in scores.arms(table) if arm.startswith(PEER)]
    found = [scores.difference(table, DEFAULTS[table], arm, budget, name) for arm in peers]
    worst = min(found, key=lambda d: (("no", "open", "yes").index(d.verdict), d.mean))
    return f"{worst.verdict}, {_signed(worst)}"


def _footnote(scores: Scores) -> str:
    dense: dict[str, dict[int, float]] = defaultdict(dict)
    reached: dict[float, list[float]] = defaultdict(list)
    for row in scores.rows:
        name, seed, budget, _, _ = row["key"]
        dense[name][seed] = 100 * row["dense"]
        reached[budget].append(row["macs"])
    cells = len({tuple(row["key"][:4]) for row in scores.rows})
    full = ", ".join(f"{name} {statistics.mean(found.values()):.1f}" for name, found in sorted(dense.items()))
    within = ", ".join(f"{budget:g}: {min(v):.3f} to {max(v):.3f}" for budget, v in sorted(reached.items()))
    return (
        "Means over networks ± the spread over seeds; CPU seconds of a row, scoring left out. Differences are paired "
        'by network and seed, ± their standard error; "yes" where two of them stay within the margin, "open" where '
        f"only the mean does. {cells} cells of network, seed and budget. Dense: {full}. MACs reached: {within}."
    )


def _header(title: str, budgets: list[float], *more: str) -> str:
    return f"{_line(title, [f'MACs {b:g}' for b in budgets], *more)}\n{'|---' * (1 + len(budgets) + len(more))}|"


def _line(*cells: str | list[str]) -> str:
    flat = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    return f"| {' | '.join(flat)} |"


def _cell(found: dict[tuple[str, ...], float]) -> str:
    """Mean over networks of their means over seeds, in percent, ± the spread over seeds."""
    if not found:
        return "-"
    mean = statistics.mean(statistics.mean(values) for values in _by_network(found).values())
    return f"{100 * mean:.1f}" + _plus_minus(_spread(found))


def _spread(found: dict[tuple[str, ...], float]) -> float:
    """Standard deviation over seeds in points, a mean over networks; NaN without two seeds of any."""
    spreads = [100 * statistics.stdev(values) for values in _by_network(found).values() if len(values) > 1]
    return statistics.mean(spreads) if spreads else math.nan


def _by_network(found: dict[tuple[str, ...], float]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for (name, *_), value in found.items():
        values[name].append(value)
    return values


def _signed(difference: Difference) -> str:
    """The mean with its sign, none of it for what rounds to 0, ± its standard error."""
    rounded = round(difference.mean, 1)
    return (f"{rounded:+.1f}" if rounded else "0.0") + _plus_minus(difference.error)


def _plus_minus(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.1f}"


def _plot(scores: Scores) -> None:
    """Score against multiply-adds without training, one line for each arm, means over all networks and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    budgets = sorted(scores.budgets("none"))
    for arm in scores.arms("none"):
        means = [100 * statistics.mean(scores.of("none", arm, budget).values()) for budget in budgets]
        axes.plot(budgets, means, marker="o", ls="-" if "least squares" in arm else "--", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("fraction of the multiply-adds kept")
    axes.set_ylabel("Fashion-MNIST test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)
