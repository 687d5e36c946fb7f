"""A guess at objectives that are not measured yet: regression on what every variable takes away."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from metaprune.search.space import Configs

Values = NDArray[np.float64]

_PENALTY = 3.0  # of standardised coefficients
_TINY = 1e-12


class Regression:
    """Objectives as a curve in what all variables take away together, and what each does apart from that.

    With g the shares that are taken away by variable, an objective is a polynomial of the means of g and of g^2, fitted
    by least squares, plus what is linear in every g and g^2, fitted to the rest by ridge regression: few evaluations
    tell that all variables are alike, more of them where they differ.
    """

    def __init__(self, levels: NDArray[np.int64], configs: Configs, values: Values) -> None:
        """Fits.

        Args:
            levels: Number of levels of each variable, shape [variables].
            configs: What was measured, shape [n, variables], n at least 1.
            values: Its objectives, finite, shape [n, objectives].
        """
        self._top = np.maximum(levels - 1, 1)
        features = self._features(configs)
        self._mean, self._scale = features.mean(0), features.std(0) + _TINY
        common = self._common(features)
        self._base = np.linalg.lstsq(common, values, rcond=None)[0]
        rest = values - common @ self._base
        standard = (features - self._mean) / self._scale
        gram = standard.T @ standard + _PENALTY * np.eye(standard.shape[1])
        self._own = np.linalg.solve(gram, standard.T @ rest)

    def __call__(self, configs: Configs) -> Values:
        """Guesses for configurations, shape [n, variables]; shape [n, objectives]."""
        features = self._features(configs)
        standard = (features - self._mean) / self._scale
        guesses: Values = self._common(features) @ self._base + standard @ self._own
        return guesses

    def _features(self, configs: Configs) -> Values:
        gone = 1 - configs / self._top
        return np.concatenate([gone, gone**2], axis=1)

    def _common(self, features: Values) -> Values:
        count = features.shape[1] // 2
        line, square = features[:, :count].mean(1), features[:, count:].mean(1)
        return np.stack([np.ones_like(line), line, square, square**2], axis=1)
