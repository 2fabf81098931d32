import torch
from hypothesis import settings

# The same examples in every run, on any machine: a failure in CI is a failure at home.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("repeatable")
torch.set_num_threads(1)
