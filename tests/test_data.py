"""01_data: what the network sees and is told, on made-up files, on real samples and against the authors' numbers."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tiny import mutated

data = import_module("01_data")
train = import_module("05_train")
draw = import_module("shapes.draw")
SHARED = Path(os.environ.get("SHARED_FOLDER", Path(__file__).resolve().parents[2] / "shared"))
SAMPLES = SHARED / "samples"
VOC = SAMPLES / "voc" / "VOCdevkit" / "VOC2012"
needs_pycocotools = pytest.mark.skipif(find_spec("pycocotools") is None, reason="pip install pycocotools to draw COCO's masks")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real samples; SHARED_FOLDER=... says where")
needs_golden = pytest.mark.skipif(not (SHARED / "golden/p2_units.npz").exists(),
                                  reason="no numbers of the authors' code; SHARED_FOLDER=... says where")


def index(name: str) -> list[dict]:
    with open(SAMPLES / name / "index.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(path: Path, height: int = 12, width: int = 16, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def mask_file(path: Path, values: list, height: int = 12, width: int = 16) -> Path:
    """A mask whose pixels run through `values` again and again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_mask(path, np.resize(np.array(values, np.uint8), (height, width)))
    return path


def xml_file(path: Path, *names: str, head: str = "") -> Path:
    objects = "".join(f"<object><name>{name}</name><difficult>{number % 2}</difficult>"
                      "<part><name>head</name></part></object>" for number, name in enumerate(names))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}<annotation>{objects}</annotation>", encoding="utf-8")
    return path


@pytest.fixture
def voc(tmp_path) -> Path:
    """a, b (val: c) with masks and XML, d with a mask in SegmentationClassAug only: the layout of VOC 2012."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in "abcd":
        picture(root / "JPEGImages" / f"{name}.jpg")
        mask_file(root / "SegmentationClassAug" / f"{name}.png", [0, 15, 9, 255])
    for name in "abc":
        xml_file(root / "Annotations" / f"{name}.xml", "person", "chair", "person")
        mask_file(root / "SegmentationClass" / f"{name}.png", [0, 15, 9, 255])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    return root


@pytest.fixture
def coco(tmp_path) -> Path:
    """Three pictures in COCO's native layout: two overlapping boxes, a crowd, and one picture without any object."""
    root = tmp_path / "coco"
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg", "height": 12, "width": 16} for n in (7, 8, 9)]
    for image in images:
        picture(root / "val2014" / image["file_name"])
    box = lambda x0, y0, x1, y1: [[x0, y0, x1, y0, x1, y1, x0, y1]]
    objects = [{"image_id": 7, "category_id": 90, "segmentation": box(4, 4, 8, 8), "iscrowd": 0},
               {"image_id": 7, "category_id": 1, "segmentation": box(2, 2, 12, 10), "iscrowd": 0},
               {"image_id": 8, "category_id": 13, "segmentation": {"counts": [12, 24, 156]}, "iscrowd": 1}]
    names = data.DATASETS["coco"].classes
    gaps = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps({
        "images": images, "annotations": objects,
        "categories": [{"id": number, "name": name} for number, name in zip(gaps, names)]}))
    return root


def samples_of(name: str, root: Path, split: str) -> list:
    return data.list_samples(data.DATASETS[name], root, split)


# ---------------------------------------------------------------- labels and masks of the real files

@needs_samples
def test_voc_labels_and_sizes_are_those_of_the_real_files():
    """XML with difficult objects where there is XML, the mask's classes where not; index.csv was made independently."""
    classes = data.DATASETS["voc"].classes
    rows = {row["id"]: row for row in index("voc")}
    by_name = {s.name: s for split in ("train_aug", "val") for s in samples_of("voc", VOC, split)}
    assert by_name.keys() == rows.keys()
    for name, sample in by_name.items():
        row = rows[name]
        assert sample.source == ("xml" if row["classes_in_xml"] else "mask")
        expected = (row["classes_in_xml"] or row["classes_in_mask"]).split()
        assert sorted(classes[label] for label in sample.labels) == sorted(expected)
        size = (int(row["height"]), int(row["width"]))
        assert data.load_image(sample.image).shape == (*size, 3)
        seen = data.mask_labels(data.load_mask(sample.mask, 21, size))
        assert sorted(classes[label] for label in seen) == sorted(row["classes_in_mask"].split())


@needs_samples
def test_voc_labels_keep_the_order_of_the_xml_file():
    """WeCLIP+ reads the objects in the file's order, each class once."""
    for sample in samples_of("voc", VOC, "val"):
        text = (VOC / "Annotations" / f"{sample.name}.xml").read_text()
        names = [re.search("<name>(.*?)</name>", part)[1] for part in text.split("<object>")[1:]]
        assert [data.DATASETS["voc"].classes[label] for label in sample.labels] == list(dict.fromkeys(names))


@needs_samples
def test_voc_accepts_the_parent_the_devkit_and_the_year():
    """People point --data-path at any of the three."""
    assert {data.find_root("voc", path) for path in (VOC, VOC.parent, VOC.parent.parent)} == {VOC}


@needs_samples
def test_train_aug_without_its_list_is_every_aug_mask_that_is_not_in_val(tmp_path):
    """The published list is hard to find, the masks are not; both give the same images."""
    listed = {s.name for s in samples_of("voc", VOC, "train_aug")}
    for folder in ("JPEGImages", "Annotations", "SegmentationClassAug"):
        (tmp_path / folder).symlink_to(VOC / folder)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").symlink_to(VOC / "ImageSets/Segmentation/val.txt")
    assert {s.name for s in samples_of("voc", tmp_path, "train_aug")} == listed


@needs_samples
def test_coco_labels_are_those_of_the_json():
    """Ids 1..90 become 0..79 in order, crowds count, images without an object are no part of the split."""
    rows = {data.coco_name(row["name"]): row for row in index("coco")}
    for split in ("train", "val"):
        content = json.loads((SAMPLES / f"coco/annotations/instances_{split}2014.json").read_text())
        order = sorted(category["id"] for category in content["categories"])
        expected: dict = {}
        for found in content["annotations"]:
            expected.setdefault(f"{found['image_id']:012}", set()).add(order.index(found["category_id"]))
        samples = samples_of("coco", SAMPLES / "coco", split)
        assert {s.name: set(s.labels) for s in samples} == expected
        for sample in samples:
            row = rows[sample.name]
            assert len(sample.labels) == int(row["categories"]) and list(sample.labels) == sorted(sample.labels)
            assert data.load_image(sample.image).shape == (int(row["height"]), int(row["width"]), 3)


def test_without_its_package_coco_masks_are_asked_for_in_one_sentence(monkeypatch):
    """Drawing them by another rule would give other scores at every edge."""
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)  # importing it now fails
    with pytest.raises(data.DataError, match="COCO's masks are drawn by the package pycocotools: `pip install pycocotools`"):
        data.coco_mask(8, 8, [(0, [[0, 0, 4, 0, 4, 4]], 31)], "street")


