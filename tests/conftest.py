"""One thread, because the test models are tiny and threads that fight for two cores are slower; and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
