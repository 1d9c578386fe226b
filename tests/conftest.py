"""Settings of every test run."""

import torch

# The problems are small: with more threads than idle cores they take ten times as long.
torch.set_num_threads(1)
