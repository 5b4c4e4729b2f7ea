"""Our folder on the path, and one thread unless OMP_NUM_THREADS says more: the tensors here are small, and threads that wait
for one another on a busy machine make the tests ten times slower."""
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import golden

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def pytest_configure(config):
    """openai-clip asks pkg_resources for torch's version, which warns; pytest resets the filter that 02_backbone sets."""
    config.addinivalue_line("filterwarnings", "ignore:pkg_resources is deprecated")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny world of tiny.py; tests that change it work on a copy."""
    import tiny
    return tiny.make_world(tmp_path_factory.mktemp("somewhere") / "pictures with spaces ü")


@pytest.fixture(scope="session")
def clip_state():
    """A small CLIP as a state dict under OpenAI's names: 4 blocks of 2 heads, patch 8, native size 32 x 32."""
    layout = dict(width=128, layers=4, patch=8, resolution=32, text_width=64, text_layers=1, embed=32)
    return golden.clip_state_dict(layout, seed=3)


@pytest.fixture(scope="session")
def tower(clip_state):
    """The same as a model of OpenAI's own class, with lively random weights."""
    import clip
    return clip.model.build_model(dict(clip_state)).float().requires_grad_(False)


@pytest.fixture(scope="session")
def words():
    """Text features of 5 foreground classes and 3 background names, unit vectors that nobody had to encode."""
    vectors = F.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(6)), dim=1)
    return vectors[:5], vectors[5:]


@pytest.fixture
def shown():
    """Which of the 5 classes do two images show?"""
    return torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])


@pytest.fixture
def attention():
    """Attention maps (B=2, M=5, T=7, T=7) whose rows sum to one; the patch-to-patch part sums to less."""
    return torch.randn(2, 5, 7, 7, generator=torch.Generator().manual_seed(4)).mul(2).softmax(dim=-1)
