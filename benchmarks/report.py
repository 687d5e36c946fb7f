"""Results as JSON and as the README's tables."""

from __future__ import annotations

import json
import platform
import re
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch-pruning", "metaprune")
RIGHT = ("exact", "exact_aware")
TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "operations": "single operations",
    "decoders": "further decoder language models",
}
NAMES = {"metaprune": "metaprune", "torch_pruning": "Torch-Pruning"}


def provenance(command: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a reader needs to repeat a measurement; `packages` are those it needs besides the usual ones."""
    versions = {}
    for package in (*PACKAGES, *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = f"{platform.machine()}, one thread of a shared machine, CPU only"
    return {"command": command, "versions": versions, "python": platform.python_version(), "machine": machine}


def put_table(marker: str, table: str) -> None:
    """Replaces what stands between a pair of markers in the README."""
    text = README.read_text()
    pattern = rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)"
    README.write_text(re.sub(pattern, lambda m: f"{m[1]}{table}{m[2]}", text, flags=re.DOTALL))


def percent(values: list[float]) -> str:
    """The median as a percentage."""
    return f"{statistics.median(values):.0%}" if values else "-"


def row(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one suite and engine."""
    verdicts = [record["verdict"] for record in records]
    right = [record for record in records if record["verdict"] in RIGHT]
    counted = [r for r in records if r.get("macs_stated_before") is not None and r.get("macs_before") is not None]
    counted_after = [r for r in records if r.get("macs_stated_after") is not None and r.get("macs_after") is not None]
    return {
        "n": len(records),
        "exact": verdicts.count("exact"),
        "exact_aware": verdicts.count("exact_aware"),
        "inexact": verdicts.count("inexact"),
        "refused": verdicts.count("refused"),
        "failed": len(records) - len(right) - verdicts.count("inexact") - verdicts.count("refused"),
        "cpu_limit": sum(record.get("error") == "CPU limit" for record in records),
        "params_removed": [r["params_removed"] for r in right],
        "macs_removed": [r["macs_removed"] for r in right if "macs_removed" in r],
        "cpu_seconds": [r["cpu_seconds"] for r in records],
        "macs_counted": len(counted),
        "macs_equal": sum(r["macs_stated_before"] == r["macs_before"] for r in counted),
        "macs_counted_after": len(counted_after),
        "macs_equal_after": sum(r["macs_stated_after"] == r["macs_after"] for r in counted_after),
    }


def coverage(folder: Path, command: str) -> None:
    """Writes results/coverage.json and the README's table from the files of a run."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if record.get("finished") and record["verdict"] != "failed_build"]
    for record in records:
        if "error" in record and isinstance(record["error"], str):  # where a package lies is nobody's business
            record["error"] = re.sub(r"/[^\s:]*/(?=[^/\s]+\.py)", "", record["error"])
    summary: dict[str, dict[str, Any]] = {}
    lines = [
        "| networks, width halved, no hints | engine | right | silently wrong | refused | fails or does not finish | "
        "parameters removed | MACs removed |\n|---|---|---|---|---|---|---|---|\n"
    ]
    for suite, title in TITLES.items():
        for engine, shown in NAMES.items():
            own = [r for r in records if r["engine"] == engine and r["network"].startswith(suite + "/")]
            if not own:
                continue
            figures = row(own)
            good = figures["exact"] + figures["exact_aware"]
            lines.append(
                f"| {title} | {shown} | {good} of {figures['n']} ({good / figures['n']:.0%}) | {figures['inexact']} | "
                f"{figures['refused']} | {figures['failed']} | {percent(figures['params_removed'])} | "
                f"{percent(figures['macs_removed'])} |\n"
            )
            for key in ("params_removed", "macs_removed", "cpu_seconds"):
                values = figures[key]
                figures[key] = round(statistics.median(values), 4) if values else None
            summary[f"{suite} {engine}"] = figures
    own = [r for r in records if r["engine"] == "metaprune"]
    figures = row(own)
    lines.append(
        f"\nRight: equal, in float64, to the original with the removed weights at zero; removed: medians over those. "
        f"metaprune's own MAC count equals torch's `FlopCounterMode` on {figures['macs_equal']} of "
        f"{figures['macs_counted']} networks before pruning and on {figures['macs_equal_after']} of "
        f"{figures['macs_counted_after']} after.\n"
    )
    whole = {**provenance(command), "summary": summary, "networks": records}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "coverage.json").write_text(json.dumps(whole, indent=1) + "\n")
    put_table("coverage", "".join(lines))


CASES = {
    "resnet50": "ResNet-50, 64 px",
    "densenet201": "DenseNet-201, 64 px",
    "swin_t": "Swin-T, 64 px",
    "llama_2_layers": "Llama, 2 layers, grouped queries",
    "residual_400": "400 residual blocks",
    "plain_400": "400 plain layers",
    "dense_80": "80 densely connected layers",
    "operators_10000": "10,000 operators",
}
PHASES = ("trace", "export", "groups_and_plan", "apply", "apply_certified")
CHAINS = {
    "residual": "residual chains, in nodes",
    "plain": "plain chains, in nodes",
    "dense": "dense chains, in channel slots",
}


def seconds(facts: dict[str, Any], *phases: str) -> str:
    """The sum of phases, or why there is none."""
    if all(phase in facts for phase in phases):
        return f"{sum(facts[phase] for phase in phases):.2f}"
    error = facts.get("error", "")
    return "not finished" if "not finished" in error else "fails" if error else "-"


def scaling(results: dict[str, Any]) -> None:
    """Writes the README's table of times."""
    own, peer = (results.get("cases", {}).get(engine, {}) for engine in NAMES)
    lines = [
        "| CPU seconds of one thread | nodes | trace | of that, torch.export | group and plan | cut | "
        "cut and certify | Torch-Pruning, whole prune |\n|---|---|---|---|---|---|---|---|\n"
    ]
    for name, title in CASES.items():
        if name in own:
            facts = own[name]
            phases = [seconds(facts, phase) for phase in PHASES]
            other = seconds(peer.get(name, {}), "groups_and_plan", "apply")
            lines.append(f"| {title} | {facts.get('nodes', '-')} | {' | '.join(phases)} | {other} |\n")
    growth = results.get("exponents", {})
    lines.append(
        "\n| growth: exponent of time | trace | torch.export | group and plan | cut | cut and certify | "
        "Torch-Pruning |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for kind, title in CHAINS.items():
        slopes = growth.get("metaprune", {}).get(kind, {})
        phases = [slopes.get(phase) for phase in PHASES]
        phases.append(growth.get("torch_pruning", {}).get(kind, {}).get("prune"))
        lines.append(f"| {title} | {' | '.join('-' if slope is None else f'{slope:.2f}' for slope in phases)} |\n")
    put_table("scaling", "".join(lines))
