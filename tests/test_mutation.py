"""The certificate must notice every wrong cut: mutants of correct ones, judged by an oracle of its own."""

from collections import Counter

import pytest

from tests.support.mutation import NODE_MUTATIONS, Patient
from tests.support.patients import PATIENTS, admit

MUTANTS = 60  # of each network; benchmarks/mutation.py judges all


@pytest.mark.parametrize("name", PATIENTS)
def test_no_wrong_cut_is_certified(name: str) -> None:
    patient = Patient(*admit(name), seed=3)
    assert patient.is_certified(), "the correct cut itself"
    mutants = list(patient.mutants())
    chosen = mutants[:: max(1, len(mutants) // MUTANTS)]
    verdicts = [patient.judge(mutant) for mutant in chosen]
    counts = Counter(verdict.outcome for verdict in verdicts)
    missed = [f"{v.mutant.kind}: {v.mutant.where} (error {v.error:.1e})" for v in verdicts if v.outcome == "missed"]
    assert not missed
    assert counts["caught"] + counts["error"] >= 0.3 * len(chosen), counts


def test_every_kind_of_mutation_applies_somewhere() -> None:
    kinds = {mutant.kind for name in PATIENTS for mutant in Patient(*admit(name), seed=3).mutants()}
    assert {kind for kind, _ in NODE_MUTATIONS} <= kinds
    assert {"alias untied", "scale left out", "unit swapped for a dropped one", "tensor missed: other order"} <= kinds
