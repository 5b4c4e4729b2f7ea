"""Do devices mix? Every method once more on a GPU, or on PyTorch/XLA's CPU backend: a device of another name, where a tensor that
was left behind raises. The numbers are those of the CPU.

XLA is optional: `pip install torch_xla`, with the torch of the same release, in an environment of its own. It compiles: minutes a method.
"""
import os
from importlib import import_module

import pytest
import torch

from test_methods import METHODS
from tiny import small

data = import_module("01_data")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")
os.environ.setdefault("PJRT_DEVICE", "CPU")
try:
    import torch_xla  # noqa: F401
except ImportError:
    torch_xla = None
OTHER = "cuda" if torch.cuda.is_available() else "xla" if torch_xla else None
pytestmark = pytest.mark.skipif(OTHER is None, reason="no GPU, and no torch_xla to stand in for one")


@pytest.fixture(scope="module", params=METHODS)
def both(request, world):
    """The same untrained method on the CPU and on the other device."""
    row = decoder.method_class(request.param).rows["voc"]
    fewer = {"static_maps": 2, "dynamic_maps": 2}  # there are three, and XLA does not cut a slice of more to that
    options = {what: None if value == "none" else value for what, value in (small(world) | fewer).items() if hasattr(row, what)}
    info, found = data.dataset_info(str(world)), []
    for device in ("cpu", OTHER):
        torch.manual_seed(0)
        found.append(decoder.new_method(request.param, info, options | {"long_side": 64}, torch.device(device)))
    try:
        found[0].ready()
    except data.DataError as error:
        pytest.skip(str(error))
    found[1].model.load_state_dict(found[0].model.state_dict())
    for method in found:
        method.model.eval()  # dropout draws other numbers on another device
    return found


def equal_nearly_everywhere(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and (a.cpu() == b.cpu()).float().mean() >= 0.999


def test_a_training_step_is_that_of_the_cpu(both):
    """Before and after every switch of the methods: the losses, and the gradient of each weight."""
    images, labels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    masks = None if both[0].rungs else torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    for step in (0, both[0].cfg.max_iters - 1):
        found = []
        for method in both:
            optimizer = train.make_optimizer(method.model, 0.0)
            found.append(train.train_step(method, optimizer, images.to(method.device), labels, step,
                                          masks if masks is None else masks.to(method.device)))
            if OTHER == "xla":
                torch_xla.sync()  # else each gradient is worked out anew when it is asked for
        assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
        for (name, ours), theirs in zip(both[0].model.named_parameters(), both[1].model.parameters()):
            if ours.grad is not None:
                assert (ours.grad - theirs.grad.cpu()).norm() <= 1e-3 * ours.grad.norm() + 1e-7, name


def test_the_ladder_and_several_scales_are_those_of_the_cpu(both):
    image, labels = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 0, 1])
    ours, theirs = (method.ladder(image.to(method.device), labels) for method in both)
    assert ours.labels.keys() == theirs.labels.keys()
    for rung in ours.labels:
        equal_nearly_everywhere(ours.labels[rung], theirs.labels[rung])
    for rung in ours.maps:
        torch.testing.assert_close(ours.maps[rung], theirs.maps[rung].cpu(), rtol=1e-3, atol=1e-4)
    ours, theirs = (method.logits(image.to(method.device), (1, 1.5)) for method in both)
    torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-3, atol=1e-4)
    equal_nearly_everywhere(*(cam.par_labels(image.to(found.device), found) for found in (ours, theirs)))


def test_a_batch_without_a_pair_is_no_special_case(both):
    """No class of the data set in any picture, as may happen on one of several GPUs."""
    if not both[0].rungs:
        pytest.skip("makes no labels")
    images, pairs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)), torch.zeros(0, 2, dtype=torch.long)
    found = []
    for method in both:
        seen = method.look(images.to(method.device), True, 0)
        with torch.no_grad():
            found.append(method.pseudo_labels(images.to(method.device), pairs, seen, method.network(seen), (64, 64), 0).labels)
    equal_nearly_everywhere(*found)
