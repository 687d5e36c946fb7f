"""The metanetwork at work: networks that it has not seen are pruned in one pass, for one budget or many."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import metaprune
from metaprune.api import Pruned, apply, carried_out, rewritten, trace
from metaprune.calibration import repeatable
from metaprune.dataless import drawable, refit_without_data
from metaprune.graphs.errors import LoadError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.graphs.ir import Graph
from metaprune.graphs.plan import Plan
from metaprune.judge import Judge
from metaprune.latency import LatencyTable
from metaprune.metanet.describe import Encoder, describe, observe
from metaprune.metanet.encoded import CLOSED, Encoded, scored
from metaprune.metanet.examples import DATA, WEIGHTS
from metaprune.metanet.graph_head import GraphHead, Subject
from metaprune.metanet.predictor import Predictor
from metaprune.metanet.rewrite_head import COMPENSATION, FEATURES, SPARSITY, RewriteHead
from metaprune.metanet.schema import Schema
from metaprune.metanet.weight_graph import WeightGraph
from metaprune.planning import Posed, pose
from metaprune.reconstruction import reconstruct
from metaprune.search.front import Front, Point
from metaprune.search.refinement import ROUNDS

SCHEMA = 1
CHECKPOINTS = "metaprune.checkpoints"
_GRAPH, _REWRITER = "graph.", "rewriter."
_LARGEST, _LEAST = 0.9, 0.05  # kept multiply-adds at the ends of a front unless told otherwise


class MetaPruner:
    """Heads that predict what pruning costs, and the pruning that they steer; `metaprune.fit` makes one.

    Attributes:
        predictors: Heads by what they look at: `"data"` or the `"weights"` alone.
        card: What they were fitted on, and how well they predict families held out.
        encoder: Of further unit states, where the heads were fitted with one.
        graphs: By what the heads look at the graph head whose predictions are among their features, where there is one.
        rewriter: Rewrites weights where there are no data, if it was fitted.
        guard: How often the closed form's plan was kept and how often a predicted one, of those that were compared.
    """

    def __init__(
        self,
        predictors: Mapping[str, Predictor],
        card: Mapping[str, Any],
        encoder: Encoder | None = None,
        graphs: Mapping[str, GraphHead] | None = None,
        rewriter: RewriteHead | None = None,
    ) -> None:
        if bool(card.get("states")) != (encoder is not None):
            raise OptionError("encoder: the heads were fitted " + ("without one" if encoder else "with one"))
        self.predictors = dict(predictors)
        self.card = dict(card)
        self.encoder = encoder
        self.graphs = dict(graphs or {})
        self.rewriter = rewriter
        self.guard: Counter[str] = Counter()

    def encode(self, model: Any, inputs: Any = None, data: Any = None, seed: int = 0) -> Encoded:
        """Looks at a network once, for any number of plans.

        Args:
            model: The network, or its `Graph`.
            inputs: An example input, see `metaprune.trace`.
            data: Batches of inputs or of (inputs, labels), labels are not looked at; None to look at the weights alone.
            seed: Of what is drawn.

        Raises:
            OptionError: The data do not fit the network.
            MetapruneError: The network has values that are not finite.
        """
        data = None if data is None else repeatable(data)
        graph = model if isinstance(model, Graph) else trace(model, inputs)
        sight = WEIGHTS if data is None else DATA
        predictor = self.predictors[sight]
        statistics = None if data is None else observe(graph, data, self.card.get("samples", 256), seed)
        scores = scored(graph, "magnitude" if data is None else "fisher_block", statistics)
        order = {name: torch.from_numpy(values.argsort(kind="stable")) for name, values in scores.units.items()}
        described = describe(graph, order, statistics, self.encoder)
        if sight in self.graphs:
            described = self.graphs[sight].read(Subject(WeightGraph.of(graph), described, order))
        minima = {group.name: group.minimum for group in graph.groups if not group.pinned}
        if described.schema != predictor.schema:
            raise OptionError("encoder: its states have another width than those that the heads were fitted with")
        outside = predictor.outside(described, minima) if minima else []
        if outside:
            warnings.warn(f"outside the range of the zoo, taken as at its edge: {', '.join(outside)}", stacklevel=2)
        plain, compensated = predictor.losses(described, minima)
        surrogate = predictor.surrogate(described, plain, compensated) if data is not None and minima else None
        judge = None if data is None else Judge(graph, data, seed=seed)
        return Encoded(graph, data, scores, described, plain, compensated, surrogate, seed, judge)

    def plan(
        self,
        encoded: Encoded,
        budget: str = "macs=0.5",
        round_to: int = 1,
        protect: Iterable[str] = (),
        only: Iterable[str] = (),
        kinds: Sequence[str] | None = None,
        latency: LatencyTable | None = None,
        refine: int = ROUNDS,
    ) -> Plan:
        """Decides what stays of a network that was encoded.

        With data the predicted allocations and that of the closed form are cut, fitted on some samples and compared on
        others, then those to which what was measured points, up to four in each of `refine` rounds; the best is taken,
        unless it gets clearly better with its units ranked by their norms too. Without data, the one by the predicted
        curves is. What was compared is in the plan's provenance under `"guard"`. The other arguments and errors are
        those of `metaprune.plan`.
        """
        if type(refine) is not int or refine < 0:
            raise OptionError(f"refine: a number of rounds, 0 or more, is needed, not {refine!r}")
        posed = pose(encoded.graph, budget, round_to, protect, only, kinds, encoded.seed, latency)
        choices = encoded.candidates(posed)
        predicted = encoded.predicted(posed, choices)
        if encoded.judge is None or len(choices) == 1:
            best, losses = list(choices.values())[-1], dict[str, float]()
        else:
            best, losses = encoded.chosen(posed, choices, encoded.judge, refine)
            self.guard[CLOSED if best.name == CLOSED else "predicted"] += 1
        guard = {"kept": best.name, "measured": losses, "predicted": predicted}
        return posed.plan(best, {**_about(encoded), "guard": guard})

    def prune(
        self,
        model: Any,
        inputs: Any = None,
        budget: str = "macs=0.5",
        data: Any = None,
        round_to: int = 1,
        protect: Iterable[str] = (),
        only: Iterable[str] = (),
        kinds: Sequence[str] | None = None,
        seed: int = 0,
        certify: bool = True,
        latency: LatencyTable | None = None,
        refine: int = ROUNDS,
        rewrite: bool | None = None,
    ) -> Pruned:
        """Encodes, plans, cuts and certifies, and makes up for what is cut.

        With data the weights of what remains are fitted by least squares. Without, the network is rewritten for the
        plan before it is cut: by `metaprune.refit_without_data`, and on top of it by the head `"rewrite"` where the
        pruner was fitted with one. The certificate is of the rewritten network, and the plan's provenance has the
        digest of its weights.

        Args, beyond those of `encode`, `plan` and `metaprune.prune`: model: What `encode` returned is accepted too, so
            that one pass serves many budgets; its data and seed count then. rewrite: Whether weights are rewritten, and
            not fitted; by default where there are no data, and inputs that can be drawn.

        Raises:
            OptionError: Rewriting is asked for, and the network's inputs can not be drawn.
        """
        encoded = model if isinstance(model, Encoded) else self.encode(model, inputs, data, seed)

        def planned(whole: Sequence[str]) -> Plan:
            return self.plan(encoded, budget, round_to, whole, only, kinds, latency, refine)

        pruned = carried_out(encoded.graph, planned, protect, certify)
        if rewrite is None:
            rewrite = encoded.data is None and drawable(encoded.graph)
        if rewrite:
            return self._rewritten(encoded, pruned)
        return pruned if encoded.data is None else reconstruct(pruned, encoded.data, seed=encoded.seed)

    def rewrite(self, model: Any, inputs: Any = None) -> nn.Module:
        """Rewrites a whole network so that it can be pruned at little loss; to be trained on and pruned as usual.

        Args:
            model: The network; it is not changed.
            inputs: As for `metaprune.trace`.

        Raises:
            OptionError: The pruner was not fitted with the head `"rewrite"` for the objective `"group_sparsity"`.
        """
        if self.rewriter is None or not self._rewrites_for(SPARSITY):
            raise OptionError(f"rewrite: this pruner was fitted without the head 'rewrite' for {SPARSITY!r}")
        graph = model if isinstance(model, Graph) else trace(model, inputs)
        whole = Plan({}, graph.fingerprint)
        return apply(graph.with_values(self.rewriter.rewritten(graph, whole)), whole).module

    def _rewrites_for(self, objective: str) -> bool:
        return self.rewriter is not None and self.rewriter.config["objective"] == objective

    def _rewritten(self, encoded: Encoded, pruned: Pruned) -> Pruned:
        """The same cut of the network with weights that make up for it."""
        make_up = self.rewriter.rewritten if self._rewrites_for(COMPENSATION) and self.rewriter else refit_without_data
        return rewritten(pruned, make_up(encoded.graph, pruned.plan, seed=encoded.seed), encoded.seed)

    def front(
        self,
        model: Any,
        inputs: Any = None,
        budgets: Sequence[str] | None = None,
        data: Any = None,
        points: int = 12,
        seed: int = 0,
    ) -> Front:
        """The predicted front of loss and multiply-adds, from one pass; nothing is cut or measured.

        Args:
            model: As for `prune`.
            inputs: As for `prune`.
            budgets: What is asked for; by default kept multiply-adds at equal ratios, from 0.9 down to a twentieth or
                what can be attained.
            data: As for `prune`.
            points: Number of budgets where none are given.
            seed: Of what is drawn.

        Returns:
            A front of `"distortion"`, predicted in nats, and `"macs"`; a start for `metaprune.explore`.
        """
        encoded = model if isinstance(model, Encoded) else self.encode(model, inputs, data, seed)
        if type(points) is not int or points < 1:
            raise OptionError(f"points: a positive whole number is needed, not {points!r}")
        found = []
        for budget in _budgets(encoded, points) if budgets is None else budgets:
            posed = pose(encoded.graph, budget, seed=encoded.seed)
            choices = encoded.candidates(posed)
            predicted = encoded.predicted(posed, choices)
            for name, choice in choices.items():
                plan = posed.plan(choice, _about(encoded))
                if math.isfinite(predicted[name]):
                    found.append(Point((predicted[name], plan.reached["macs"]), plan, info={"predicted": True}))
        return Front.of(("distortion", "macs"), found, provenance={**_about(encoded), "seed": encoded.seed})

    def save(self, path: str | Path, card_path: str | Path | None = None) -> None:
        """Writes safetensors, atomically, with the card as JSON in the metadata; no encoder that is a function.

        Args:
            path: The file.
            card_path: A second file, for the card alone, to be read by people.
        """
        tensors = {
            f"{sight}.{name}": value
            for sight, predictor in self.predictors.items()
            for name, value in predictor.tensors().items()
        }
        for sight, head in self.graphs.items():
            tensors |= {f"{_GRAPH}{sight}.{name}": value.contiguous() for name, value in head.state_dict().items()}
        rewriter = None
        if self.rewriter is not None:
            tensors |= {f"{_REWRITER}{name}": v.contiguous() for name, v in self.rewriter.state_dict().items()}
            rewriter = {"features": FEATURES, "config": self.rewriter.config}
        graphs = {sight: head.config for sight, head in self.graphs.items()}
        schemas = {sight: predictor.schema.digest for sight, predictor in self.predictors.items()}
        versions = {"metaprune": metaprune.__version__, "torch": torch.__version__}
        card = {"schema": SCHEMA, "features": schemas, "graphs": graphs, "versions": versions, **self.card}
        if rewriter is not None:
            card["rewriter"] = rewriter
        write_atomically(Path(path), save_tensors(tensors, {"card": json.dumps(card)}))
        if card_path is not None:
            write_atomically(Path(card_path), (json.dumps(card, indent=1) + "\n").encode())

    @staticmethod
    def load(path: str | Path = "default", encoder: Encoder | None = None) -> MetaPruner:
        """Reads what `save` wrote.

        Args:
            path: The file, or `"default"` for the checkpoint that comes with metaprune.
            encoder: That with which the heads were fitted, where they were.

        Raises:
            LoadError: The file is missing, damaged, or of other features than this version computes.
            OptionError: An encoder is missing, or there should be none.
        """
        file = _default() if str(path) == "default" else Path(path)
        try:
            with safe_open(file, "pt") as opened:
                card = json.loads((opened.metadata() or {})["card"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            if card.pop("schema") != SCHEMA:
                raise LoadError(f"{path}: schema {SCHEMA} is needed")
            features, states = dict(card.pop("features")), int(card["states"])
            configs = dict(card.pop("graphs", {}))
            about = card.pop("rewriter", None)
            rewriter = about and RewriteHead.of(about["features"], about["config"], _under(_REWRITER, tensors))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"{path}: no checkpoint of a pruner: {' '.join(str(error).split())}") from None
        predictors, graphs = {}, {}
        for sight, digest in features.items():
            schema = Schema.of(sight == DATA, states)
            if sight in configs:
                graphs[sight] = GraphHead.of(schema, configs[sight], _under(f"{_GRAPH}{sight}.", tensors))
                schema = schema.with_graph()
            if schema.digest != digest:
                raise LoadError(f"{path}: fitted on other features than this version of metaprune computes; fit again")
            predictors[sight] = Predictor.of(schema, _under(f"{sight}.", tensors))
        return MetaPruner(predictors, card, encoder, graphs, rewriter)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _default() -> Path:
    """The checkpoint that comes with metaprune, found in a source checkout and in an installed wheel alike."""
    try:
        file = Path(str(files(CHECKPOINTS))) / "default.safetensors"
    except ModuleNotFoundError:
        file = Path()
    if not file.is_file():
        raise LoadError("default: this installation comes without a checkpoint; make one with metaprune.fit")
    return file


def _about(encoded: Encoded) -> dict[str, Any]:
    sight = WEIGHTS if encoded.data is None else DATA
    return {
        "method": "metanetwork",
        "features": sight,
        "criterion": encoded.scores.criterion,
        "samples": encoded.scores.samples,
    }


def _budgets(encoded: Encoded, points: int) -> list[str]:
    posed: Posed = pose(encoded.graph, "macs=1", seed=encoded.seed)
    problem = posed.problem(encoded.scores)
    costs = posed.costs
    counts = problem.full(np.maximum(problem.minimum, np.ceil(_LEAST * problem.sizes).astype(np.int64))[None])
    least = costs.evaluate("macs", counts)[0] / max(costs.evaluate("macs", costs.sizes[None])[0], 1.0)
    low = min(_LARGEST, max(_LEAST, 1.02 * float(least)))
    return [f"macs={fraction!r}" for fraction in np.geomspace(low, _LARGEST, points).tolist()]
