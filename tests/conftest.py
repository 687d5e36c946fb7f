"""Settings and expensive fixtures shared by every test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from metaprune.metanet.zoo import Zoo

# Small networks run several times faster on one thread, and equal seeds then give equal bits.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Three members on digits: two architectures, the second also from early on; see `tests.support.small_zoo`."""
    from tests.support.small_zoo import built

    return built(tmp_path_factory.mktemp("zoo") / "a")
