"""The metanetwork: a zoo of measured networks, and what is learned from it about pruning others."""
