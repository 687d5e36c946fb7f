"""The graph metanetwork: a network that reads networks."""
