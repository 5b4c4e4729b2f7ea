"""Does a training do what it says: the released schedule, checkpoints that resume, processes that share a batch?

The runs are real ones through the command line's `main`, on a made-up folder of pictures and on backbones with random
weights in the official formats, small enough for seconds.
"""
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tiny import CLASSES, arguments, logged, read

data = import_module("01_data")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")
infer = import_module("06_infer")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("method", ["weclip+", "weclip"])
def test_a_run_leaves_what_the_readme_says(world, tmp_path, method, capsys):
    """args.json, log.csv with a row per printed step, scores.csv, a preview, both checkpoints; then the next command."""
    train.main(arguments(world, tmp_path, "--max-iters", 2, "--method", method, "--eval-every", 1))
    said = capsys.readouterr().out
    assert f"06_infer.py {tmp_path / 'best.pt'}" in said and "tree house" in said
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}  # a lock
    assert left == {"args.json", "log.csv", "scores.csv", "preview", "best.pt", "last.pt"}
    assert [row["step"] for row in logged(tmp_path)] == ["1", "2"]
    settings = json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))
    assert settings["method"] == method and settings["config"]["max_iters"] == 2
    assert sorted(path.name for path in (tmp_path / "preview").iterdir()) == [
        "curves.png", "step_000000.png", "step_000001.png", "step_000002.png"]
    assert Image.open(tmp_path / "preview" / "step_000002.png").width > 8 * 200
    curves = np.asarray(Image.open(tmp_path / "preview" / "curves.png"))
    above, below = (half.reshape(-1, 3) for half in np.split(curves, 2))  # losses of the method, and its rungs

    def drawn(pixels):
        return sum(any((pixels == ImageColor.getrgb(colour)).all(axis=1)) for colour in train.CURVE_COLOURS)
    assert drawn(above) == (6 if method == "weclip+" else 3) and drawn(below) == 6
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
    assert (output / "preview" / "step_000000.png").exists()  # a panel all the same, without the truth


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
    method = decoder.restore(read(tmp_path), "last.pt", {}, "cpu")
    samples = data.list_samples(method.info, world, "val")
    matrix = np.zeros((4, 4))
    for sample in samples:
        pixels = data.normalize(data.load_image(sample.image))
        found = cam.enlarge(method.logits(pixels), pixels.shape[-2:]).argmax(0).numpy()
        for truth, prediction in zip(data.load_mask(sample.mask, 4).ravel(), found.ravel()):
            matrix[truth, prediction] += 1
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    with open(tmp_path / "scores.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["multi-scale"]) == pytest.approx(100 * iou.mean(), abs=0.006)


def test_along_the_way_part_of_the_pictures_is_scored_and_all_at_the_end(world, tmp_path, monkeypatch):
    """best.pt is chosen by the same pictures each time; each picture counts once in the last scores."""
    scored, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda method, samples, *a: (
        scored.append([sample.name for sample in samples]) or evaluate(method, samples, *a)))
    train.main(arguments(world, tmp_path / "part", "--max-iters", 2, "--eval-every", 1, "--eval-images", 2))
    one, two, three, four = [sample.name for sample in data.list_samples(data.dataset_info(world), world, "val")]
    assert scored == [[one, four], [one, four], [two, three]]
    train.main(arguments(world, tmp_path / "all", "--max-iters", 2, "--eval-every", 1))
    last = [(tmp_path / run / "scores.csv").read_text().splitlines()[-1] for run in ("part", "all")]
    assert last[0] == last[1] and scored[3:] == [[one, two, three, four]] * 2


@pytest.fixture
def labels_learned_from(monkeypatch) -> list:
    """The labels that reach the losses, step by step."""
    seen, losses = [], decoder.WeCLIPPlus.losses
    monkeypatch.setattr(decoder.WeCLIPPlus, "losses", lambda *a: seen.append(a[2]) or losses(*a))
    return seen


def drawn_masks(samples) -> torch.Tensor:
    """The masks of the first epoch of a run with seed 0, all 8 pictures, cropped with them."""
    views = train.TrainDataset(samples, 4, 64, 0, with_masks=True)
    return torch.stack([views[t]["mask"] for t in range(8)]).long()


