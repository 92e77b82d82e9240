"""One thread: the test models are tiny, and threads that fight for two cores make them slower."""

import torch

torch.set_num_threads(1)
