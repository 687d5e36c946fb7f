"""The accuracy benchmark's rows as JSON, as the README's tables and as a plot."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from report import provenance, put_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
PLOT = HERE / "results" / "accuracy.png"
Scores = dict[tuple[str, float, str], dict[tuple[str, int], float]]


def write_report(folder: Path) -> None:
    """Gathers the ledgers of all processes and writes everything that is made from them."""
    rows = []
    for path in sorted(folder.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut off by a kill; the row is measured again
                continue
    rows = _complete(rows)
    rows.sort(key=lambda row: [str(part) for part in row["key"]])
    cpu = round(sum(row["cpu_seconds"] for row in rows))
    about = provenance("python benchmarks/accuracy.py")
    RESULTS.write_text(json.dumps({**about, "cpu_seconds": cpu, "rows": rows}, indent=1) + "\n")
    put_table("accuracy", _tables(rows))
    _plot(rows)


def _complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the networks, seeds and budgets that every arm of the table has been measured on: no arm is favoured."""
    arms: dict[str, set[str]] = defaultdict(set)
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for row in rows:
        name, seed, budget, table, arm = row["key"]
        arms[table].add(arm)
        found[name, seed, budget, table].add(arm)
    return [row for row in rows if found[tuple(row["key"][:4])] == arms[row["key"][3]]]


def _tables(rows: list[dict[str, Any]]) -> str:
    scores: Scores = defaultdict(dict)
    dense: dict[tuple[str, int], float] = {}
    reached: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        name, seed, budget, table, arm = row["key"]
        scores[table, budget, arm][name, seed] = 100 * row["score"]
        dense[name, seed] = 100 * row["dense"]
        reached[budget].append(row["macs"])
    titles = {"none": "no training steps", "equal FLOPs": "equal training FLOPs"}
    texts = []
    for table, title in titles.items():
        arms = list(dict.fromkeys(arm for kind, _, arm in scores if kind == table))
        budgets = sorted({budget for kind, budget, _ in scores if kind == table}, reverse=True)
        if not arms:
            continue
        texts.append(
            "\n".join(_table(scores, table, title, sorted(arms, key=lambda a: _mean(scores, table, a)), budgets))
        )
    names = sorted({name for name, _ in dense})
    full = ", ".join(f"{name} {statistics.mean(v for (n, _), v in dense.items() if n == name):.1f}" for name in names)
    within = ", ".join(f"{budget:g}: {min(v):.3f} to {max(v):.3f}" for budget, v in sorted(reached.items()))
    cases = len({tuple(row["key"][:4]) for row in rows})
    return "\n\n".join([*texts, f"{cases} cells of network, seed and budget. Dense: {full}. MACs reached: {within}.\n"])


def _mean(scores: Scores, table: str, arm: str) -> float:
    return statistics.mean(v for (t, _, a), found in scores.items() if (t, a) == (table, arm) for v in found.values())


def _table(scores: Scores, table: str, title: str, arms: list[str], budgets: list[float]) -> list[str]:
    """Means over networks and seeds, and the spread over seeds of the networks' mean."""
    lines = [
        "| accuracy, " + title + " | " + " | ".join(f"MACs {b:g}" for b in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for arm in arms:
        cells = []
        for budget in budgets:
            found = scores.get((table, budget, arm), {})
            cells.append(_cell(found) if found else "-")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _cell(found: dict[tuple[str, int], float]) -> str:
    by_name: dict[str, list[float]] = defaultdict(list)
    for (name, _), value in found.items():
        by_name[name].append(value)
    mean = statistics.mean(statistics.mean(values) for values in by_name.values())
    spreads = [statistics.stdev(values) for values in by_name.values() if len(values) > 1]
    return f"{mean:.1f}" + (f" ± {statistics.mean(spreads):.1f}" if spreads else "")


def _plot(rows: list[dict[str, Any]]) -> None:
    """Score against multiply-adds without training, one line for each arm, means over all networks and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        _, _, budget, table, arm = row["key"]
        if table == "none":
            arms[arm][budget].append(100 * row["score"])
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, found in arms.items():
        budgets = sorted(found)
        fitted = "least squares" in arm
        axes.plot(
            budgets, [statistics.mean(found[b]) for b in budgets], marker="o", ls="-" if fitted else "--", label=arm
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("fraction of the multiply-adds kept")
    axes.set_ylabel("Fashion-MNIST test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)
