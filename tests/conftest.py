"""Our folder on the path, and one thread: the tensors here are small, and threads that wait for one another on a busy
machine make the tests ten times slower."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def pytest_configure(config):
    """openai-clip asks pkg_resources for torch's version, which warns; pytest resets the filter that 02_backbone sets."""
    config.addinivalue_line("filterwarnings", "ignore:pkg_resources is deprecated")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world of tiny.py; tests that change it work on a copy."""
    import tiny
    return tiny.make_world(tmp_path_factory.mktemp("somewhere") / "pictures with spaces ü")
