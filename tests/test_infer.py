"""Does 06 say what the network sees, at the size of the picture, and count it right?

A checkpoint with random weights, and files of the frozen backbones in the official layouts, are written first; 06 is
then run as its users run it: on pictures, on a folder of one's own, on a small VOC. What it should give comes from slow
loops over the PNGs it left, from a plain forward of the network, and from the picture turned or mirrored.
"""
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import golden

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
infer = import_module("06_infer")

TINY = dict(width=128, layers=4, patch=8, resolution=32, text_width=64, text_layers=1, embed=32)
CLASSES = ("ant", "bee", "cow")
CONFIG = decoder.WeCLIPPlusConfig(static_maps=3, dynamic_maps=3, cam_skip=0, long_side=48, scales=(1.0, 1.5))


def write_checkpoint(folder, dataset, classes, name):
    """What 05 leaves, with random weights; the biases are such that most pictures below show several classes."""
    clip_file, dino_file = folder / "clip.pt", folder / "dino.pth"
    if not clip_file.exists():
        torch.save(golden.clip_state_dict(TINY, seed=1), clip_file)
        torch.save(golden.dino_state_dict(golden.DINO_LAYOUTS["tiny"], seed=1), dino_file)
    biases = {0: 2.2, 1: 1.3, 2: 0.7, 3: -0.6}
    weights = golden.head_state_dict(2, 128, 1 + len(classes), 1, 96, pred_gain=3.0, pred_bias_offsets=biases)
    cfg = decoder.replace(CONFIG, clip=str(clip_file), dino=str(dino_file))
    frozen = decoder.frozen_names(cfg, decoder.WeCLIPPlus.load(cfg, "cpu"))
    torch.save({"model": weights, "config": asdict(cfg), "method": "weclip+", "dataset": dataset, "step": 7, "frozen": frozen,
                "classes": list(classes), "prompts": list(classes), "background": ["ground", "sky"]}, folder / name)
    return str(folder / name)


def noise_picture(seed, height, width):
    """Coarse noise, so that patches differ: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 12), max(1, width // 12), 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two checkpoints and the data set of the first: five pictures of three classes, with masks."""
    home = tmp_path_factory.mktemp("run with spaces ü")
    write_checkpoint(home, "folder", CLASSES, "best.pt")
    write_checkpoint(home, "voc", data.VOC_CLASSES, "voc.pt")
    own = home / "own"
    (own / "images").mkdir(parents=True)
    (own / "masks").mkdir()
    lines, sizes = [], [(48, 48), (30, 44), (64, 40), (48, 33), (41, 41)]
    for number, size in enumerate(sizes):
        Image.fromarray(noise_picture(number, *size)).save(own / "images" / f"{number}.png")
        truth = np.random.default_rng(number).choice([0, 1, 2, 3, 255], size).astype(np.uint8)
        data.save_mask(own / "masks" / f"{number}.png", truth)
        lines.append(f"{number}.png,{'' if number == 4 else CLASSES[number % 3] + ';ant'},val")
    (own / "labels.csv").write_text("\n".join(lines))
    return home


@pytest.fixture(scope="module")
def method(home):
    """The method of the first checkpoint."""
    path = home / "best.pt"
    return decoder.restore(decoder.read_checkpoint(path), path, {}, "cpu")


def command(*args, cwd):
    """06 as a user starts it, in a process of its own; -> the finished process."""
    script = Path(infer.__file__).resolve()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in conftest.py
    line = [sys.executable, script, *map(str, args)]
    return subprocess.run(line, cwd=cwd, env=one_thread, capture_output=True, text=True)


def exit_status(*args):
    """06 in this process, as `python 06_infer.py` ends."""
    with pytest.raises(SystemExit) as status:
        data.run(lambda: infer.main([str(arg) for arg in args]))
    return status.value.code


def read(path):
    with Image.open(path) as image:
        return np.array(image)


# ---------------------------------------------------------------------------------------------------------- pictures