# ---------------------------------------------------------------- layouts, made up

def test_voc_takes_the_xml_first_and_the_mask_where_there_is_none(voc):
    """b's XML and mask agree here; d has no XML. The part of a body (`head`) is no object."""
    found = {s.name: (s.labels, s.source) for s in samples_of("voc", voc, "train_aug")}
    assert found == {"a": ((14, 8), "xml"), "b": ((14, 8), "xml"), "d": ((8, 14), "mask")}


def test_voc_masks_of_aug_go_before_the_plain_ones(voc):
    """train_aug is scored on the masks it is named after."""
    assert all(Path(s.mask).parent.name == "SegmentationClassAug" for s in samples_of("voc", voc, "train"))
    (voc / "SegmentationClassAug/a.png").unlink()
    assert Path(samples_of("voc", voc, "train")[0].mask).parent.name == "SegmentationClass"


def test_lists_in_deeplabs_form_are_read(voc):
    """The train_aug.txt that is passed around often has "/JPEGImages/x.jpg /SegmentationClassAug/x.png" lines."""
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("/JPEGImages/d.jpg /SegmentationClassAug/d.png\n")
    assert [s.name for s in samples_of("voc", voc, "train_aug")] == ["d"]


def test_voc_test_has_neither_labels_nor_masks(voc):
    """They are on the evaluation server."""
    picture(voc / "JPEGImages/e.jpg")
    (voc / "ImageSets/Segmentation/test.txt").write_text("e\n")
    assert samples_of("voc", voc, "test") == [data.Sample("e", str(voc / "JPEGImages/e.jpg"), None, (), "none")]


@needs_pycocotools
def test_coco_writes_masks_with_smaller_objects_on_top(coco):
    """Hand-drawn: a small toothbrush (id 90) on a large person (id 1); a crowd of stop signs, two columns wide (id 13
    but class 12, since there is no id 12)."""
    data.write_coco_masks(data.DATASETS["coco"], coco, "val", [])
    first, second = samples_of("coco", coco, "val")
    expected = np.zeros((12, 16), np.uint8)
    expected[2:10, 2:12] = 1
    expected[4:8, 4:8] = 80
    np.testing.assert_array_equal(data.load_mask(first.mask, 81), expected)
    crowd = np.zeros((12, 16), np.uint8)
    crowd[:, 1:3] = 12
    np.testing.assert_array_equal(data.load_mask(second.mask, 81), crowd)
    assert first.labels == (0, 79) and second.labels == (11,)


@needs_pycocotools
@pytest.mark.parametrize("layout", ["2017", "JPEGImages/val2014", "JPEGImages/val", "masks only"])
def test_coco_layouts_give_the_same_labels(coco, layout):
    """Native 2014 and 2017, the VOC-style one, and no json but masks named as the released code names them."""
    data.write_coco_masks(data.DATASETS["coco"], coco, "val", [])
    if layout == "2017":
        (coco / "val2014").rename(coco / "val2017")
        for path in list((coco / "val2017").iterdir()):
            path.rename(path.with_name(data.coco_name(path.stem) + ".jpg"))
        (coco / "annotations/instances_val2014.json").rename(coco / "annotations/instances_val2017.json")
    else:
        (coco / "JPEGImages").mkdir()
        (coco / "val2014").rename(coco / ("JPEGImages/val" if layout == "masks only" else layout))
    if layout == "masks only":
        (coco / "annotations/instances_val2014.json").unlink()
        mask_file(coco / "SegmentationClass/val2014/COCO_val2014_000000000009.png", [0])  # the long name, and no object
    samples = samples_of("coco", coco, "val")
    assert [(s.name, s.labels) for s in samples] == [("000000000007", (0, 79)), ("000000000008", (11,))]
    assert all(s.mask and s.source == ("mask" if layout == "masks only" else "json") for s in samples)


def test_coco_trains_with_the_json_only(coco):
    """No mask is needed for image-level labels; scoring says which command writes them."""
    samples = samples_of("coco", coco, "val")
    assert "mask" not in train.TrainDataset(samples, 81, 16)[0]
    with pytest.raises(data.DataError, match="python 01_data.py coco"):
        train.TrainDataset(samples, 81, 16, with_masks=True)


def test_a_folder_with_a_table_has_its_own_classes(tmp_path):
    """Excel's byte order mark, umlauts, spaces, sub-folders, an empty line, a picture without a class, a mask."""
    for file in ("Größe 1.jpg", "sub/b.png", "c.jpg"):
        picture(tmp_path / file)
    mask_file(tmp_path / "masks/sub/b.png", [0, 2])
    (tmp_path / "labels.csv").write_text("\ufefffile,classes,split\nGröße 1.jpg,red_panda;Bär,\n\n"
                                         "sub/b.png, Bär ,val\nc.jpg,\n", encoding="utf-8")
    info = data.dataset_info(str(tmp_path))
    assert (info.name, info.classes, info.prompts) == ("folder", ("Bär", "red_panda"), ("Bär", "red panda"))
    train, val = (data.list_samples(info, tmp_path, split) for split in ("train", "val"))
    assert [(s.name, s.labels, s.mask) for s in train] == [("Größe 1", (0, 1), None), ("c", (), None)]
    assert [(s.name, s.labels, s.mask) for s in val] == [("sub/b", (0,), str(tmp_path / "masks/sub/b.png"))]


def test_a_folder_without_a_table_has_a_class_per_sub_folder(tmp_path):
    """Hidden files and the folder `masks` are no classes; a class that is a background word leaves that list."""
    for file in ("tree/1.jpg", "tree/2.JPG", "cat/1.jpg", ".cache/1.jpg", "masks/cat/1.jpg", "masks/x.jpg"):
        picture(tmp_path / file)
    info = data.dataset_info(str(tmp_path))
    samples = data.list_samples(info, tmp_path, "train")
    assert info.classes == ("cat", "tree") and "tree" not in info.background and "grass" in info.background
    assert [(s.name, s.labels) for s in samples] == [("cat/1", (0,)), ("tree/1", (1,)), ("tree/2", (1,))]
    assert data.dataset_info(str(tmp_path), background=["wall"]).background == ("wall",)


def test_the_table_of_prompts_follows_the_papers():
    """Counts and the oddest entries; the towers see these very strings."""
    voc, coco = data.DATASETS["voc"], data.DATASETS["coco"]
    assert (len(voc.classes), len(voc.background), len(coco.classes), len(coco.background)) == (20, 25, 80, 23)
    assert voc.prompts[14] == "person with clothes,people,human" and voc.prompts[10] == "diningtable"
    for name, prompt in (("snowboard", "sknowboard"), ("tv", "tvmonitor screen"), ("couch", "sofa"), ("bed", "bed")):
        assert coco.prompts[coco.classes.index(name)] == prompt
    assert set(data.REWRITTEN) <= set(voc.classes + coco.classes)


# ---------------------------------------------------------------- the toy world

