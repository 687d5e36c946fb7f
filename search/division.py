"""Parts of a network that can be looked at alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from metaprune.search.evaluate import Fidelity
    from metaprune.search.ledger import Result


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: Where it ends.
        variables: Numbers of the variables that are of this part alone. With all others fixed, what they cost adds up
            over the parts.
        share: What an evaluation of it takes of one of the whole network, by their multiply-adds.
    """

    name: str
    variables: tuple[int, ...]
    share: float


class Division(Protocol):
    """A network in parts. A variable that several parts share, such as the width of a cut, is in none of them."""

    @property
    def parts(self) -> Sequence[Part]:
        """From the input to the output."""

    @property
    def forwards(self) -> float:
        """What looking at parts costs once, as forward passes of one sample through the dense network."""

    def measure(self, number: int, config: NDArray[np.int64], fidelity: Fidelity) -> Result:
        """One value: how far a part's output is from the dense part's, on the inputs that the dense network gives it.

        Args:
            number: Of the part.
            config: Levels, shape [variables]; those of other parts and shared ones are at their highest.
            fidelity: How much work goes into it.
        """
