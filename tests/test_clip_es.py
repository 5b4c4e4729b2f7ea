"""Is methods/clip_es.py CLIP-ES? The authors' code on the same pictures and weights, stage by stage; and does the command do
what it says: masks that 05 learns from, a stop that loses nothing, scores of every step."""
import json
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import clip
import numpy as np
import pytest
import torch

import golden
from tiny import CLASSES, arguments, read

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
train = import_module("05_train")
clip_es = import_module("methods.clip_es")

PICTURES = [("voc", "a"), ("voc", "b"), ("coco", "c")]
NEEDS_CRF = "pip install pydensecrf2 to compare the dense CRF"


@cache
def case():
    arrays, info = golden.load_case("p7_clipes")
    return arrays, info, clip.model.build_model(golden.case_clip(info)).float().eval().requires_grad_(False)


@cache
def ours(dataset, name):
    """Every quantity of one picture, under the golden names."""
    arrays, info, model = case()
    names, key = data.dataset_info(dataset), f"{dataset}_{name}"
    image, ids = arrays[f"{key}_image_u8"], arrays[f"{key}_class_ids"]
    out = {f"text_{what}": backbone.text_features(model, words) for what, words in (("fg", names.prompts), ("bg", names.background))}
    out["resized_u8"] = clip_es.network_image(image, 16)
    images = data.normalize(out["resized_u8"], clip_es.CLIP_MEAN, clip_es.CLIP_STD)[None]
    pairs = torch.tensor([(0, c) for c in ids])
    seen = backbone.look(model, images, 7)
    raw, probs, last = cam.grad_cam(model, seen.tokens[-1], out["text_fg"], out["text_bg"], pairs, seen.grid)
    fraction = clip_es.BOX_FRACTION[dataset]
    cams, transition, flow = clip_es.refined_cams(model, images, out["text_fg"], out["text_bg"], pairs, fraction)
    out |= {"tokens": seen.tokens[-1][0], "attn8": cam.static_affinity(torch.cat([seen.maps, last[:, None]], dim=1), 8)[0],
            "probs": probs[0, [*ids, *range(len(names.classes), probs.shape[1])]].expand(len(ids), -1),
            "cam_raw": raw.relu(), "cam": cams, "box_mask": cam.box_masks(cams, fraction), "transition": transition[0],
            "refined": flow, "refined_full": cam.enlarge(cam.min_max(flow), image.shape[:2]), "cam_full": cam.enlarge(cams, image.shape[:2])}
    return {what: np.asarray(x) for what, x in out.items()}


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dataset, name", PICTURES)
def test_the_stages_are_those_of_the_released_code(dataset, name):
    """From the picture's bytes to the refined map at its size; the resized picture and the boxes exactly."""
    arrays, _, _ = case()
    found, compared = ours(dataset, name), 0
    for key, want in arrays.items():
        prefix, _, what = key.rpartition(f"{dataset}_{name}_" if f"{dataset}_{name}_" in key else f"{dataset}_text_")
        what = f"text_{what}" if "_text_" in key else what
        array, _, form = what.partition("__")
        if not key.startswith(dataset) or array not in found or form == "index":
            continue
        got = found[array]
        if form == "values":
            got = got.ravel()[arrays[key.replace("__values", "__index")]]
        if form == "l2":
            got = np.array([np.linalg.norm(got.astype(float))])
        compared += 1
        if want.dtype.kind == "u":
            assert np.array_equal(got, want), key
        else:
            assert error(got.astype(float), want.astype(float)) <= 1e-4, key
    assert compared == 15


def masks(key, image, maps):
    """Labels and where they are unsure, over a CRF of `maps` on `image`."""
    arrays, _, _ = case()
    ids = np.array([0, *(1 + arrays[f"{key}_class_ids"])], np.uint8)
    return clip_es.crf_mask(image, ids, clip_es.stacked(maps))