def test_shapes_lies_on_disk_like_a_folder_of_ones_own(tmp_path):
    """One loader for both; labels are the classes seen in the exact masks; the same seed draws the same pictures."""
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        draw.make_shapes(tmp_path / name, data.save_mask, seed=seed, n_train=3, n_val=2)
    samples = samples_of("shapes", tmp_path / "one", "train")
    assert len(samples) == 3 and len(samples_of("shapes", tmp_path / "one", "val")) == 2
    for sample in samples:
        assert sample.labels == data.mask_labels(data.load_mask(sample.mask, 1 + len(data.SHAPES_CLASSES)))
    assert data.dataset_info(str(tmp_path / "one")).name == "folder"
    drawn = [(tmp_path / name / "images/00000.png").read_bytes() for name in ("one", "two", "other")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_shapes_is_not_drawn_into_the_folder_of_something_else(voc):
    """`shapes --data-path VOCdevkit` is a slip; nothing is drawn and nothing is lost."""
    with pytest.raises(data.DataError, match="JPEGImages"):
        samples_of("shapes", voc, "train")
    assert not (voc / "labels.csv").exists()


def test_shapes_drawn_twice_at_once_is_drawn_whole(tmp_path):
    """Several processes may start on a bare machine: the second finds the place taken and leaves it as it is."""
    draw.make_shapes(tmp_path / "shapes", data.save_mask, n_train=1, n_val=1)
    before = (tmp_path / "shapes/labels.csv").stat().st_mtime_ns
    draw.make_shapes(tmp_path / "shapes", data.save_mask, n_train=1, n_val=1)
    assert (tmp_path / "shapes/labels.csv").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


# ---------------------------------------------------------------- augmentation

@needs_golden
def test_scale_normalisation_and_palette_are_the_released_ones():
    """Single functions of the authors' code on the same input."""
    golden = np.load(SHARED / "golden/p2_units.npz")
    image = golden["rescale_in_u8"]
    for name, factor in (("rescale_073", 0.73), ("rescale_160", 1.6)):
        np.testing.assert_array_equal(data.rescale(image, factor), golden[name])
    np.testing.assert_allclose(data.normalize(image).permute(1, 2, 0), golden["normalize_out"], atol=2e-6)
    np.testing.assert_array_equal(data.colormap(256), golden["voc_colormap"])


def test_crop_is_a_window_of_an_image_on_a_black_canvas():
    """The slow way: put the image on a canvas of max(size, side), cut the window. Wide, tall, small, large images."""
    size = 5
    for height, width in ((3, 8), (8, 3), (2, 4), (9, 7), (5, 5)):
        image = np.arange(1, 1 + height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        for top in range(abs(height - size) + 1):
            for left in range(abs(width - size) + 1):
                canvas = np.zeros((max(size, height), max(size, width), 3), np.uint8)
                y, x = top * (height < size), left * (width < size)
                canvas[y:y + height, x:x + width] = image
                y, x = top * (height > size), left * (width > size)
                np.testing.assert_array_equal(data.crop(image, size, top, left), canvas[y:y + size, x:x + size])


def test_image_and_mask_stay_together():
    """Whatever is drawn: pixels of value 200 are labelled 2, the rest of the image 0, and 255 is where no image is."""
    image, mask = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
    image[:, 20:], mask[:, 20:] = 200, 2
    padded, mirrored = 0, 0
    for seed in range(40):
        view, labels = data.augment(image, mask, 48, np.random.default_rng(seed))
        assert view.shape == (48, 48, 3) and labels.shape == (48, 48)
        assert set(np.unique(labels)) <= {0, 2, 255}  # a mask is never interpolated
        np.testing.assert_array_equal(labels == 255, view[..., 0] == 0)
        np.testing.assert_array_equal(labels[view[..., 0] == 200], 2)
        np.testing.assert_array_equal(labels[view[..., 0] == 100], 0)
        padded += (labels == 255).any()
        row = labels[24][labels[24] < 255]
        mirrored += bool(len(row)) and row[0] > row[-1]
    assert 5 < padded < 40 and 5 < mirrored < 35


def test_a_view_is_scaled_between_half_and_double_and_cut_anywhere():
    """A ramp shows the scale: neighbouring pixels differ by 1 / factor; and the crops start at both ends."""
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)  # 4 per pixel, 60 wide
    steps = []
    for seed in range(60):
        view, _ = data.augment(ramp, None, 16, np.random.default_rng(seed))
        row = view[8, :, 0].astype(float)
        steps.append(abs(row[-1] - row[0]) / 15)
    factors = 4 / np.array([step for step in steps if step > 1])
    assert factors.min() > 0.45 and factors.max() < 2.2 and factors.min() < 0.7 and factors.max() > 1.7


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 333)])
def test_tiny_and_odd_pictures_make_a_view(size):
    """Half of one pixel is still one pixel."""
    for seed in range(5):
        view, _ = data.augment(np.full((*size, 3), 9, np.uint8), None, 32, np.random.default_rng(seed))
        assert view.shape == (32, 32, 3) and (view == 9).any()


def test_padding_ends_up_at_minus_mean_over_deviation():
    """The canvas is black before normalisation, not after it."""
    expected = torch.tensor([-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375])
    torch.testing.assert_close(data.normalize(np.zeros((2, 3, 3), np.uint8))[:, 1, 2], expected)


# ---------------------------------------------------------------- what the loops read

@pytest.fixture
def samples(tmp_path) -> list:
    pictures = [picture(tmp_path / f"p{n}.png", 20 + n, 30, seed=n) for n in range(5)]
    masks = [mask_file(tmp_path / f"m{n}.png", [0, 1 + n % 3], 20 + n, 30) for n in range(5)]
    return [data.Sample(f"p{n}", str(pictures[n]), str(masks[n]), (n % 3,), "csv") for n in range(5)]