def test_with_masks_truth_the_true_masks_are_learned_from(world, tmp_path, labels_learned_from, monkeypatch):
    """The labels that reach the losses are the masks of the drawn views, no pseudo label is made, no prediction replaces one."""
    pseudo_labels = decoder.WeCLIP.pseudo_labels
    monkeypatch.setattr(decoder.WeCLIP, "pseudo_labels", lambda *a: (  # evaluation makes them, with step None
        pseudo_labels(*a) if len(a) == 6 else pytest.fail("made pseudo labels")))
    train.main(arguments(world, tmp_path, "--max-iters", 4, "--masks", "truth", "--self-label-after", 0))
    assert torch.equal(torch.cat(labels_learned_from), drawn_masks(data.list_samples(data.dataset_info(str(world)), world, "train")))
    assert read(tmp_path)["config"]["self_label_after"] is None and read(tmp_path)["masks"] == "truth"


@pytest.fixture
def classes_in_folders(world, tmp_path) -> Path:
    """The pictures of the world as cat/0.png, sofa/1.png, ...: each sub-folder is a class."""
    root = tmp_path / "in folders"
    for number in range(8):
        (root / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "images" / f"{number}.png", root / CLASSES[number % 3])
    return root


def run_on(root: Path, world: Path, output: Path, *options) -> None:
    train.main([str(root), *arguments(world, output, *options)[1:]])


def test_pseudo_labels_written_by_06_are_masks_to_learn_from(world, classes_in_folders, tmp_path, labels_learned_from):
    """Sub-folders keep their names on the way: cat/0.png is the mask of cat/0.png. 255 is left out."""
    run_on(classes_in_folders, world, tmp_path / "one", "--max-iters", 1)
    infer.main([str(tmp_path / "one" / "last.pt"), "--data-path", str(classes_in_folders), "--split", "train", "--cams",
                "--scales", "1", "--output-dir", str(tmp_path / "made"), "--device", "cpu"])
    masks = tmp_path / "made" / "pseudo_label"
    data.save_mask(masks / "cat" / "0.png", np.full((84, 70), 255, np.uint8))
    labels_learned_from.clear()
    run_on(classes_in_folders, world, tmp_path / "two", "--max-iters", 4, "--masks", masks)
    samples = data.list_samples(data.dataset_info(str(classes_in_folders)), classes_in_folders, "train")
    wanted = drawn_masks([replace(sample, mask=str(masks / f"{sample.name}.png")) for sample in samples])
    assert torch.equal(torch.cat(labels_learned_from), wanted) and (wanted == 255).any()
    assert read(tmp_path / "two")["masks"].startswith(f"{masks}, check sum ")

    data.save_mask(masks / "cat" / "0.png", np.zeros((84, 70), np.uint8))
    with pytest.raises(data.DataError, match=r"masks is .*made.*, check sum \w+, this run has .*made.*, check sum \w+\."):
        run_on(classes_in_folders, world, tmp_path / "two", "--max-iters", 5, "--masks", masks, "--resume")


def test_a_missing_mask_is_named_before_the_first_step(world, tmp_path):
    masks = shutil.copytree(world / "masks", tmp_path / "spoilt")
    (masks / "3.png").unlink()
    with pytest.raises(data.DataError, match="1 masks in .*spoilt missing: 3.png"):
        train.main(arguments(world, tmp_path / "run", "--max-iters", 4, "--masks", masks))


@pytest.mark.parametrize("spoil, message", [
    (lambda path: data.save_mask(path, np.zeros((5, 5), np.uint8)), "3.png: mask of (5, 5)"),
    (lambda path: data.save_mask(path, np.full((84, 70), 9, np.uint8)), "3.png: values [9] are no class; wanted 0..3"),
    (lambda path: path.write_bytes(b"no picture"), "3.png: cannot be read as a picture")])
def test_a_mask_that_cannot_be_learned_from_is_named_and_passed_over(world, tmp_path, spoil, message, capsys):
    """Once, however often its turn comes, and counted at the end."""
    masks = shutil.copytree(world / "masks", tmp_path / "spoilt")
    spoil(masks / "3.png")
    train.main(arguments(world, tmp_path / "run", "--max-iters", 9, "--masks", masks))
    said = capsys.readouterr().out
    assert said.count(message) == 1 and "1 training pictures were passed over, see above" in said


def test_the_old_name_of_masks_is_answered(world, tmp_path):
    with pytest.raises(data.DataError, match="--supervised is now --masks truth"):
        train.main(arguments(world, tmp_path, "--supervised"))


