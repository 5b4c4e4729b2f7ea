"""Does a training do what it says: the released schedule, checkpoints that resume, processes that share a batch?

The runs are real ones through the command line's `main`, on a made-up folder of pictures and on backbones with random
weights in the official formats, small enough for seconds.
"""
import csv
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tiny import arguments, logged, read

data = import_module("01_data")
decoder = import_module("04_decoder")
train = import_module("05_train")

ROOT = Path(__file__).resolve().parents[1]


def test_tensorboard_gets_the_numbers_of_the_csv_files(tmp_path):
    """Where it is installed; a resumed run takes back what it will make again."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (0, 2):
        log, scores = train.open_output(tmp_path, {}, {"step": start, "evaluated": start})
        for step in range(start + 1, start + 5):
            log.write(step=step, total="1.5")
            scores.write(step=step, CAM=f"{10 * start + step}")
        log.board.close()
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("scores/CAM")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25), (6, 26)]
    assert [e.value for e in events.Scalars("log/total")] == [1.5] * 6


@pytest.mark.parametrize("method", ["weclip+", "weclip"])
def test_a_run_leaves_what_the_readme_says(world, tmp_path, method, capsys):
    """args.json, log.csv with a row per printed step, scores.csv, a preview, both checkpoints; then the next command."""
    train.main(arguments(world, tmp_path, "--max-iters", 2, "--method", method, "--eval-every", 1))
    said = capsys.readouterr().out
    assert f"06_infer.py {tmp_path / 'best.pt'}" in said and "tree house" in said
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")}  # tensorboard's, where it is installed
    assert left == {"args.json", "log.csv", "scores.csv", "preview", "best.pt", "last.pt"}
    assert [row["step"] for row in logged(tmp_path)] == ["1", "2"]
    assert json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))["config"]["method"] == method
    assert Image.open(tmp_path / "preview" / "step_000002.png").width > 6 * 200
    curves = np.asarray(Image.open(tmp_path / "preview" / "curves.png")).reshape(-1, 3)
    drawn = sum(any((curves == ImageColor.getrgb(colour)).all(axis=1)) for colour in train.CURVE_COLOURS)
    assert drawn == (6 if method == "weclip+" else 5)  # losses of the method, and five rungs
    checkpoint = read(tmp_path)
    assert checkpoint["step"] == 2 and not any("visual" in name for name in checkpoint["model"])  # no frozen weights in it


def test_a_run_without_masks_shows_its_losses_and_a_command_that_works(world, tmp_path, capsys):
    """Nothing can be scored then: the last checkpoint is for pictures."""
    copy, output = shutil.copytree(world, tmp_path / "copy"), tmp_path / "run"
    shutil.rmtree(copy / "masks")
    train.main(arguments(copy, output, "--max-iters", 1))
    said = capsys.readouterr().out
    assert "nothing is scored: none of 4 images of val has a mask" in said
    assert said.endswith(f"06_infer.py {output / 'last.pt'} PICTURE\n") and (output / "preview" / "curves.png").exists()


def test_a_checkpoint_by_name_is_resumed_in_its_own_folder_and_in_no_other_runs(world, tmp_path, monkeypatch):
    """In a new folder the run goes on as well, and has a best.pt there too."""
    monkeypatch.chdir(tmp_path)

    def started(*options):
        argv = arguments(world, Path("unused"), *options)
        where = argv.index("--output-dir")
        train.main(argv[:where] + argv[where + 2:])

    home = Path("runs") / f"{world.name}-weclip+"
    started("--max-iters", 1)
    started("--max-iters", 1)  # a second run, in a folder of its own
    started("--max-iters", 2, "--resume", f"{home}-2/last.pt", "--output-dir", str(Path(f"{home}-2").resolve()))
    started("--max-iters", 3, "--resume", f"{home}-2/last.pt")
    assert [read(folder)["step"] for folder in (home, Path(f"{home}-2"))] == [1, 3]
    with pytest.raises(data.DataError, match="holds a run already"):
        started("--max-iters", 4, "--resume", f"{home}-2/last.pt", "--output-dir", str(home))
    started("--max-iters", 4, "--resume", f"{home}-2/last.pt", "--output-dir", "new")
    assert read(Path("new"))["step"] == read(Path("new"), "best.pt")["step"] == 4


def test_the_score_of_the_last_evaluation_is_that_of_the_predictions(world, tmp_path):
    """scores.csv against a loop of one's own over the checkpoint's predictions."""
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    info, cfg, encoders, model = decoder.restore(read(tmp_path), "last.pt", None, None, "cpu")
    samples = data.list_samples(info, world, "val")
    matrix = np.zeros((4, 4))
    for sample in samples:
        pixels = data.normalize(data.load_image(sample.image))
        logits = decoder.multi_scale_logits(cfg, encoders, model, pixels)
        found = decoder.enlarge(logits, pixels.shape[-2:]).argmax(0).numpy()
        for truth, prediction in zip(data.load_mask(sample.mask, 4).ravel(), found.ravel()):
            matrix[truth, prediction] += 1
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    with open(tmp_path / "scores.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["multi-scale"]) == pytest.approx(100 * iou.mean(), abs=0.006)


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


def without_dropout(monkeypatch) -> None:
    """Its noise differs between one process and two."""
    build = decoder.build_model
    monkeypatch.setattr(decoder, "build_model", lambda *a: build(*a).apply(
        lambda m: setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout2d) else None))


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(world, tmp_path, monkeypatch):
    """Losses are ratios of sums over the whole batch, so sharing it among processes must not change a step.

    The classes of the images differ, so the share of background pixels does too: means taken per process would give
    other numbers. The last part shows that, on the first batch.
    """
    without_dropout(monkeypatch)
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import pytest, test_train; "
        "test_train.without_dropout(pytest.MonkeyPatch()); test_train.train.main()")
    one, two, halves = tmp_path / "one", tmp_path / "two", tmp_path / "halves"
    common = ["--max-iters", 20, "--eval-every", 20]
    train.main(arguments(world, one, *common, "-b", 4))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(tmp_path / "run.py"), *arguments(world, two, *common, "-b", 2)], check=True, capture_output=True)
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert {k: float(v) for k, v in ours.items() if v} == pytest.approx({k: float(v) for k, v in theirs.items() if v}, abs=1e-5)
    ours, worst = read(two)["model"], 0
    for name, theirs in read(one)["model"].items():
        difference = (ours[name] - theirs).abs()
        if name.endswith("in_proj_bias"):  # a key bias has no true gradient; AdamW turns its rounding noise into steps
            difference[len(difference) // 3:2 * len(difference) // 3] = 0
        worst = max(worst, difference.max().item())
    print(f"weights differ by {worst:.1e}")
    assert worst < 1e-5
    assert (one / "scores.csv").read_text() == (two / "scores.csv").read_text()

    train.main(arguments(world, halves, "--max-iters", 2, "-b", 2))  # the first batch in two; no step is made before
    mean = sum(float(row["total"]) for row in logged(halves)) / 2    # the second: the rate of the first is 2e-9
    assert abs(mean - float(logged(two)[0]["total"])) > 1e-3


def test_the_checkpoint_of_05_is_read_by_06_in_another_process(world, tmp_path):
    """The last line of a training is a command that works."""
    train.main(arguments(world, tmp_path, "--max-iters", 1))
    done = subprocess.run([sys.executable, str(ROOT / "06_infer.py"), str(tmp_path / "best.pt"), "--data-path", str(world),
                           "--device", "cpu"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "val" / "predictions").glob("*.png"))) == 4


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("0*.py")))
def test_help_needs_no_data_and_works_from_another_folder(file, tmp_path):
    """And it fits a screen, shows the commands to start with, and says nothing else: no warnings of packages."""
    done = subprocess.run([sys.executable, str(ROOT / file), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("usage: ") and "python " + file in done.stdout
    assert len(done.stdout.splitlines()) < 45 and max(map(len, done.stdout.splitlines())) <= 125
