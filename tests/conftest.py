"""Settings shared by every test."""

import torch

# Small networks run several times faster on one thread, and equal seeds then give equal bits.
torch.set_num_threads(1)