@pytest.mark.parametrize("method", decoder.HERE_ARE)
def test_every_number_of_a_row_is_an_option(method):
    """Under its own name, with `none` where it may be none, and as many numbers as it has."""
    row = decoder.method_class(method).rows["voc"]
    for field in fields(row):
        value, name = getattr(row, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, tuple):
            cases = [tuple(2 * number for number in value)]
        elif NoneType in get_args(field.type):
            cases = [7, None]
        else:
            cases = [{int: 7, float: 0.7, str: "x"}[type(value)]]
        for given in cases:
            words = map(str, given) if isinstance(given, tuple) else ["none" if given is None else str(given)]
            args = train.parse_args(["voc", "--method", method, name, *words])
            arrived = {"batch_size": args.batch_size} if field.name == "batch_size" else args.options
            assert arrived == {field.name: given}
    with pytest.raises(SystemExit):  # WeCLIP has no self-labels to begin with
        train.parse_args(["voc", "--method", "weclip", "--self-label-after", "7"])


NUMBERS = dict(lr=0.003, warmup=0, weight_decay=0.5, crop_size=32, scale_range=(0.9, 1.1), eval_every=3, eval_images=2,
               long_side=48, scales=(1.0,), crf_gaussian=(1.0, 2.0), crf_bilateral=(5.0, 6.0, 7.0), cam_skip=0,
               logit_scale_divisor=2.0, box_fraction=0.3, static_maps=2, dynamic_maps=1, dynamic_from=5, fuse_blocks=2,
               depth=1, affinity_radius=3)


@pytest.mark.parametrize("method, more", [("weclip", dict(box_fraction=None, fuse_blocks=None)),
                                          ("weclip+", dict(self_label_after=None, self_label_above=0.5))])
def test_the_numbers_that_are_given_reach_the_run_and_its_checkpoint(world, tmp_path, method, more):
    """The others are those of the row. Two that no other test would miss: how weights decay, and that nothing warms up."""
    given = NUMBERS | more
    words = [word for name, value in given.items() for word in (
        f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else ["none" if value is None else value]))]
    train.main(arguments(world, tmp_path, "--method", method, "--max-iters", 1, *words))
    row = decoder.method_class(method).rows["voc"]
    files = {what: str(world / file) for what, file in (("clip", "clip.pt"), ("dino", "dino.pth")) if hasattr(row, what)}
    checkpoint = read(tmp_path)
    assert checkpoint["config"] == asdict(row) | given | files | {"max_iters": 1, "batch_size": 2}
    assert checkpoint["optimizer"]["param_groups"][0]["weight_decay"] == 0.5 and logged(tmp_path)[0]["lr"] == "3.000e-03"


def test_the_columns_of_the_log_are_the_losses_of_the_method(world, tmp_path):
    for method, losses in (("weclip", ["seg", "aff"]), ("weclip+", ["seg", "aff", "mutual_clip", "mutual_dino", "dice"])):
        train.main(arguments(world, tmp_path / method, "--max-iters", 1, "--method", method))
        assert list(logged(tmp_path / method)[0]) == ["step", "lr", *losses, "total"]


@pytest.mark.parametrize("warmup, expected", [
    # t < W: lr (1 - (1 - t / W)(1 - 1e-6)); then lr (1 - t / T)
    (50, {0: 2e-9, 25: 1.000001e-3, 49: 1.96000004e-3, 50: 2e-3 * (1 - 50 / 30_000), 15_000: 1e-3, 29_999: 2e-3 / 30_000}),
    (200, {0: 2e-9, 25: 2.5000175e-4, 100: 1.000001e-3, 199: 1.99000001e-3, 200: 2e-3 * (1 - 200 / 30_000), 15_000: 1e-3}),
    (0, {0: 2e-3, 1: 2e-3 * (1 - 1 / 30_000), 29_999: 2e-3 / 30_000}),
])
def test_the_learning_rate_warms_up_and_falls_to_zero(warmup, expected):
    """The released schedule has 50 steps of warm-up, which is what is used unless told; relatives have others."""
    rates = {step: train.learning_rate(step, 2e-3, 30_000, warmup) for step in expected}
    assert rates == pytest.approx(expected, rel=1e-9)
    if warmup == 50:
        assert rates == {step: train.learning_rate(step, 2e-3, 30_000) for step in expected}


