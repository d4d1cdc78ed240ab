import importlib
import os

import pytest
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # the workers share the cores

# What these register is for worker processes. Imported here it would be tested as if it were a method.
collect_ignore = ["pipeline_parts.py", "pipeline_driver.py", "pool_tasks.py"]


def pytest_sessionstart():
    # Tests are made for every method that is registered. Not earlier: the types are checked in what is imported
    # after the plugins are configured.
    importlib.import_module("esegeta._surface")


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_every_run():
    torch.manual_seed(0)
