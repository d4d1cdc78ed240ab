import importlib
import os
import signal

# The tensors of the tests are small, and pytest runs one worker a core: threads would only wait for each other.
# In the environment, for what tests start as well. Whoever sets OMP_NUM_THREADS gets as many.
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
for library in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ.setdefault(library, THREADS)

import pytest  # noqa: E402
import torch  # noqa: E402

# In the background of a script SIGINT is ignored, and so it is in all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if THREADS.isdigit():
    torch.set_num_threads(int(THREADS))  # a plugin may have imported torch before

# What these register is for worker processes. Imported here it would be tested as if it were a method.
collect_ignore = ["pipeline_parts.py", "pipeline_driver.py", "pool_tasks.py"]


def pytest_sessionstart():
    # Tests are made for every method that is registered. Not earlier: the types are checked in what is imported
    # after the plugins are configured.
    esegeta = importlib.import_module("esegeta")
    assert all(hasattr(esegeta, name) for name in esegeta.__all__)


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_every_run():
    torch.manual_seed(0)