@pytest.mark.parametrize("warmup, expected", [
    # r(t) = lr / 100 + 0.99 lr (1 + cos(pi t / T)) / 2; times 1 - (1 - t / W)(1 - 1e-6) for t < W
    (0, {0: 1e-4, 10_000: 5.05e-5, 5_000: 1e-6 + 9.9e-5 * (2 + 2 ** 0.5) / 4, 20_000: 1e-6}),
    (2_000, {0: 1e-10, 1_000: (1e-6 + 9.9e-5 * (1 + 0.9876883405951378) / 2) * 0.5000005, 10_000: 5.05e-5}),  # cos(9 degrees)
])
def test_the_learning_rate_falls_along_a_cosine_which_the_warm_up_multiplies(warmup, expected):
    rates = {step: train.learning_rate(step, 1e-4, 20_000, warmup, "cosine") for step in expected}
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_step_is_adamws_own_at_the_rate_of_that_step():
    """The first step of AdamW has a closed form: w (1 - r d) - r g / (|g| + 1e-8), r the rate of the step, d the decay. The
    pseudo labels of the batch are what the loss is given; the values are those from before the step."""
    weight, gradient = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([0.4, -7.0, 0.0])
    network = torch.nn.ParameterList([weight.clone()])
    told = {}

    class Method:
        cfg = decoder.WeCLIPConfig(max_iters=1_000, lr=0.5, warmup=50)
        look = staticmethod(lambda images, for_labels, step, amp: images)
        network = staticmethod(lambda seen: seen.sum() * 0 + network[0])

        def pseudo_labels(self, images, pairs, seen, prediction, size, step):
            told.update(pairs=pairs.tolist(), size=tuple(size), step=step)
            return type("Rungs", (), {"labels": gradient})

        def losses(self, prediction, labels, step):
            return {"seg": prediction.sum(), "total": (prediction * labels).sum()}

    optimizer = train.make_optimizer(network, 1.0)
    values = train.train_step(Method(), optimizer, torch.ones(2, 3, 8, 9), torch.tensor([[0.0, 1], [1, 1]]), 600)
    assert values == pytest.approx({"seg": 1.5, "total": 15.2})
    assert told == {"pairs": [[0, 1], [1, 0], [1, 1]], "size": (8, 9), "step": 600}
    rate = 0.5 * (1 - 600 / 1_000)
    torch.testing.assert_close(network[0].detach(), weight * (1 - 0.01 * rate) - rate * gradient / (gradient.abs() + 1e-8))


def without_dropout(monkeypatch) -> None:
    """Its noise differs between one process and two."""
    build = decoder.WeCLIP.build
    monkeypatch.setattr(decoder.WeCLIP, "build", lambda *a: build(*a).apply(
        lambda m: setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout2d) else None))


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(world, tmp_path, monkeypatch):
    """Losses are ratios of sums over the whole batch, so sharing it among processes must not change a step.

    The classes of the images differ, so the share of background pixels does too: means taken per process would give
    other numbers. The last part shows that, on the first batch. The labels are true masks: sums in another order may flip
    a pixel of an arg-max, and there would be one in every pseudo label.
    """
    without_dropout(monkeypatch)
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import pytest, test_train; "
        "test_train.without_dropout(pytest.MonkeyPatch()); test_train.train.main()")
    one, two, halves = tmp_path / "one", tmp_path / "two", tmp_path / "halves"
    common = ["--method", "weclip", "--masks", "truth", "--max-iters", 20, "--eval-every", 20]
    train.main(arguments(world, one, *common, "-b", 4))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    str(tmp_path / "run.py"), *arguments(world, two, *common, "-b", 2)], check=True, capture_output=True)
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx({k: float(v) for k, v in theirs.items()}, abs=1e-5)
    ours, worst = read(two)["model"], 0
    for name, theirs in read(one)["model"].items():
        difference = (ours[name] - theirs).abs()
        if name.endswith("in_proj_bias"):  # a key bias has no true gradient; AdamW turns its rounding noise into steps
            difference[len(difference) // 3:2 * len(difference) // 3] = 0
        worst = max(worst, difference.max().item())
    print(f"weights differ by {worst:.1e}")
    assert worst < 1e-5

    train.main(arguments(world, halves, *common, "--max-iters", 2, "-b", 2))  # the first batch in two; no step is made
    mean = sum(float(row["total"]) for row in logged(halves)) / 2             # before the second: its rate is 2e-9
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