def test_every_epoch_shows_every_image_once_in_a_new_order(samples):
    """Draws 0..4 are the first epoch, 5..9 the second, and so on."""
    dataset = train.TrainDataset(samples, 4, 16, seed=1)
    epochs = [[dataset[draw]["name"] for draw in range(first, first + 5)] for first in (0, 5, 10)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_image_looks_different_at_every_draw(samples):
    """The view belongs to the draw, not to the image or the epoch."""
    dataset = train.TrainDataset(samples[:1], 4, 16)
    views = {dataset[draw]["image"].numpy().tobytes() for draw in range(6)}
    assert len(views) == 6


def test_two_processes_take_the_same_steps_as_one():
    """Rank 0 and rank 1 with 2 images each see together what one process with 4 sees; a run may start at any step."""
    alone = list(train.draw_batches(0, 6, 4))
    ranks = [train.draw_batches(0, 6, 2, rank, 2) for rank in (0, 1)]
    assert [[*a, *b] for a, b in zip(*ranks)] == [list(batch) for batch in alone]
    assert sorted(draw for batch in alone for draw in batch) == list(range(24))
    assert list(train.draw_batches(4, 6, 4)) == alone[4:]
    assert next(train.draw_batches(0, 10**9, 4)) == range(4)  # at once, and without a list of them


def test_the_same_views_for_any_number_of_workers_and_after_a_resume(samples):
    """A view depends on (seed, draw) alone; workers started with `spawn` find the dataset's class by its module."""
    dataset = train.TrainDataset(samples, 4, 16, seed=1, with_masks=True)
    plain = [dataset[draw] for draw in range(8)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=train.draw_batches(1, 4, 2), num_workers=2,
                                         multiprocessing_context="spawn")
    for step, batch in enumerate(loader, 1):
        for row, expected in enumerate(plain[2 * step:2 * step + 2]):
            assert batch["name"][row] == expected["name"]
            assert all(torch.equal(batch[key][row], expected[key]) for key in ("image", "labels", "mask"))
    assert step == 3
    other = train.TrainDataset(samples, 4, 16, seed=2)
    assert any(not torch.equal(other[draw]["image"], plain[draw]["image"]) for draw in range(8))


def test_items_have_the_shapes_they_promise(samples):
    """Height before width; labels multi-hot without background; the true mask only when asked for."""
    item = train.TrainDataset(samples, 4, 16)[3]
    assert item.keys() == {"name", "image", "labels", "broken"} and item["image"].shape == (3, 16, 16)
    whole = data.as_item(samples[3], *data.load_pair(samples[3], 4, True), 4)
    assert whole["image"].shape == (3, 23, 30) and whole["mask"].shape == (23, 30)
    assert whole["mask"].dtype == torch.uint8
    assert whole["name"] == "p3" and whole["labels"].tolist() == [1, 0, 0]


def test_images_without_a_class_are_left_out_of_training_and_counted(samples):
    """There is nothing to learn from them; the released code fails on one."""
    empty = data.Sample("empty", samples[0].image, None, (), "mask")
    dataset = train.TrainDataset([empty, *samples, empty], 4, 16)
    assert len(dataset) == 5 and dataset.skipped == 2
    with pytest.raises(data.DataError, match="none of 1 images has a foreground class"):
        train.TrainDataset([empty], 4, 16)


# ---------------------------------------------------------------- masks and pictures for people

def test_a_saved_mask_comes_back_in_vocs_colours(tmp_path):
    """Values are the classes, the palette is for the eye: aeroplane is dark red, void is cream."""
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    mask[0, 0] = 255
    data.save_mask(tmp_path / "m.png", mask)
    np.testing.assert_array_equal(data.load_mask(tmp_path / "m.png", 21, (3, 4)), mask)
    with Image.open(tmp_path / "m.png") as image:
        colours = np.array(image.convert("RGB"))
    assert colours[0, 1].tolist() == [128, 0, 0] and colours[0, 0].tolist() == [224, 224, 192]
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_an_overlay_tints_regions_draws_their_outlines_and_names_the_classes_below():
    """Class 2 on a grey picture: its inside is tinted, its rim has its full colour, the rest is as it was; small is enlarged."""
    image, mask = np.full((30, 60, 3), 50, np.uint8), np.zeros((30, 60), np.uint8)
    mask[10:20, 20:40] = 2
    shown, colour = data.overlay(image, mask, ("cat", "dog", "cow")), data.display_colours()[2]
    assert shown.shape == (180 + 20, 360, 3) and (shown[:50] == 50).all()
    assert (shown[60:62, 130:230] == colour).all() and (shown[90, 180] == (.5 * 50 + .5 * colour).round()).all()
    assert (shown[180:] == colour).all(-1).any()
    np.testing.assert_array_equal(data.overlay(image, mask, ("owl", "dog", "fox")), shown)  # only class 2 is seen
    assert (data.overlay(image, mask, ("cat", "fox", "cow")) != shown).any()


def test_colours_for_people_are_bright_and_distinct():
    """No class is grey or dark, and those with near numbers are far apart: the 8 of the toy, and any 8 in a row of COCO's."""
    colours = data.display_colours()[1:81].astype(int)
    assert (np.ptp(colours, axis=1) >= 90).all() and (colours.max(axis=1) >= 200).all()
    for start in range(73):
        some = colours[start:start + 8]
        distance = np.abs(some[:, None] - some).sum(axis=2) + 999 * np.eye(8, dtype=int)
        assert distance.min() >= 60, start


def test_a_contact_sheet_is_a_table_of_pictures_of_any_height():
    """Nothing overlaps: each picture's own colour is found at its full width, in its own row and column."""
    sizes = ((10, 40), (30, 80), (5, 120), (1, 160))
    pictures = [np.full((height, 10, 3), (value, 0, 0), np.uint8) for height, value in sizes]
    table = np.asarray(data.contact_sheet(pictures, ["x" * 99, "b", "", ""], columns=2, side=60))
    for value, height in ((40, 60), (80, 180), (120, 30), (160, 6)):
        rows, columns = np.nonzero((table == (value, 0, 0)).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (height, 60, 60 * height)


def test_a_contact_sheet_takes_pictures_of_any_shape():
    """1 x 500, 500 x 1 and a caption that is too long: nothing overlaps, the sheet stays in its columns."""
    pictures = [np.full((*size, 3), 200, np.uint8) for size in ((1, 500), (500, 1), (20, 20))]
    sheet = data.contact_sheet(pictures, ["x" * 300, "", "Übung"], columns=2, side=60)
    assert sheet.width == 2 * 68 and sheet.height < 2 * (3 * 60 + 28)
    assert (np.asarray(sheet)[:, -4:] == 255).all()


# ---------------------------------------------------------------- broken and hostile input

@needs_samples
def test_awkward_pictures_are_read_or_refused_as_pillow_says(recwarn):
    """57 odd files: a picture of three channels at its size, or an error with the file's name; no warning."""
    for row in index("awkward"):
        path = SAMPLES / "awkward" / row["file"]
        if row["pillow_result"] == "ok":
            width, height = map(int, row["size"].split("x"))
            image = data.load_image(path)
            assert image.shape == (height, width, 3) and image.dtype == np.uint8, row["file"]
        else:
            with pytest.raises(data.DataError, match=re.escape(row["file"])):
                data.load_image(path)
        try:
            data.load_image(path, as_displayed=True)
        except data.DataError:
            assert row["pillow_result"] != "ok", row["file"]
    assert not [str(w.message) for w in recwarn if "Palette" in str(w.message) or "Decompression" in str(w.message)]


@needs_samples
def test_exif_orientation_counts_for_display_only():
    """The eight orientations of one photo look alike when displayed; training sees the stored pixels, as masks do."""
    upright = data.load_image(SAMPLES / "awkward/hopper_orientation_2.jpg", as_displayed=True).astype(float)
    for number in range(3, 9):
        path = SAMPLES / "awkward" / f"hopper_orientation_{number}.jpg"
        assert np.abs(data.load_image(path, as_displayed=True) - upright).mean() < 8
        assert np.abs(data.load_image(path) - upright).mean() > 20
    assert data.load_image(SAMPLES / "awkward/Landscape_6.jpg").shape == (1800, 1200, 3)
    assert data.load_image(SAMPLES / "awkward/Landscape_6.jpg", as_displayed=True).shape == (1200, 1800, 3)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    """Pillow's own conversion turns everything above 255 white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(data.load_image(tmp_path / "deep.png")[..., 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """A white square on black is that in any mode."""
    drawing = Image.new("RGB", (8, 6))
    ImageDraw.Draw(drawing).rectangle([4, 0, 7, 5], fill="white")
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    drawing.convert(mode).save(path)
    image = data.load_image(path)
    assert (image[:, :4] == 0).all() and (image[:, 4:] == 255).all()


def test_an_image_bomb_is_refused(tmp_path, monkeypatch):
    """Pillow's limit stays, and its error, which is no OSError, becomes ours."""
    picture(tmp_path / "bomb.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(data.DataError, match="bomb.png.*DecompressionBombError"):
        data.load_image(tmp_path / "bomb.png")


def test_floating_point_pictures_and_missing_files_are_refused(tmp_path):
    """No guess at their range; the message has the path and what to do."""
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(data.DataError, match="f.tif.*8 bits"):
        data.load_image(tmp_path / "f.tif")
    with pytest.raises(data.DataError, match="nowhere.jpg"):
        data.load_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("values, mode, size, message", [
    ([0, 1], "RGB", (12, 16), "not mode RGB"), ([0, 1], "P", (16, 12), r"\(12, 16\).*\(16, 12\)"),
    ([0, 21, 200], "L", (12, 16), r"\[21, 200\].*0..20"), ([0, 1], "1", None, "not mode 1")])
def test_wrong_masks_are_refused(tmp_path, values, mode, size, message):
    """Colours instead of numbers, another size than the picture's, numbers that are no class."""
    path = mask_file(tmp_path / "m.png", values)
    with Image.open(path) as image:
        changed = image.convert(mode) if mode != "L" else Image.fromarray(np.array(image))
    changed.save(path)
    with pytest.raises(data.DataError, match=f"m.png.*{message}"):
        data.load_mask(path, 21, size)


@pytest.mark.parametrize("text, message", [
    ('<!DOCTYPE x [<!ENTITY a "b">]><annotation/>', "DOCTYPE"), ("<annotation><object>", "broken XML"),
    ("<annotation><object><name>unicorn</name></object></annotation>", "'unicorn'.*aeroplane"),
    ("<annotation><object/></annotation>", "unknown class ''"), ("", "broken XML"),
    ('<?xml version="1.0" encoding="nonsense"?><annotation/>', None)])
def test_broken_and_hostile_xml_is_refused(tmp_path, text, message):
    """Entities can fill the memory; a class nobody knows would be lost in silence."""
    (tmp_path / "x.xml").write_text(text)
    with pytest.raises(data.DataError, match=f"x.xml.*{message or ''}"):
        if not data.xml_labels(tmp_path / "x.xml", data.VOC_CLASSES) and message is None:
            raise data.DataError("x.xml: read as text, which it is")


def test_xml_in_an_encoding_that_hides_a_doctype_is_refused(tmp_path):
    """UTF-16 has a zero byte between the letters of <!DOCTYPE."""
    (tmp_path / "x.xml").write_bytes('<!DOCTYPE x []><annotation/>'.encode("utf-16"))
    with pytest.raises(data.DataError, match="x.xml.*UTF-8"):
        data.xml_labels(tmp_path / "x.xml", data.VOC_CLASSES)


@pytest.mark.parametrize("change, message", [
    (lambda c: c["images"][0].update(file_name="../secret.jpg"), "leads out"),
    (lambda c: c["images"][0].update(file_name="/etc/secret.jpg"), "leads out"),
    (lambda c: c["images"][0].update(file_name="C:\\secret.jpg"), "leads out"),
    (lambda c: c["images"][0].update(file_name=5), "leads out"),
    (lambda c: c["categories"][3].update(name="unicorn"), "'unicorn'"),
    (lambda c: c["images"][0].pop("width"), "a wrong record of a picture, .*KeyError"),
    (lambda c: c["annotations"][0].update(image_id=[1]), "TypeError"),
    (lambda c: c["images"][0].update(height="tall"), "ValueError"),
    (lambda c: c.pop("images"), "KeyError"), (lambda c: c["categories"].clear(), "ValueError")])
def test_broken_and_hostile_json_is_refused(coco, change, message):
    """Names that lead out of the folder, unknown categories, anything not in COCO's format: an error with the file."""
    path = coco / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(data.DataError, match=f"instances_val2014.json.*{message}"):
        samples_of("coco", coco, "val")


@needs_pycocotools
@pytest.mark.parametrize("segmentation", [
    {"counts": [12, 24, 10 ** 12], "size": [12, 16]}, {"counts": [-1, 193]}, {"counts": "compressed"}, None, {},
    {"counts": [48, 48, 96], "size": [16, 12]}, {"counts": [1.5, 190.5]}, {"counts": []}, {"counts": "\u00e9"}, {"counts": "o" * 99},
    [[1e9, 1, 2, 2, 3, 3]], [[float("nan")] * 6], [[1, 2, 3]], [["a"] * 6], [[1, 2, 3, 4, 5, 6], 7]])
def test_objects_that_cannot_be_drawn_are_named_with_their_picture(segmentation):
    """Run lengths that do not fill the picture or are those of a turned one, corners at the end of the world: no memory is
    spent on them, and nothing is written beyond a buffer."""
    with pytest.raises(data.DataError, match="street: no mask is written, object 31 cannot be drawn"):
        data.coco_mask(12, 16, [(0, segmentation, 31)], "street")


@needs_pycocotools
def test_compressed_run_lengths_are_read_as_pycocotools_reads_them():
    """Random masks, as strings by the package that defines the form: many runs, long ones, and an empty mask."""
    official, chance = pytest.importorskip("pycocotools.mask"), np.random.default_rng(0)
    for size, share in (((12, 16), 0.5), ((300, 400), 0.001), ((40, 60), 0)):
        mask = chance.random(size) < share
        packed = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        found = data.object_mask({"size": list(size), "counts": packed["counts"].decode()}, *size)
        np.testing.assert_array_equal(found, mask)


@needs_pycocotools
def test_one_odd_object_costs_its_picture_and_stops_no_other(coco, capsys):
    """A stray click of two points draws nothing; a wrong object leaves its picture without a mask; objects of pictures that
    were taken out are counted. Training reads the same json without a word."""
    path = coco / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    of_first, of_second = ([a for a in content["annotations"] if a["image_id"] == image["id"]] for image in content["images"][:2])
    of_first[0]["id"] = 31
    of_first[0]["segmentation"].append([12, 8, 30, 16])
    of_second[0].update(segmentation={"counts": [1, 2]}, id=77)
    content["annotations"].append(of_first[0] | {"id": 500, "image_id": 404})
    path.write_text(json.dumps(content))
    assert data.main(["coco", "--data-path", str(coco)]) == 1
    printed = capsys.readouterr()
    first, second = samples_of("coco", coco, "val")
    assert Path(first.mask).name == "000000000007.png" and second.mask is None
    assert f"{second.name}: no mask is written, object 77 cannot be drawn" in printed.out
    assert f"{first.name}: object 31 or a part of it has no area" in printed.err
    assert "not list are left out, 1: 500 of picture 404" in printed.err


@pytest.mark.parametrize("table, message", [
    ("a.jpg,cat,training\n", "line 1.*train|val"), ("file,classes\na.jpg,cat,val,more\n", "line 2"),
    ("../a.jpg,cat\n", "leads out"), (",cat\n", "line 1"), ("a.jpg,cat\na.jpg,dog\n", "a in more than one line")])
def test_broken_tables_are_refused_with_the_line(tmp_path, table, message):
    """A table is written by hand: say where the slip is."""
    picture(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(data.DataError, match=message):
        data.list_samples(data.dataset_info(str(tmp_path)), tmp_path, "train")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    """Older programs write umlauts their own way; the mend is in the message."""
    (tmp_path / "labels.csv").write_bytes("a.jpg,Bär\n".encode("latin-1"))
    with pytest.raises(data.DataError, match="labels.csv.*save it as UTF-8"):
        data.dataset_info(str(tmp_path))


def test_folders_without_classes_and_unknown_names_are_refused(tmp_path):
    """A mistyped data set, an empty folder, a split that the data set does not have."""
    with pytest.raises(data.DataError, match="vok.*voc, coco, shapes"):
        data.dataset_info("vok")
    with pytest.raises(data.DataError, match="labels.csv"):
        data.dataset_info(str(tmp_path))
    with pytest.raises(data.DataError, match="train_aug, train, val, test"):
        samples_of("voc", tmp_path, "trainval")


def test_missing_files_are_counted_and_the_first_ten_named(voc):
    """Found before the first step, not after an hour."""
    names = [f"n{number:02}" for number in range(12)]
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(["a", *names]))
    with pytest.raises(data.DataError, match=f"12 images of train .* missing: {', '.join(names[:10])}, [.]{{3}};"):
        samples_of("voc", voc, "train")


def test_a_train_image_without_any_label_file_is_missed(voc):
    """Neither XML nor mask: it would be skipped in silence."""
    (voc / "SegmentationClassAug/d.png").unlink()
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("a\nd\n")
    with pytest.raises(data.DataError, match="1 label files of train_aug .* missing: d"):
        samples_of("voc", voc, "train_aug")


@needs_pycocotools
def test_mutated_files_end_in_a_clean_error_or_a_result(voc, coco, tmp_path):
    """300 files with some bytes changed, cut or doubled (fixed seeds): nothing but DataError ever comes out, each within
    10 s, and no more than 1 GB of memory is taken (a forged size may take what Pillow's limit allows)."""
    resource = pytest.importorskip("resource", reason="needs the limits and alarms of Unix")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = tmp_path / "own"
    picture(folder / "a.jpg")
    (folder / "labels.csv").write_text("file,classes\na.jpg,cat;dog\n")
    own = lambda: data.list_samples(data.dataset_info(str(folder)), folder, "train")
    targets = [(voc / "JPEGImages/a.jpg", lambda: data.load_image(voc / "JPEGImages/a.jpg", as_displayed=True)),
               (voc / "SegmentationClassAug/a.png", lambda: data.load_mask(voc / "SegmentationClassAug/a.png", 21)),
               (voc / "Annotations/a.xml", lambda: samples_of("voc", voc, "train")),
               (voc / "ImageSets/Segmentation/train.txt", lambda: samples_of("voc", voc, "train")),
               (coco / "annotations/instances_val2014.json",
                lambda: data.write_coco_masks(data.DATASETS["coco"], coco, "val", [])),
               (folder / "labels.csv", own)]
    refused = 0
    for path, read in targets:
        whole = path.read_bytes()
        for seed in range(50):
            path.write_bytes(mutated(whole, seed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on broken metadata
                signal.alarm(10)
                try:
                    read()
                except data.DataError:
                    refused += 1
                finally:
                    signal.alarm(0)
        path.write_bytes(whole)
        read()
    assert 100 < refused < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # kB


# ---------------------------------------------------------------- the command line

def test_check_lists_all_problems_at_once(voc, tmp_path, capsys):
    """One run, one list: whoever mends a data set does not want to start it ten times."""
    (voc / "JPEGImages/a.jpg").write_bytes(b"no picture")
    mask_file(voc / "SegmentationClassAug/c.png", [0, 77])
    xml_file(voc / "Annotations/b.xml", "unicorn")
    mask_file(voc / "SegmentationClassAug/d.png", [0, 3], height=5)
    (voc / "ImageSets/Segmentation/train.txt").write_text("a\nb\ngone\n")
    assert data.main(["voc", "--data-path", str(tmp_path), "--check"]) == 1
    printed = capsys.readouterr().out
    problems = [line for line in printed.splitlines() if line.startswith("problem: ")]
    for part in ("a.jpg: cannot be read", "c.png: values [77]", "b.xml: unknown class 'unicorn'", "missing: gone",
                 "d.png: mask of (5, 16)", "train_aug: 2 usable images, the published split has 10582"):
        assert any(part in line for line in problems), part
    assert "6cd6e144f989b92b3379bac3b3de84fd" in printed and len(problems) == len(set(problems))


def test_check_counts_masks_that_contradict_the_label(voc, tmp_path, capsys):
    """In the real train_aug one image in twelve; here one of c's classes is missing from its mask."""
    mask_file(voc / "SegmentationClassAug/c.png", [0, 15])
    data.main(["voc", "--data-path", str(tmp_path), "--check"])
    printed = capsys.readouterr().out
    assert re.findall(r"of (\d) masks, (\d) show other classes than the labels", printed) == [("3", "0"), ("1", "1")]
    assert "labels from xml (2), mask (1)" in printed


def test_check_of_a_sound_folder_finds_nothing_and_draws_the_sheet(tmp_path, capsys):
    """Status 0; the sheet has the pictures with their labels."""
    draw.make_shapes(tmp_path / "shapes", data.save_mask, n_train=2, n_val=1)
    folder, sheet = str(tmp_path / "shapes"), str(tmp_path / "sheet.png")
    assert data.main(["shapes", "--data-path", folder, "--check", "--sheet", sheet]) == 0
    assert "no problems" in capsys.readouterr().out
    assert data.load_image(sheet).shape[1] == 6 * 248


@needs_pycocotools
def test_coco_command_writes_the_masks_and_check_does_not(coco, capsys):
    """Scoring needs them; a look must not change the data. That train2014 is not there is a problem of its own."""
    assert data.main(["coco", "--data-path", str(coco), "--check"]) == 1
    assert not (coco / "SegmentationClass").exists()
    assert data.main(["coco", "--data-path", str(coco)]) == 1
    assert sorted(path.name for path in (coco / "SegmentationClass/val2014").iterdir()) == ["000000000007.png",
                                                                                         "000000000008.png"]
    assert capsys.readouterr().out.count("problem: no images of train") == 2


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_without_data_three_lines_say_what_to_fetch_from_where_and_where_to_put_it(name, tmp_path):
    """The first thing a newcomer sees."""
    with pytest.raises(data.DataError) as error:
        data.find_root(name, tmp_path / "nothing")
    what, source, target = str(error.value).splitlines()
    assert "Fetch" in what and source.startswith("from http") and str(tmp_path / "nothing") in target


def test_an_error_is_printed_without_traceback_and_ends_with_status_2(tmp_path):
    """Started from another folder, as people do."""
    result = subprocess.run([sys.executable, data.__file__, "voc", "--data-path", str(tmp_path)], cwd=tmp_path,
                            capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no voc data in") and len(result.stderr.splitlines()) == 3


def test_names_that_the_terminal_cannot_show_stop_nothing(tmp_path):
    """As on Windows, when the output goes to a file."""
    (tmp_path / "Vögel").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Vögel" / "a.png")
    result = subprocess.run([sys.executable, data.__file__, str(tmp_path)], capture_output=True, text=True,
                            env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert result.returncode == 0 and "V\\xf6gel" in result.stdout and not result.stderr


def test_long_options_take_both_kinds_of_dashes():
    """The values after them stay as they are."""
    assert data.parse_args(["voc", "--data_path", "my_data"]).data_path == "my_data"
    assert data.parse_args(["voc", "--data_path=my_data"]).data_path == "my_data"


def test_a_workers_error_reaches_the_user_as_one_line(capsys):
    """torch wraps it in the worker's traceback."""
    def fails():
        raise data.DataError('Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  File "x"\n'
                             '01_data.DataError: a.jpg: cannot be read\nsecond line')
    with pytest.raises(SystemExit) as stop:
        data.run(fails)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: a.jpg: cannot be read\nsecond line\n"


# ---------------------------------------------------------------- nothing is wrong without a word

def own_samples(root: Path, split: str = "train") -> list:
    return data.list_samples(data.dataset_info(str(root)), root, split)


def test_only_the_listed_formats_are_opened_whatever_a_file_is_called(tmp_path):
    """Each format that Pillow can write, under the name x.jpg: read if it is on the list, else refused by its content."""
    Image.init()
    accepted = refused = 0
    for name in Image.SAVE:
        content = io.BytesIO()  # not the file: one of Pillow's plugins takes its ending for its own from then on
        try:
            Image.new("RGB", (8, 8), "red").save(content, format=name)
        except Exception:  # a format of other modes, or one that needs a package
            continue
        (tmp_path / "x.jpg").write_bytes(content.getvalue())
        if name in data.FORMATS or name == "MPO":  # MPO is a JPEG with more pictures behind it
            assert data.load_image(tmp_path / "x.jpg").shape == (8, 8, 3)
            accepted += 1
        elif name not in ("PDF", "XBM"):  # Pillow writes these and does not read them, or as one bit only
            with pytest.raises(data.DataError, match="x.jpg: cannot be read as a picture"):
                data.load_image(tmp_path / "x.jpg")
            refused += 1
    assert accepted >= 8 and refused >= 5
    assert set(data.picture_formats().values()) <= set(data.FORMATS) and "EPS" not in data.FORMATS


def test_a_picture_whose_content_is_eps_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    (tmp_path / "cat.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(data.DataError, match="cat.jpg: cannot be read as a picture"):
        data.load_image(tmp_path / "cat.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_folder_of_ones_own_is_read_as_people_see_it(tmp_path, orientation):
    """Picture and mask alike, in training and in inference. What is stored is what the EXIF note turns into the shown picture."""
    shown = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4).repeat(3).reshape(6, 4, 3) * 10
    note = Image.Exif()
    note[0x0112] = orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of what makes the stored from the shown
    stored = Image.fromarray(shown)
    stored = stored.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else stored
    (tmp_path / "images").mkdir()
    stored.save(tmp_path / "images/a.png", exif=note)
    mask_file(tmp_path / "masks/a.png", [1], 6, 4)
    (tmp_path / "labels.csv").write_text("a.png,cat\n")
    sample = own_samples(tmp_path)[0]
    image, mask = data.load_pair(sample, 2, True)
    np.testing.assert_array_equal(image, shown)
    assert mask.shape == (6, 4) and data.load_image(sample.image).shape[:2] == np.array(stored).shape[:2]


@pytest.mark.parametrize("text", [
    "file,classes\na.png,cat;dog\nb.png,dog", "image\tlabels\na.png\tcat;dog\nb.png\tdog", "a.png;cat|dog\nb.png;dog",
    "filename,labels\na.png,cat|dog\nb.png,dog"])
def test_tables_of_others_are_read(tmp_path, text):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text(text)
    assert [(s.name, s.labels) for s in own_samples(tmp_path)] == [("a", (0, 1)), ("b", (1,))]


@pytest.mark.parametrize("cell", ['"{""choices"":[""cat"",""dog""]}"', "cat#dog", '"cat,dog"', "cat,dog"])
def test_tables_that_are_not_understood_are_refused_with_the_line(tmp_path, cell):
    (tmp_path / "labels.csv").write_text(f"a.png,cat\nb.png,{cell}\n")
    with pytest.raises(data.DataError, match="labels.csv, line 2: .* is not file,class;class"):
        data.dataset_info(str(tmp_path))


def test_classes_made_of_other_classes_are_a_problem(tmp_path, capsys):
    """Separated by spaces each combination became a class of its own."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text("a.png,scab rust\nb.png,rust\nc.png,scab\n")
    assert data.main([str(tmp_path), "--check"]) == 1
    assert "classes made of other classes: scab rust" in capsys.readouterr().out


def test_class_folders_below_train_and_val_are_read_and_what_is_left_out_is_named(tmp_path, capsys):
    """.jfif, .jpe and .avif are pictures too; a .heic is none that Pillow reads, `test` is no class."""
    for name in ("train/cat/1.jpg", "train/dog/2.jfif", "val/cat/3.jpe", "val/dog/deeper/4.png"):
        picture(tmp_path / name)
    (tmp_path / "train/cat/phone.heic").write_bytes(b"ftypheic")
    info = data.dataset_info(str(tmp_path))
    assert info.classes == ("cat", "dog")
    assert [(s.name, s.labels) for s in data.list_samples(info, tmp_path, "val")] == [("val/cat/3", (0,)), ("val/dog/deeper/4", (1,))]
    assert data.main([str(tmp_path), "--check"]) == 1
    assert "1 .heic in train/cat" in capsys.readouterr().out


def test_masks_under_other_names_are_said(tmp_path, capsys):
    """Without a word the folder would train, and be scored on nothing."""
    picture(tmp_path / "images/a.jpg")
    for name in ("gt/a.png", "masks/a_mask.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.csv").write_text("a.jpg,cat\n")
    assert data.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "0 masks" in printed and "left out: 1 .png in gt, 1 .png in masks" in printed and "as masks/NAME.png" in printed


def test_accents_are_one_letter_however_they_are_written(tmp_path):
    """A Mac unpacks names with two, people type them with one; so are classes."""
    whole, parts = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for number in range(2):
        picture(tmp_path / f"{parts}{number}.png")
    (tmp_path / "labels.csv").write_text(f"{whole}0.png,{parts}\n{whole}1.png,{whole}\n", encoding="utf-8")
    assert data.dataset_info(str(tmp_path)).classes == (whole,)
    assert [Path(s.image).exists() for s in own_samples(tmp_path)] == [True, True]


def test_two_records_for_one_thing_are_refused(coco, voc, tmp_path):
    """The last one won without a word: two records of a file, two files of a name, two classes of one prompt."""
    path = coco / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 901})
    path.write_text(json.dumps(content))
    with pytest.raises(data.DataError, match="two records of .*, with the ids 7 and 901"):
        samples_of("coco", coco, "val")
    picture(voc / "JPEGImages/a.png")
    with pytest.raises(data.DataError, match="a.* and a.*: two files of one name"):
        samples_of("voc", voc, "train")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/labels.csv").write_text("a.png,tree_house\nb.png,tree house\n")
    with pytest.raises(data.DataError, match="two classes that CLIP reads as tree house"):
        data.dataset_info(str(tmp_path / "own"))


def test_masks_that_contradict_their_labels_are_a_problem_with_its_causes(tmp_path, capsys):
    """The usual binary masks: 255 for the object, which is void here. The mIoU is silent about the class, and says so."""
    for number in range(4):
        picture(tmp_path / f"images/{number}.png")
        mask_file(tmp_path / f"masks/{number}.png", [0, 0, 255])
    (tmp_path / "labels.csv").write_text("\n".join(f"{number}.png,fish" for number in range(4)))
    assert data.main([str(tmp_path), "--check"]) == 1
    printed = capsys.readouterr().out
    assert "problem: 4 of 4 masks show other classes than the labels say" in printed and "marked 255, which is void" in printed


@needs_pycocotools
def test_coco_masks_from_before_the_json_are_written_anew(coco, capsys):
    """Annotations were exported again; boxes without a segmentation draw nothing and are refused."""
    data.main(["coco", "--data-path", str(coco)])
    mask = coco / "SegmentationClass/val2014/000000000007.png"
    os.utime(mask, (1, 1))
    data.main(["coco", "--data-path", str(coco), "--check"])
    assert "1 masks of val are older than the json" in capsys.readouterr().out
    data.main(["coco", "--data-path", str(coco)])
    assert mask.stat().st_mtime > 1
    with pytest.raises(data.DataError, match="x: .* object 5 cannot be drawn .it has a box and no segmentation"):
        data.coco_mask(12, 16, [(0, [], 5)], "x")


def test_names_of_a_voc_list_may_hold_dots_and_spaces(voc):
    """Exporters and screenshots: the whole line is a name if there is such a picture, else DeepLab's two columns."""
    for name in ("street_jpg.rf.0a1b", "Screenshot 3 from above"):
        picture(voc / f"JPEGImages/{name}.jpg")
        xml_file(voc / f"Annotations/{name}.xml", "cat")
    (voc / "ImageSets/Segmentation/train.txt").write_text(
        "street_jpg.rf.0a1b\nScreenshot 3 from above\n/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb.jpg\n")
    (voc / "SegmentationClassAug/Thumbs.db").write_bytes(b"no mask")
    picture(voc / "SegmentationClassAug/a.jpg")  # an overlay that somebody has put beside the masks
    assert [s.name for s in samples_of("voc", voc, "train")] == ["street_jpg.rf.0a1b", "Screenshot 3 from above", "a", "b"]
    assert [s.name for s in samples_of("voc", voc, "train_aug")] == ["a", "b", "d"]


@pytest.mark.parametrize("text", ['<annotations><image name="a.jpg"><box label="cat"/></image></annotations>',
                                  '<annotation xmlns="http://example.org/voc"><object><name>cat</name></object></annotation>'])
def test_annotations_of_another_kind_are_no_pictures_without_objects(tmp_path, text):
    """Else every picture would be one that shows nothing."""
    (tmp_path / "x.xml").write_text(text)
    with pytest.raises(data.DataError, match="x.xml: not an annotation of VOC's kind: it begins with <.*Pascal VOC"):
        data.xml_labels(tmp_path / "x.xml", data.VOC_CLASSES)


def test_check_names_what_a_picture_or_a_table_has_that_is_odd(tmp_path, capsys):
    """Twelve bits in sixteen are all but black; background is no class; an empty split is said to be empty, in plain words."""
    grey = (np.random.default_rng(0).random((12, 16)) * 4095).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "scan.png")
    (tmp_path / "labels.csv").write_text("scan.png,Background;leaf\n")
    assert data.main([str(tmp_path), "--check"]) == 1
    printed = capsys.readouterr().out
    assert "scan.png: no pixel is brighter than 16 of 255" in printed and "a class called background" in printed
    assert "val        no images\n" in printed and "0 masks, " not in printed and "1 Background, 2 leaf and 255 void" in printed


@pytest.mark.parametrize("table, message", [(b'a.png,"cat\n', "line 1.*unexpected end"), (b"a.png,c\x07at\n", r"'c\\x07at'"),
                                            (b"a.png,Cat\nb.png,cat\n", "two classes that CLIP reads as cat")])
def test_slips_of_the_keyboard_are_refused_by_name(tmp_path, table, message):
    (tmp_path / "labels.csv").write_bytes(table)
    with pytest.raises(data.DataError, match=message):
        data.dataset_info(str(tmp_path))


def test_a_folder_whose_name_is_no_text_is_named(tmp_path):
    """Bytes of another encoding: Linux lets them pass, CLIP cannot read them."""
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    picture(Path(os.fsdecode(folder)) / "a.png")
    done = subprocess.run([sys.executable, data.__file__, str(tmp_path), "--check"], capture_output=True, text=True)
    assert done.returncode == 2 and "'caf\\udce9'" in done.stderr and "Traceback" not in done.stderr


def test_a_share_of_the_sub_folders_is_kept_for_scoring(tmp_path, capsys):
    """--val-share writes labels.csv, which everything else then reads; it overwrites none."""
    for number in range(10):
        picture(tmp_path / ("cat", "dog")[number % 2] / f"{number}.png")
    assert data.main([str(tmp_path), "--val-share", "0.2"]) == 0
    assert [len(own_samples(tmp_path, split)) for split in ("train", "val")] == [8, 2]
    assert data.dataset_info(str(tmp_path)).classes == ("cat", "dog")
    with pytest.raises(data.DataError, match="--val-share 0.2: wanted .* without labels.csv"):
        data.main([str(tmp_path), "--val-share", "0.2"])


def test_a_sheet_of_no_format_is_refused_before_the_work(tmp_path):
    with pytest.raises(data.DataError, match="--sheet x.xyz.*png"):
        data.main(["shapes", "--data-path", str(tmp_path / "never drawn"), "--sheet", "x.xyz"])
    assert not (tmp_path / "never drawn").exists()
