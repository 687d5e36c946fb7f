"""Many prunes in one process leave nothing behind; benchmarks/soak.py does a thousand."""

import sys

import pytest

from tests.support.soak import growth, soak


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_sixty_prunes_leave_nothing_behind() -> None:
    samples = list(soak(prunes=60, every=10))
    warm = [s for s in samples if s.prunes >= 20]
    assert {s.graphs for s in warm} == {warm[0].graphs}, "graphs stay alive"
    assert {s.nodes for s in warm} == {warm[0].nodes}, "nodes stay alive"
    assert warm[-1].objects <= 1.05 * warm[0].objects
    assert growth(samples, warm_up=20) <= 0.10  # a short run is not yet level