@pytest.mark.parametrize("dataset, name", PICTURES)
def test_the_masks_are_those_of_the_released_code(dataset, name):
    """On the plain picture, and on the torn colours that the released CRF was fed: BGR less a mean, wrapped round in a byte."""
    pytest.importorskip("pydensecrf.densecrf", reason=NEEDS_CRF)
    arrays, info, _ = case()
    key = f"{dataset}_{name}"
    image, maps = arrays[f"{key}_image_u8"], ours(dataset, name)["refined_full"]
    labels, unsure = masks(key, image, maps)
    assert (np.where(unsure, 255, labels) == arrays[f"{key}_maskrgb"]).mean() >= 0.999
    torn = np.trunc(image[..., ::-1] - np.array(info["crf"]["mean_bgr"])).astype(int).astype(np.uint8)
    labels, unsure = masks(key, torn, maps.astype(np.float16))
    assert (np.where(unsure, 255, labels) == arrays[f"{key}_mask"]).mean() >= 0.999
    assert (labels == arrays[f"{key}_mask_argmax"]).mean() >= 0.999
    for name, picture, precision in (("crf", torn, np.float16), ("crfrgb", image, np.float32)):
        marginals = cam.crf(picture, clip_es.stacked(maps.astype(precision)).astype(np.float32), *clip_es.CRF)
        want = arrays[f"{key}_{name}_marginals__values"]
        assert error(marginals.ravel()[arrays[f"{key}_{name}_marginals__index"]], want) <= 1e-3
        assert np.linalg.norm(marginals.astype(float)) == pytest.approx(arrays[f"{key}_{name}_marginals__l2"][0], rel=1e-3)


def pooled(dataset, label_of):
    """Scores of one confusion matrix over the pictures of a data set."""
    arrays, _, _ = case()
    classes = data.dataset_info(dataset).num_classes
    matrix = sum(cam.confusion_matrix(torch.from_numpy(arrays[f"{d}_{n}_gt"]), torch.from_numpy(label_of(f"{d}_{n}", ours(d, n))), classes)
                 for d, n in PICTURES if d == dataset)
    return cam.scores(matrix) | {"matrix": matrix}


@pytest.mark.parametrize("dataset", ["voc", "coco"])
@pytest.mark.parametrize("sweep, maps", [("refined_alpha", "refined_full"), ("cam_alpha", "cam_full"), ("refined_const", "refined_full")])
def test_the_sweeps_over_backgrounds_are_those_of_the_released_code(dataset, sweep, maps):
    """Row by row: the score's own column, whatever background it was made with."""
    arrays, _, _ = case()
    for background, want in arrays[f"{dataset}_sweep_{sweep}"]:
        def label(key, found):
            ids = np.array([0, *(1 + arrays[f"{key}_class_ids"])])
            return ids[clip_es.stacked(found[maps].astype(np.float16), background).argmax(axis=0)]
        result = pooled(dataset, label)
        assert result["miou"] == pytest.approx(want, abs=1e-4), background
        if sweep == "refined_alpha" and background == 1:
            np.testing.assert_allclose(result["iou"], arrays[f"{dataset}_iou_refined_alpha1"], atol=1e-4)


@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_the_four_scores_of_the_masks_are_those_of_the_released_code(dataset):
    arrays, _, _ = case()
    result = pooled(dataset, lambda key, _: arrays[f"{key}_mask_argmax"])
    matrix, iou = result["matrix"].double(), torch.tensor(result["iou"]).nan_to_num()
    weighted = float((matrix.sum(1) / matrix.sum() * iou).sum())
    assert [result["miou"], result["pixel_accuracy"], result["mean_accuracy"], weighted] == pytest.approx(
        arrays[f"{dataset}_score_crf"].tolist(), abs=1e-6)


def test_a_photograph_is_seen_at_a_long_side_of_1024():
    """Attention of 4000 x 3000 pixels would take hundreds of gigabytes. VOC and COCO stay as they are, but for the patch."""
    for size, seen in (((3000, 4000), (768, 1024)), ((5000, 7), (1024, 16)), ((375, 500), (384, 512)), ((640, 480), (640, 480))):
        assert clip_es.network_image(np.zeros((*size, 3), np.uint8), 16).shape == (*seen, 3)


# ----------------------------------------------------------------------------------------------------------- the command

