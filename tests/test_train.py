"""Does a training do what it says: the released schedule, checkpoints that resume, processes that share a batch?

The runs are real ones through the command line's `main`, on a made-up folder of pictures and on backbones with random
weights in the official formats, small enough for seconds.
"""
import csv
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import arguments, logged, read

data = import_module("01_data")
decoder = import_module("04_decoder")
train = import_module("05_train")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("method", ["weclip+", "weclip"])
def test_a_run_leaves_what_the_readme_says(world, tmp_path, method, capsys):
    """args.json, log.csv with a row per printed step, scores.csv, a preview, both checkpoints; then the next command."""
    train.main(arguments(world, tmp_path, "--max-iters", 2, "--method", method, "--eval-every", 1))
    said = capsys.readouterr().out
    assert f"06_infer.py {tmp_path / 'best.pt'}" in said and "tree house" in said
    assert {p.name for p in tmp_path.iterdir()} == {"args.json", "log.csv", "scores.csv", "preview", "best.pt", "last.pt"}
    assert [row["step"] for row in logged(tmp_path)] == ["1", "2"]
    assert json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))["config"]["method"] == method
    assert Image.open(tmp_path / "preview" / "step_000002.png").width > 6 * 200
    checkpoint = read(tmp_path)
    assert checkpoint["step"] == 2 and not any("visual" in name for name in checkpoint["model"])  # no frozen weights in it


def test_the_score_of_the_last_evaluation_is_that_of_the_predictions(world, tmp_path):
    """scores.csv against a loop of one's own over the checkpoint's predictions."""
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    info, cfg, encoders, model = decoder.restore(read(tmp_path), "last.pt", None, None, "cpu")
    samples = data.list_samples(info, world, "val")
    matrix = np.zeros((4, 4))
    for sample in samples:
        pixels = data.normalize(data.load_image(sample.image))
        found = decoder.multi_scale_logits(cfg, encoders, model, pixels).argmax(0).numpy()
        for truth, prediction in zip(data.load_mask(sample.mask, 4).ravel(), found.ravel()):
            matrix[truth, prediction] += 1
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    with open(tmp_path / "scores.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["multi-scale"]) == pytest.approx(100 * iou.mean(), abs=0.006)


def test_two_and_two_steps_are_four_steps_bit_for_bit(world, tmp_path):
    """A run that stops and resumes goes the same way as one that does not: weights, optimiser and log."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main(arguments(world, whole, "--max-iters", 4, "--eval-every", 2))
    first = train.parse_args(arguments(world, halves, "--max-iters", 4, "--eval-every", 2))
    stopped = StopAfter(2)
    train.run(first, torch.device("cpu"), stopped)
    assert read(halves)["step"] == 2
    train.main(arguments(world, halves, "--max-iters", 4, "--eval-every", 2, "--resume", "-j", 2))
    assert logged(halves) == logged(whole)
    ours, theirs = read(halves), read(whole)
    for name in theirs["model"]:
        assert torch.equal(ours["model"][name], theirs["model"][name]), name
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["exp_avg_sq"], state["exp_avg_sq"])


class StopAfter:
    """Asks for a stop after some steps, as SIGTERM would."""

    def __init__(self, steps: int):
        self.asked, self.steps = 0, steps

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked > 2 * (self.steps - 1)  # the loop asks twice a step


def test_resuming_with_another_method_or_class_list_is_refused(world, tmp_path):
    """Weights of another run would train on in silence; the message names both sides."""
    train.main(arguments(world, tmp_path, "--max-iters", 1, "--method", "weclip"))
    with pytest.raises(data.DataError, match="method is weclip, this run has weclip+"):
        train.main(arguments(world, tmp_path, "--max-iters", 2, "--resume"))


def test_supervised_training_learns_from_the_true_masks(world, tmp_path, monkeypatch):
    """The labels that reach the losses are the masks of the drawn views, and no pseudo label is made."""
    seen, losses = [], decoder.losses
    monkeypatch.setattr(decoder, "losses", lambda *a: seen.append(a[3]) or losses(*a))
    label_images = decoder.label_images
    monkeypatch.setattr(decoder, "label_images", lambda *a, **k: (
        pytest.fail("made pseudo labels") if len(seen) < 2 else label_images(*a, **k)))  # evaluation makes them
    train.main(arguments(world, tmp_path, "--max-iters", 2, "--supervised"))
    info = data.dataset_info(str(world))
    views = data.TrainDataset(data.list_samples(info, world, "train"), info.num_classes, 64, 0, with_masks=True)
    drawn = torch.stack([views[t]["mask"] for t in range(4)]).long()
    assert torch.equal(torch.cat(seen), drawn)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(world, tmp_path, monkeypatch):
    """The weights from before the bad step are kept."""
    def poisoned(*_):
        return {"seg": torch.tensor(float("nan")), "aff": torch.tensor(0.0), "total": torch.tensor(float("nan"))}
    monkeypatch.setattr(decoder, "losses", poisoned)
    with pytest.raises(data.DataError, match="loss is nan; images of the batch: [0-9], [0-9]"):
        train.main(arguments(world, tmp_path, "--max-iters", 2))
    assert all(weight.isfinite().all() for weight in read(tmp_path)["model"].values())


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(world, tmp_path):
    """Losses are ratios of sums over the whole batch, so sharing it among processes must not change a step.

    Dropout is off: its noise differs between one process and two. The classes of the images differ, so the share of
    background pixels does too: means taken per process would give other numbers.
    """
    script = ("import sys; from importlib import import_module; sys.path.insert(0, sys.argv.pop(1)); import torch; "
              "train = import_module('05_train'); decoder = import_module('04_decoder'); torch.set_num_threads(1); "
              "build = decoder.build_model; "
              "decoder.build_model = lambda *a: build(*a).apply(lambda m: setattr(m, 'p', 0.0) "
              "if isinstance(m, torch.nn.Dropout2d) else None); train.main(sys.argv[1:])")
    (tmp_path / "run.py").write_text(script)
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--max-iters", 5, "--eval-every", 5]
    command = [str(tmp_path / "run.py"), str(ROOT)]
    subprocess.run([sys.executable, *command, *arguments(world, one, *common, "-b", 4)], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command,
                    *arguments(world, two, *common, "-b", 2)], check=True, capture_output=True)
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert {k: float(v) for k, v in ours.items() if v} == pytest.approx({k: float(v) for k, v in theirs.items() if v}, abs=1e-5)
    ours = read(two)["model"]
    for name, theirs in read(one)["model"].items():
        difference = (ours[name] - theirs).abs()
        if name.endswith("in_proj_bias"):  # a key bias has no true gradient; AdamW turns its rounding noise into steps
            difference[len(difference) // 3:2 * len(difference) // 3] = 0
        assert difference.max() < 1e-5, name
    assert (one / "scores.csv").read_text() == (two / "scores.csv").read_text()


def test_the_checkpoint_of_05_is_read_by_06_in_another_process(world, tmp_path):
    """The last line of a training is a command that works."""
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    done = subprocess.run([sys.executable, str(ROOT / "06_infer.py"), str(tmp_path / "best.pt"), "--data-path", str(world),
                           "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "val" / "predictions").glob("*.png"))) == 4


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("0*.py")))
def test_help_needs_no_data_and_works_from_another_folder(file, tmp_path):
    """And it says nothing else: no warnings of packages."""
    done = subprocess.run([sys.executable, str(ROOT / file), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("usage: ") and "python " + file in done.stdout
