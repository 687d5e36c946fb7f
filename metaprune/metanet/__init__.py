"""The metanetwork: it reads trained networks, and predicts what their units are worth and what pruning costs."""
