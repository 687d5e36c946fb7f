"""Every error metaprune raises on purpose; each message names the operator, tensor or option at fault."""


class MetapruneError(Exception):
    """Base of all errors raised by metaprune."""


class OptionError(MetapruneError):
    """An option or argument has a value that means nothing here."""


def check_seed(seed: object) -> None:
    """Raises `OptionError` unless a seed is a whole number that the generators of torch and numpy both take."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise OptionError(f"seed: must be a whole number from 0 to 2^63 - 1, not {seed!r}")


class TraceError(MetapruneError):
    """A network could not be turned into a graph."""


class GraphError(MetapruneError):
    """A graph is malformed: a dangling reference, an unknown operator, a wrong shape."""


class PlanError(MetapruneError):
    """A plan does not fit the graph it is applied to."""


class BudgetInfeasible(MetapruneError):
    """A budget that no legal plan can reach.

    Attributes:
        attainable: The smallest kept fraction that can be reached.
    """

    def __init__(self, message: str, attainable: float) -> None:
        super().__init__(message)
        self.attainable = attainable


class NothingFound(MetapruneError):
    """A search in which no network could be judged."""


class CertificateError(MetapruneError):
    """A pruned network is not equal to the masked original, so it is not returned."""


class LoadError(MetapruneError):
    """A saved folder is truncated, inconsistent or hostile."""
