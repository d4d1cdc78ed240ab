import os

import pytest
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_every_run():
    torch.manual_seed(0)
