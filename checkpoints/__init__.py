"""Weights that come with metaprune: `default.safetensors`, read by `MetaPruner.load("default")`, and its card."""
