"""Does every method keep the contract of the house? Those of 04_decoder, and each file of methods/ that defines METHOD.

A file dropped into methods/ is picked up by itself, here and by 05 and 06; removing the method is removing the file.
"""
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tiny import arguments, read, small

data = import_module("01_data")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")
infer = import_module("06_infer")

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "methods").glob("[a-z]*.py"))
METHODS = [*decoder.HERE_ARE, *(name for name in FILES if hasattr(import_module(f"methods.{name}"), "METHOD"))]


@pytest.fixture(scope="module", params=METHODS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def method(name, world):
    """An untrained method on the towers of the tiny world."""
    torch.manual_seed(0)
    row = decoder.method_class(name).rows["voc"]
    options = {what: None if value == "none" else value for what, value in small(world).items() if hasattr(row, what)}
    found = decoder.new_method(name, data.dataset_info(str(world)), options | {"long_side": 64}, "cpu")
    needs_what_it_needs(found)
    return found


def needs_what_it_needs(method):
    """A test of a method whose training lacks an optional package is skipped, with the method's own words."""
    try:
        method.ready()
    except data.DataError as error:
        pytest.skip(str(error))


def trained(method) -> list[torch.nn.Parameter]:
    """All that has a say in the loss; what a method with labels of its own has is trained to the last number."""
    parameters = list(method.model.parameters())
    assert not method.rungs or all(p.requires_grad for p in parameters)
    return [p for p in parameters if p.requires_grad]


def not_trained(method) -> list[torch.nn.Parameter]:
    """The frozen encoders, and parts of the trained one that keep their start values."""
    frozen = [p for model in method.frozen.values() for p in model.parameters()]
    assert not any(p.requires_grad for p in frozen)
    return [*frozen, *(p for p in method.model.parameters() if not p.requires_grad)]


def test_the_stages_have_the_shapes_of_the_interface(method):
    """Two images of 4 x 5 patches that show classes 0 and 2, and 1."""
    images = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    pairs = torch.tensor([[0, 0], [0, 2], [1, 1]])
    method.model.eval()
    seen = method.look(images, True, 0)
    prediction = method.network(seen)
    assert prediction.logits.shape[:2] == (2, 4) and seen.grid == (4, 5)
    if not method.rungs:  # it makes no labels; those that it is given may leave pixels out
        labels = torch.randint(0, 4, (2, 64, 80), generator=torch.Generator().manual_seed(2))
        labels[:, :9] = 255
        losses = method.losses(prediction, labels, 0)
        assert all(loss.ndim == 0 for loss in losses.values()) and losses["total"].isfinite()
        return
    assert method.text_fg.shape[0] == 3
    for step, known in ((0, prediction), (10**6, prediction), (None, prediction), (None, None)):
        cams, maps = method.cams(seen, known, pairs, step)
        assert cams.shape == method.sources(cams, known, pairs, step).shape == (3, 4, 5)
        assert maps.shape[0] == 2 and maps.shape[2:] == (21, 21) and method.affinity(maps, known, step).shape == (2, 20, 20)
        found = method.pseudo_labels(images, pairs, seen, known, (50, 70), step)
        assert found.cams.shape == found.flow.shape == (3, 4, 5) and 0 <= found.cams.min() and found.cams.max() <= 1
        assert found.transition.shape == (2, 20, 20) and found.maps.shape == (3, 50, 70) and found.scores.shape == (2, 3, 50, 70)
        assert found.labels.shape == (2, 50, 70) and found.labels.dtype == torch.long
        assert set(found.labels[0].unique().tolist()) <= {0, 1, 3} and set(found.labels[1].unique().tolist()) <= {0, 2}
    losses = method.losses(prediction, found.labels, 0)
    assert all(loss.ndim == 0 for loss in losses.values()) and losses["total"].isfinite()


def test_the_loss_trains_all_that_is_trained_and_nothing_frozen(method):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    method.model.zero_grad()
    method.losses(method.network(method.look(images, False, 10**6)), labels, 10**6)["total"].backward()
    assert trained(method) and all(p.grad is not None and p.grad.isfinite().all() for p in trained(method))
    assert all(p.grad is None for p in not_trained(method))


def test_a_step_leaves_the_frozen_as_they_were(method):
    """It makes its own labels, or is given some. Gradients of the CAM and of prompts go through frozen weights; none may stay
    there, and no weight may move."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    masks = None if method.rungs else torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    weights = [*(tensor for model in method.frozen.values() for tensor in model.state_dict().values()), *not_trained(method)]
    before = [tensor.clone() for tensor in weights]
    method.model.train()
    for step in (0, 10**6):
        optimizer = train.make_optimizer(method.model, 0.0)
        values = train.train_step(method, optimizer, images, torch.tensor([[1.0, 0, 1], [0, 1, 0]]), step, masks)
        assert values["total"] > 0 and all(p.grad is not None for p in trained(method))
        assert all(p.grad is None for p in not_trained(method))
        assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))


def test_a_picture_has_a_ladder_and_logits(method):
    image = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(3))
    method.model.eval()
    found = method.ladder(image, torch.tensor([1.0, 0, 1]))
    assert list(found.labels) == [*method.rungs, "segmentation"]
    assert len(found.maps) == (2 if method.rungs else 0)
    assert all(labels.shape == (40, 60) for labels in found.labels.values())
    assert all(maps.shape == (2, 40, 60) for maps in found.maps.values())
    logits = method.logits(image, (1, 1.5))
    assert logits.shape[0] == 4 and logits.isfinite().all()


def run(folder: Path, script: str, *argv) -> str:
    done = subprocess.run([sys.executable, str(folder / script), *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_of_05_leaves_a_checkpoint_that_06_reads(name, method, world, tmp_path):
    """Both as users start them, in processes of their own."""
    masks = () if method.rungs else ("--masks", "truth")
    run(ROOT, "05_train.py", *arguments(world, tmp_path, "--method", name, "--max-iters", 1, *masks))
    assert read(tmp_path)["method"] == name
    run(ROOT, "06_infer.py", tmp_path / "best.pt", "--data-path", world, "--device", "cpu")
    assert len(list((tmp_path / "val" / "predictions").glob("*.png"))) == 4


def test_what_makes_no_labels_says_so_where_labels_are_asked_for(name, method, world, tmp_path):
    """05 without masks, before anything is read or written; 06 --cams; the demo of 04, whose subject they are."""
    if method.rungs:
        return
    with pytest.raises(data.DataError, match=f"{name} makes no labels of its own; .*--masks DIR"):
        train.main(arguments(world, tmp_path / "run", "--method", name))
    assert not (tmp_path / "run").exists()
    train.main(arguments(world, tmp_path / "run", "--method", name, "--max-iters", 1, "--masks", "truth"))
    with pytest.raises(data.DataError, match=f"last.pt: {name} makes no CAMs and pseudo labels"):
        infer.main([str(tmp_path / "run" / "last.pt"), "--cams", "--data-path", str(world), "--device", "cpu"])
    with pytest.raises(data.DataError, match=f"{name} makes no labels"):
        decoder.main(["--method", name])


@pytest.mark.parametrize("file", [name for name in FILES if "__main__" in (ROOT / f"methods/{name}.py").read_text("utf-8")])
def test_each_file_of_methods_that_runs_says_how_it_is_used(file):
    assert f"methods/{file}.py" in run(ROOT / "methods", f"{file}.py", "--help")


# ------------------------------------------------------------------------------------------------------------ the lookup

NEW_METHOD = '''
from dataclasses import dataclass
from importlib import import_module
decoder = import_module("04_decoder")

@dataclass(frozen=True)
class Config(decoder.WeCLIPConfig):
    times: int = 1  # how much the losses count

class METHOD(decoder.WeCLIP):
    rows = {"voc": Config()}
    def losses(self, prediction, labels, step):
        return {name: self.cfg.times * loss for name, loss in super().losses(prediction, labels, step).items()}
'''


@pytest.fixture
def copied(tmp_path) -> Path:
    """The project without its tests, to add a method to."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in [*ROOT.glob("0*.py"), ROOT / "methods", ROOT / "shapes"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder


def test_a_file_dropped_into_methods_is_a_method(copied, world, tmp_path):
    """05 and 06 find it by its name, and its numbers are options. When the file is gone, so is the method."""
    (copied / "methods" / "stronger.py").write_text(NEW_METHOD)
    command = ["--clip", world / "clip.pt", "--crop-size", 64, "--long-side", 64, "-b", 2, "-j", 0, "--device", "cpu",
               "--max-iters", 1, "--print-freq", 1]
    for times in (1, 3):
        run(copied, "05_train.py", world, *command, "--method", "stronger", "--times", times, "--output-dir", tmp_path / str(times))
    checkpoints = read(tmp_path / "1"), read(tmp_path / "3")
    assert [c["config"]["times"] for c in checkpoints] == [1, 3] and checkpoints[1]["method"] == "stronger"
    totals = [float((tmp_path / n / "log.csv").read_text().split()[-1].split(",")[4]) for n in ("1", "3")]
    assert totals[1] == pytest.approx(3 * totals[0], rel=1e-5)
    assert "--times" in run(copied, "05_train.py", "--method", "stronger", "--help")
    reading = ["06_infer.py", tmp_path / "3" / "last.pt", "--data-path", world, "--device", "cpu"]
    assert "stronger, trained on folder for 1 steps" in run(copied, *reading)
    (copied / "methods" / "stronger.py").unlink()
    done = subprocess.run([sys.executable, *map(str, (copied / reading[0], *reading[1:]))], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no method 'stronger'; wanted one of weclip+, weclip")


@pytest.mark.parametrize("method", ["unheard_of", "../evil", "os", "__init__", "methods.excel", "", "weclip.py"])
def test_a_name_that_is_no_file_of_methods_imports_nothing(world, method, tmp_path, monkeypatch):
    """It may come from the command line or from a checkpoint of others."""
    monkeypatch.setattr(decoder, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(data.DataError, match="no method .*; wanted one of weclip\\+, weclip"):
        decoder.method_class(method)
    with pytest.raises(data.DataError, match="no method "):
        decoder.restore(dict.fromkeys(decoder.CHECKPOINT) | {"method": method}, "foreign.pt", {}, "cpu")


@pytest.mark.parametrize("method", ["os", "../evil", "__init__", "methods.clip_es"])
def test_a_hostile_checkpoint_is_refused_by_both_commands_before_anything_is_imported(method, tmp_path, monkeypatch):
    path = tmp_path / "foreign.pt"
    torch.save({key: kind() for key, kind in decoder.CHECKPOINT.items()} | {"method": method}, path)
    monkeypatch.setattr(decoder, "import_module", lambda name: pytest.fail(f"imported {name}"))
    for main, argv in ((infer.main, [str(path), "x.png"]), (train.main, ["--resume", str(path)])):
        with pytest.raises(data.DataError, match="no method .*; wanted one of weclip\\+, weclip"):
            main([*argv, "--device", "cpu"])


def test_a_file_that_trains_nothing_says_how_it_is_run(copied):
    (copied / "methods" / "only_looks.py").write_text("")
    done = subprocess.run([sys.executable, str(copied / "05_train.py"), "shapes", "--method", "only_looks"], capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr == "error: only_looks trains nothing; run it by itself: python methods/only_looks.py --help\n"