def test_several_checkpoints_leave_their_own_files_and_a_row_each_on_one_sheet(home, tmp_path, capsys):
    """Each as if it were alone; masks beside them are rows too; the checkpoints may be of one method or of other classes."""
    for seed, name in enumerate("ab"):
        Image.fromarray(noise_picture(seed, 48, 48)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures, checkpoints = [str(tmp_path / name) for name in ("a.png", "broken.png", "b.png")], ("best.pt", "voc.pt")
    out = [tmp_path / name for name in ("together", *checkpoints)]
    paths = [str(home / name) for name in checkpoints]
    for argv, output in zip(([*paths], [paths[0]], [paths[1]]), out):
        assert infer.main([*argv, *pictures, "--output-dir", str(output)]) == 1
    assert "error: 1 pictures could not be used" in capsys.readouterr().err
    names = {f"{picture}_weclip+_{number}{end}.png" for picture in "ab" for number in (1, 2) for end in ("", "_overlay")}
    assert {path.name for path in out[0].iterdir()} == names | {"a_sheet.png"}
    for number, alone in enumerate(out[1:], 1):
        for picture in "ab":
            np.testing.assert_array_equal(read(out[0] / f"{picture}_weclip+_{number}.png"), read(alone / f"{picture}.png"))
    pictures.remove(str(tmp_path / "broken.png"))
    assert infer.main([paths[0], *pictures, "--output-dir", str(tmp_path / "beside"), "--beside", str(out[1])]) == 0
    sheet = read(tmp_path / "beside" / "a_sheet.png")
    rows = [cell for cell in np.split(sheet, np.flatnonzero((sheet == 255).all(axis=(1, 2))))]
    drawn = [row for row in rows if len(row) > infer.SHEET_SIDE / 2]
    assert len(drawn) == 3 and sheet.shape[1] == 2 * (infer.SHEET_SIDE + 8)
    np.testing.assert_array_equal(drawn[1], drawn[2])  # the masks beside are those that it found
    assert (drawn[0] != drawn[1]).any()


def test_pictures_of_any_size_and_mode_are_segmented_and_a_broken_one_stops_nothing(home, tmp_path):
    """From any folder, on any folder: each good file gets its palette PNG and overlay, each bad one a line."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    rgb = Image.fromarray(noise_picture(0, 60, 90))
    rgb.save(folder / "rgb.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.convert("1").save(folder / "bits.png")
    Image.fromarray(noise_picture(1, 1, 500)).convert("L").save(folder / "thin.png")
    Image.new("RGBA", (1, 1), (200, 30, 30, 128)).save(folder / "dot.png")
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:500])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no picture")
    done = command(home / "best.pt", "my pictures", "missing.jpg", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("cut.jpg", "empty.jpg", "missing.jpg", "3 pictures"):
        assert name in done.stderr
    sizes = {"rgb": (60, 90), "cmyk": (60, 90), "palette": (60, 90), "bits": (60, 90), "thin": (1, 500), "dot": (1, 1)}
    results = folder / "predictions"
    names = {path.name for path in results.iterdir()}
    assert names == {f"{name}{end}.png" for name in sizes for end in ("", "_overlay")}
    for name, size in sizes.items():
        with Image.open(results / f"{name}.png") as image:
            assert (image.mode, image.size) == ("P", size[::-1])
            assert image.getpalette()[:768] == data.colormap().ravel().tolist()
            assert np.array(image).max() <= len(CLASSES)
        assert f"{name}" in done.stdout
    assert len(np.unique(read(results / "rgb.png"))) > 1, "the picture of this test should show more than one class"


def test_a_photo_is_segmented_as_it_is_displayed(home, tmp_path):
    """A phone stores pixels sideways and a note how to turn them. The result is that of the upright picture."""
    upright = Image.fromarray(noise_picture(3, 40, 64))
    upright.save(tmp_path / "upright.png")
    note = Image.Exif()
    note[0x0112] = 6  # turn clockwise to display
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=note)
    assert infer.main([str(home / "best.pt"), str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 0
    expected = read(tmp_path / "out" / "upright.png")
    assert expected.shape == (40, 64) and len(np.unique(expected)) > 1
    np.testing.assert_array_equal(read(tmp_path / "out" / "sideways.png"), expected)


def test_the_prediction_is_the_best_class_of_the_multi_scale_logits(home, method, tmp_path):
    """Nothing is lost between 04 and the PNG; --scales and --no-flip arrive."""
    picture = noise_picture(5, 50, 70)
    Image.fromarray(picture).save(tmp_path / "a.png")
    image = data.normalize(picture)
    results = []
    for options, scales, flip in ((), (1, 1.5), True), (("--scales", "1", "0.6", "--no-flip"), (1, 0.6), False):
        assert infer.main([str(home / "best.pt"), str(tmp_path / "a.png"), *options]) == 0
        results.append(read(tmp_path / "predictions" / "a.png"))
        expected = cam.enlarge(method.logits(image, scales, flip), (50, 70)).argmax(dim=0)
        np.testing.assert_array_equal(results[-1], expected.numpy())
    assert (results[0] != results[1]).any(), "this picture cannot tell the options apart"


def test_no_result_replaces_a_picture_or_another_result(home, tmp_path):
    """cat.jpg and cat.png are called alike without suffix, and results may be wanted in the pictures' own folder."""
    names = ("cat.jpg", "cat.png", "cat_overlay.jpg")
    for seed, name in enumerate(names):
        Image.fromarray(noise_picture(seed, 16, 16)).save(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert infer.main([str(home / "best.pt"), str(tmp_path), "--output-dir", str(tmp_path)]) == 0
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert len(list(tmp_path.iterdir())) == len(names) * 3


def test_the_overlay_of_a_large_photo_is_small_and_its_prediction_is_not(home, tmp_path):
    Image.fromarray(noise_picture(2, 400, 3000)).save(tmp_path / "wide.png")
    assert infer.main([str(home / "best.pt"), str(tmp_path / "wide.png"), "--scales", "1"]) == 0
    assert read(tmp_path / "predictions" / "wide.png").shape == (400, 3000)
    assert read(tmp_path / "predictions" / "wide_overlay.png").shape[1] == 1024


# ----------------------------------------------------------------------------------------------- several scales, mirror

def test_one_scale_without_mirror_is_the_plain_forward(method):
    """The "single scale" of the tables: a picture whose long side is already right is only segmented."""
    image = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = method.model(method.look(image[None], for_labels=False)).logits
    assert logits.shape == (1, method.info.num_classes, 6, 4)
    torch.testing.assert_close(method.logits(image, (1,), flip=False), logits[0])


def test_with_flip_a_mirrored_picture_has_mirrored_logits(method):
    """Both views are averaged, so that left and right are treated alike. A single view does not do that."""
    image = torch.randn(3, 40, 48, generator=torch.Generator().manual_seed(1))
    both, mirrored = (method.logits(picture) for picture in (image, image.flip(-1)))
    torch.testing.assert_close(mirrored, both.flip(-1), rtol=1e-4, atol=1e-4)
    assert (method.logits(image.flip(-1), flip=False) - method.logits(image, flip=False).flip(-1)).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------- scores of a split

def slow_iou(pairs, number):
    """IoU of one class over (prediction, truth) pictures, pixel by pixel in plain Python; void is not looked at."""
    inter = union = 0
    for prediction, truth in pairs:
        for said, true in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if true != 255:
                inter += said == number and true == number
                union += said == number or true == number
    return inter / union


def test_the_scores_are_those_of_a_slow_count_over_the_pngs(home, method, tmp_path, capsys):
    """One confusion matrix over the whole split, not a mean over images; the mean is over background and classes."""
    own = home / "own"
    assert exit_status(home / "best.pt", "--data_path", own, "--output_dir", tmp_path) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (report["split"], report["images"], report["scales"], report["flip"], report["crf"], report["unusable"]) == (
        "val", 5, [1.0, 1.5], True, False, [])
    names = ("background", *CLASSES)
    truths = [read(own / "masks" / f"{n}.png") for n in range(5)]
    images = [data.normalize(read(own / "images" / f"{n}.png")) for n in range(5)]
    singles = [cam.enlarge(method.logits(image, (1,), flip=False), image.shape[1:]).argmax(dim=0) for image in images]
    made = {"multi-scale + flip": [read(tmp_path / "predictions" / f"{n}.png") for n in range(5)],
            "single scale": [labels.numpy() for labels in singles]}
    assert report["rungs"].keys() == made.keys()
    for rung, predictions in made.items():
        expected = [slow_iou(list(zip(predictions, truths)), number) for number in range(4)]
        assert report["rungs"][rung]["iou"] == pytest.approx(dict(zip(names, expected)))
        assert report["rungs"][rung]["miou"] == pytest.approx(sum(expected) / 4)
        assert f"{100 * sum(expected) / 4:.1f}" in printed
    for name in (*names, "mIoU"):
        assert f"\n{name} " in printed
    assert report["rungs"]["single scale"] != report["rungs"]["multi-scale + flip"]


def test_cams_leaves_the_maps_of_every_stage_and_scores_them(home, tmp_path):
    """What is made from image-level labels shows no other class; a picture without any class is all background."""
    options = ["--data-path", str(home / "own"), "--output-dir", str(tmp_path)]
    assert infer.main([str(home / "best.pt"), "--cams", *options]) == 0
    report = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert list(report["rungs"]) == ["CAM", "refined", "pseudo label", "single scale", "multi-scale + flip"]
    for folder, rung in ("CAM", "CAM"), ("refined", "refined"), ("pseudo_label", "pseudo label"):
        maps = [read(tmp_path / folder / f"{n}.png") for n in range(5)]
        for number, labels in enumerate(maps):
            allowed = {0} if number == 4 else {0, 1, 1 + number % 3}
            assert set(np.unique(labels).tolist()) <= allowed
        truths = [read(home / "own" / "masks" / f"{n}.png") for n in range(5)]
        assert report["rungs"][rung]["iou"]["bee"] == pytest.approx(slow_iou(list(zip(maps, truths)), 2))


def test_with_labels_a_prediction_names_only_classes_that_the_picture_shows(home, method, tmp_path):
    """The best of background and these, at every pixel, single scale and CRF too; a picture without a class is background."""
    crf = ["--crf", "-j", "1"] if find_spec("pydensecrf") else []
    options = ["--data-path", str(home / "own"), "--output-dir", str(tmp_path), "--with-labels"]
    assert infer.main([str(home / "best.pt"), *options, *crf]) == 0
    assert infer.main([str(home / "best.pt"), *options, "--output-dir", str(tmp_path / "plain")]) == 0
    for number in range(5):
        allowed = {0} if number == 4 else {0, 1, 1 + number % 3}
        assert set(np.unique(read(tmp_path / "predictions" / f"{number}.png")).tolist()) <= allowed
        image = data.normalize(read(home / "own" / "images" / f"{number}.png"))
        logits = cam.enlarge(method.logits(image), image.shape[1:])
        logits[[c for c in range(4) if c not in allowed]] = -torch.inf
        np.testing.assert_array_equal(read(tmp_path / "plain" / "predictions" / f"{number}.png"), logits.argmax(dim=0).numpy())
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["with_labels"]


@pytest.mark.parametrize("also", ["--par", pytest.param("--crf", marks=pytest.mark.skipif(
    find_spec("pydensecrf") is None, reason="`pip install pydensecrf2` to test --crf too"))])
def test_with_labels_all_that_is_made_of_the_logits_knows_the_classes_of_the_picture_only(home, method, also):
    """PAR and CRF compare the classes that are left among one another: what they are given has no others in it."""
    args = infer.parse_args(["best.pt", "--with-labels", also])
    args.amp, args.scales = None, (1.0, 1.5)
    for number, sample in enumerate(data.list_samples(method.info, home / "own", "val")):
        allowed = [0] if number == 4 else sorted({0, 1, 1 + number % 3})
        image = data.load_image(sample.image)
        logits = method.logits(data.normalize(image))[allowed]
        found, job = infer.segment(method, sample, args)
        assert list(found.labels)[:2] == ["single scale", "multi-scale + flip"]
        assert all(set(labels.unique().tolist()) <= set(allowed) for labels in found.labels.values())
        if also == "--par":
            expected = torch.tensor(allowed)[cam.par_labels(data.normalize(image), logits)]
            assert torch.equal(found.labels["multi-scale + flip + PAR"].long(), expected)
        else:
            probs = cam.enlarge(logits, image.shape[:2]).softmax(dim=0).numpy()
            likely = [n for n in range(len(allowed)) if n == 0 or probs[n].max() > 0.01]
            assert set(job[1].tolist()) <= set(allowed) and job[1].tolist() == [allowed[n] for n in likely]
            np.testing.assert_allclose(job[2], probs[likely], atol=1e-5)


def test_par_is_a_rung_of_its_own_and_the_prediction(home, method, tmp_path):
    """It needs no package, sees the picture and no label; scores.json says that it was used."""
    assert infer.main([str(home / "best.pt"), "--data-path", str(home / "own"), "--output-dir", str(tmp_path), "--par"]) == 0
    report = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert report["par"] and list(report["rungs"]) == ["single scale", "multi-scale + flip", "multi-scale + flip + PAR"]
    for number in range(5):
        image = data.normalize(read(home / "own" / "images" / f"{number}.png"))
        expected = cam.par_labels(image, method.logits(image)).numpy()
        np.testing.assert_array_equal(read(tmp_path / "predictions" / f"{number}.png"), expected)


def test_predictions_keep_the_sub_folders_of_their_pictures(home, tmp_path):
    """ant/1.png and bee/1.png are two pictures, and `05_train.py --masks` finds their masks by these names."""
    for seed, name in enumerate(CLASSES):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.fromarray(noise_picture(seed, 20, 20)).save(tmp_path / "own" / name / "1.png")
    options = ["--data-path", str(tmp_path / "own"), "--split", "train", "--output-dir", str(tmp_path / "out"), "--cams"]
    assert infer.main([str(home / "best.pt"), *options]) == 0
    for folder in ("predictions", "CAM", "refined", "pseudo_label"):
        assert sorted(path.parent.name for path in (tmp_path / "out" / folder).glob("*/1.png")) == list(CLASSES)


def test_a_split_with_a_broken_picture_is_finished_and_says_so(home, tmp_path, capsys):
    """An hour of work is not thrown away for one file, and a score over fewer pictures does not pass for the whole."""
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    (own / "masks").mkdir()
    for name in "ab":
        Image.fromarray(noise_picture(1, 20, 20)).save(own / "images" / f"{name}.png")
        data.save_mask(own / "masks" / f"{name}.png", np.ones((20, 20), np.uint8))
    (own / "images" / "a.png").write_bytes(b"no picture")
    (own / "labels.csv").write_text("a.png,ant;bee,val\nb.png,cow,val")
    assert exit_status(home / "best.pt", "--data-path", own, "--output-dir", tmp_path / "out") == 1
    assert "a.png" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert (report["images"], report["unusable"]) == (1, ["a"])
    assert report["rungs"]["single scale"]["iou"].keys() == {"background", *CLASSES}
    assert [path.name for path in (tmp_path / "out" / "predictions").iterdir()] == ["b.png"]


def test_a_result_that_cannot_be_written_costs_its_picture_alone(home, tmp_path, capsys):
    """It is named, counted and not scored; of the others nothing is lost. A folder lies where its file should be."""
    own, out = home / "own", tmp_path / "out"
    (out / "predictions" / "1.png").mkdir(parents=True)
    assert exit_status(home / "best.pt", "--data-path", own, "--output-dir", out) == 1
    said = capsys.readouterr().err
    assert "1.png could not be written (" in said and "--output-dir" in said and "1 pictures could not be used" in said
    assert {path.name for path in (out / "predictions").iterdir() if path.is_file()} == {"0.png", "2.png", "3.png", "4.png"}
    report = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert report["images"] == 4 and report["unusable"] == ["1"]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b" * 245, "c"):
        shutil.copy(own / "images" / "0.png", pictures / f"{name}.png")
    assert infer.main([str(home / "best.pt"), str(pictures), "--device", "cpu", "--scales", "1", "--no-flip"]) == 1
    assert f"{'b' * 245}_overlay.png could not be written (" in capsys.readouterr().err
    left = {path.name for path in (pictures / "predictions").iterdir()}
    assert left >= {"a.png", "a_overlay.png", "c.png", "c_overlay.png"} and not any(name.endswith(".tmp") for name in left)


def test_names_that_are_no_utf8_are_written_all_the_same(tmp_path):
    data.write_text(tmp_path / "a.json", json.dumps({"name": "\udcff\u00fc"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "\udcff\u00fc"}


def test_without_masks_a_split_is_segmented_and_not_scored(home, tmp_path, capsys):
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    Image.fromarray(noise_picture(1, 20, 20)).save(own / "images" / "a.png")
    (own / "labels.csv").write_text("a.png,ant;bee;cow,train")
    options = ["--data-path", str(own), "--split", "train", "--output-dir", str(tmp_path / "out")]
    assert infer.main([str(home / "best.pt"), *options]) == 0
    assert "nothing is scored" in capsys.readouterr().out
    assert read(tmp_path / "out" / "predictions" / "a.png").shape == (20, 20)
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_split_with_some_masks_is_scored_on_these(home, tmp_path, capsys):
    """All pictures are segmented; the table and scores.json say how many count."""
    own = shutil.copytree(home / "own", tmp_path / "own")
    for number in (1, 3):
        (own / "masks" / f"{number}.png").unlink()
    assert infer.main([str(home / "best.pt"), "--data-path", str(own), "--output-dir", str(tmp_path / "out")]) == 0
    assert "3 of 5 images" in capsys.readouterr().out and len(list((tmp_path / "out" / "predictions").iterdir())) == 5
    assert json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["images"] == 3


# ----------------------------------------------------------------------------------------------------- the VOC server

@pytest.fixture
def voc(tmp_path):
    """VOC 2012 in small: two pictures in `test`, without masks or annotations."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    names = ("2008_000006", "2008_000011")
    for seed, name in enumerate(names):
        Image.fromarray(noise_picture(seed, 30, 45)).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(names) + "\n")
    return root, names


def test_the_submission_has_the_servers_layout(home, voc, tmp_path):
    """results/VOC2012/Segmentation/comp6_test_cls/NAME.png, and nothing about the machine it was packed on."""
    root, names = voc
    options = ["--data-path", str(root), "--split", "test", "--output-dir", str(tmp_path / "out")]
    assert infer.main([str(home / "voc.pt"), *options, "--submit", str(tmp_path / "s.tgz")]) == 0
    with tarfile.open(tmp_path / "s.tgz", "r:gz") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [f"results/VOC2012/Segmentation/comp6_test_cls/{n}.png" for n in names]
        assert all(m.isfile() and not m.uname and not m.uid for m in members)
        for member, name in zip(members, names, strict=True):
            packed = read(archive.extractfile(member))
            assert packed.shape == (30, 45) and packed.max() <= 20
            np.testing.assert_array_equal(packed, read(tmp_path / "out" / "predictions" / f"{name}.png"))


def test_an_incomplete_submission_is_not_written(home, voc, tmp_path, capsys):
    root, names = voc
    (root / "JPEGImages" / f"{names[1]}.jpg").write_bytes(b"no picture")
    options = ["--data-path", root, "--split", "test", "--output-dir", tmp_path / "out", "--submit", tmp_path / "s.tgz"]
    assert exit_status(home / "voc.pt", *options) == 1
    assert "lack 1 of 2" in capsys.readouterr().err
    assert not (tmp_path / "s.tgz").exists() and (tmp_path / "out" / "predictions" / f"{names[0]}.png").exists()


@pytest.mark.parametrize("option", ["--cams", "--with-labels"])
def test_a_split_without_labels_is_refused_where_they_are_needed(home, voc, option):
    root, _ = voc
    with pytest.raises(data.DataError, match="test has no image-level labels"):
        infer.main([str(home / "voc.pt"), "--data-path", str(root), "--split", "test", option])


# ------------------------------------------------------------------------------------------------------------ refusals

def test_data_of_other_classes_is_refused_and_both_lists_are_named(home, tmp_path, capsys):
    for name in ("ant", "dog"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.fromarray(noise_picture(0, 8, 8)).save(tmp_path / "other" / name / "1.png")
    assert exit_status(home / "best.pt", "--data-path", tmp_path / "other") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "ant, bee, cow" in message and "ant, dog" in message


@pytest.mark.parametrize("arguments, message", [
    (["best.pt"], "--data-path FOLDER"),
    (["best.pt", "--data-path", "own", "--split", "train"], "no pictures in train"),
    (["best.pt", "a.png", "--cams"], "image-level labels"),
    (["best.pt", "a.png", "--with-labels"], "image-level labels"),
    (["best.pt", "a.png", "--submit", "x.tgz"], "image-level labels"),
    (["best.pt", "--data-path", "own", "--submit", "x.tgz"], "VOC's server"),
    (["best.pt", "voc.pt"], "name some pictures"),
    (["best.pt", "--data-path", "own", "--beside", "own/masks"], "name some pictures"),
    (["best.pt", "nothing.pt", "a.png"], "nothing.pt"),
    (["best.pt", "."], "no pictures in there"),
    (["best.pt", "a.png", "--device", "toaster"], "--device toaster"),
    (["nothing.pt", "a.png"], "nothing.pt"),
    (["own/labels.csv", "a.png"], "not a checkpoint"),
])
def test_what_cannot_be_done_is_said_in_one_sentence(home, monkeypatch, arguments, message):
    """Nothing is written, and the message names the file or the option."""
    monkeypatch.chdir(home)
    before = set(home.rglob("*"))
    with pytest.raises(data.DataError, match=message):
        infer.main(arguments)
    assert set(home.rglob("*")) == before


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf"])
def test_numbers_that_make_no_sense_are_refused(home, number):
    with pytest.raises(data.DataError, match="--scales .*: wanted a number above 0"):
        infer.main([str(home / "best.pt"), "cat.png", "--scales", "1", number])
    with pytest.raises(SystemExit):
        infer.parse_args(["best.pt", "-j", "0"])


def test_pictures_may_come_after_options():
    args = infer.parse_args(["best.pt", "a.png", "--crf", "b.png", "--no-flip", "--output_dir", "x", "c"])
    assert (args.checkpoint, args.images) == ("best.pt", ["a.png", "b.png", "c"])
    assert (args.crf, args.flip, args.output_dir) == (True, False, "x")


# ----------------------------------------------------------------------------------------------------------------- CRF

def test_without_its_package_crf_says_how_to_get_it(home, monkeypatch):
    """It has to be compiled, so it is no requirement; who asks for it is told before any picture is read."""
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    with pytest.raises(data.DataError, match="pip install pydensecrf2"):
        infer.main([str(home / "best.pt"), "a.png", "--crf"])


def test_likely_classes_keeps_what_is_probable_somewhere():
    """Class 1 is probable in one pixel only, class 3 nowhere; the logits' common offset does not matter."""
    probs = torch.tensor([[[0.985, 0.5]], [[0.001, 0.485]], [[0.011, 0.011]], [[0.003, 0.004]]])
    ids, kept = cam.likely_classes(probs.log() + 5, floor=0.01)
    assert ids.tolist() == [0, 1, 2]
    np.testing.assert_allclose(kept, probs[:3].numpy(), rtol=1e-5)


def test_the_best_class_is_kept_even_if_it_is_improbable():
    """With 200 classes alike, none reaches one percent."""
    logits = torch.zeros(200, 1, 2)
    logits[7, 0, 1] = 0.1
    assert cam.likely_classes(logits)[0].tolist() == [0, 7]


def test_crf_gives_the_numbers_of_the_released_code():
    pytest.importorskip("pydensecrf", reason="`pip install pydensecrf2` to test --crf too")
    arrays, _ = golden.load_case("p2_units")
    np.testing.assert_allclose(cam.crf(arrays["par_image_u8"], arrays["crf_prob"]), arrays["crf_out"], atol=1e-5)


def test_crf_moves_the_border_to_the_edge_of_the_picture(home, tmp_path):
    """A black and a white half, a border that is three pixels off: the CRF puts it where the colour changes."""
    pytest.importorskip("pydensecrf", reason="`pip install pydensecrf2` to test --crf too")
    image = np.zeros((30, 40, 3), np.uint8)
    image[:, 20:] = 255
    logits = torch.zeros(5, 30, 40)
    logits[0, :, :23], logits[3, :, 23:], logits[1], logits[4] = 2, 2, -9, -9
    ids, probs = cam.likely_classes(logits)
    assert ids.tolist() == [0, 2, 3]
    labels = cam.crf_labels(image, ids.numpy().astype(np.uint8), probs.numpy())
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.where(np.arange(40) < 20, 0, 3)[None].repeat(30, axis=0))


def test_crf_in_worker_processes_is_the_crf_of_one_process(home, method, tmp_path):
    """Results come late but in order, more pictures than workers can hold; the scores have one more rung."""
    pytest.importorskip("pydensecrf", reason="`pip install pydensecrf2` to test --crf too")
    own = home / "own"
    options = ["--data-path", str(own), "--crf", "-j", "1", "--output-dir", str(tmp_path)]
    assert infer.main([str(home / "best.pt"), *options]) == 0
    report = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert list(report["rungs"]) == ["single scale", "multi-scale + flip", "multi-scale + flip + CRF"]
    for number in range(5):
        image = read(own / "images" / f"{number}.png")
        logits = cam.enlarge(method.logits(data.normalize(image)), image.shape[:2])
        expected = cam.crf(image, logits.softmax(dim=0).numpy()).argmax(axis=0)
        assert (read(tmp_path / "predictions" / f"{number}.png") == expected).mean() > 0.999