def command(world, output, *more):
    return [str(world), "--split", "train", "--clip", str(world / "clip.pt"), "--device", "cpu", "-j", "1", "--output-dir", str(output), *more]


def test_the_command_leaves_masks_that_05_learns_from_and_scores_every_step(world, tmp_path, capsys):
    """One palette PNG per picture at its size, with its own classes only; one confusion matrix per step."""
    assert clip_es.main(command(world, tmp_path / "masks")) == 0
    said = capsys.readouterr().out
    assert "8 masks in" in said and data.command(train.__file__, world, "--masks", tmp_path / "masks") in said and "mIoU" in said
    for number in range(8):
        mask = data.load_mask(tmp_path / "masks" / f"{number}.png", 4, (84, 70))
        assert set(np.unique(mask).tolist()) <= {0, 1 + number % 3, 255}
    matrices = json.loads((tmp_path / "masks" / "progress.json").read_text())["matrices"]
    assert len(matrices) == 10 + 2 + 1 and all(np.sum(matrix) == 8 * 84 * 70 for matrix in matrices.values())
    train.main(arguments(world, tmp_path / "run", "--max-iters", 1, "--masks", tmp_path / "masks"))
    assert read(tmp_path / "run")["masks"].startswith(str(tmp_path / "masks"))


def test_a_stopped_command_goes_on_and_scores_all(world, tmp_path, capsys, monkeypatch):
    """Killed after three pictures, one of them not yet noted: the rest is made, the scores are those of an unbroken run."""
    clip_es.main(command(world, tmp_path / "whole"))
    monkeypatch.setattr(clip_es, "SAVE_EVERY", 2)
    save_mask, saved = data.save_mask, []

    def save(path, mask):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save_mask(path, mask)
    monkeypatch.setattr(data, "save_mask", save)
    with pytest.raises(KeyboardInterrupt):
        clip_es.main(command(world, tmp_path / "stopped"))
    monkeypatch.setattr(data, "save_mask", save_mask)
    assert clip_es.main(command(world, tmp_path / "stopped")) == 0
    assert "2 done before" in capsys.readouterr().out
    ends = [json.loads((tmp_path / name / "progress.json").read_text()) for name in ("whole", "stopped")]
    assert ends[0] == ends[1]
    with pytest.raises(data.DataError, match="stopped holds masks of other settings: .*0.4.*, now .*0.7"):
        clip_es.main(command(world, tmp_path / "stopped", "--box-fraction", "0.7"))


def test_pictures_that_cannot_be_used_are_named_and_stop_nothing(world, tmp_path, capsys):
    """A broken file, and a picture without a class, which the released code ended at. Sub-folders keep their names."""
    root = tmp_path / "own"
    for number in range(3):
        (root / "images" / CLASSES[number]).mkdir(parents=True)
        shutil.copy(world / "images" / f"{number}.png", root / "images" / CLASSES[number] / "a.png")
    (root / "images" / "sofa" / "a.png").write_bytes(b"no picture")
    (root / "labels.csv").write_text("cat/a.png,cat\nsofa/a.png,sofa\ntree house/a.png,\n")
    argv = command(world, tmp_path / "masks")
    assert clip_es.main([str(root), *argv[1:]]) == 1
    said = capsys.readouterr()
    assert "a.png: cannot be read as a picture" in said.err and "1 masks in" in said.out
    assert "1 pictures without a class passed over, 1 unusable" in said.out
    assert [path.parent.name for path in (tmp_path / "masks").glob("*/*.png")] == ["cat"]


def test_without_the_crf_package_par_takes_its_place_and_says_so(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    assert clip_es.main(command(world, tmp_path / "masks")) == 0
    assert "PAR instead of the CRF, and no pixel becomes 255" in capsys.readouterr().out
    assert all(data.load_mask(path, 4).max() < 255 for path in (tmp_path / "masks").glob("*.png"))


def test_it_trains_nothing_and_05_says_so():
    done = subprocess.run([sys.executable, str(Path(train.__file__)), "shapes", "--method", "clip_es"], capture_output=True, text=True)
    assert done.returncode == 2 and "clip_es trains nothing; run it by itself: python methods/clip_es.py --help" in done.stderr
