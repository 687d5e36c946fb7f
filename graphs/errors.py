"""Every error metaprune raises on purpose; each message names the operator, tensor or option at fault."""


class MetapruneError(Exception):
    """Base of all errors raised by metaprune."""


class OptionError(MetapruneError):
    """An option or argument has a value that means nothing here."""


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


class CertificateError(MetapruneError):
    """A pruned network is not equal to the masked original, so it is not returned."""


class LoadError(MetapruneError):
    """A saved folder is truncated, inconsistent or hostile."""
