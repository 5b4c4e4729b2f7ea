"""01 - Data: what does the network see, and what is it told?

In     PASCAL VOC 2012, COCO 2014/2017, a folder of your own, or `shapes`, a toy world that is drawn at first use
Out    `list_samples` (pictures with their image-level labels), `augment`; class names and prompts, overlays
Paper  the experimental set-up of WeCLIP (CVPR 2024) and WeCLIP+ (TPAMI 2025): data sets, labels, augmentation.
       The only supervision is which classes a picture shows; masks are for scoring (and for `--masks truth`).

    python 01_data.py shapes --sheet sheet.png      draw the toy world and look at it
    python 01_data.py voc --check                   every problem of a data set, and where to get what is missing
    python 01_data.py coco --data-path /data/coco   also writes masks from the json, which scoring needs
    python 01_data.py FOLDER                        FOLDER/labels.csv, or one sub-folder of pictures per class

A folder of one's own: `labels.csv` has one line per picture, `file,class;class`, and may have a third column `train` or
`val`. Files lie in FOLDER/images if that exists, else in FOLDER; a mask of cat/a.jpg is FOLDER/masks/cat/a.png, with
the class numbers that `python 01_data.py FOLDER` prints. Without labels.csv each sub-folder is a class.
"""
import argparse
import colorsys
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
import unicodedata
import zlib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from importlib import import_module
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # our folder, wherever we are started from
draw = import_module("shapes.draw")

IGNORE_INDEX = 255                        # "void" in a mask: no score
IMAGE_MEAN = (123.675, 116.28, 103.53)    # ImageNet, RGB, in 0..255; for CLIP and DINO alike, as in the released code
IMAGE_STD = (58.395, 57.12, 57.375)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "AVIF", "PPM")  # Pillow's names. It opens others
# too: for EPS it starts Ghostscript


class DataError(Exception):
    """Input that cannot be used. The message names the file and what mends it; `run` prints it without a traceback."""


@cache
def remark(text: str) -> None:
    """Something odd that stops nothing: said once, by one process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------- the data sets: to add one, a row in DATASETS and SPLITS, and
# its loader in LOADERS; its numbers are those of VOC unless a method has a row for it

@dataclass(frozen=True)
class DatasetInfo:
    name: str                     # "voc", "coco", "shapes", or "folder" for a folder of one's own
    classes: tuple[str, ...]      # the C-1 foreground classes, as people call them; class i is value i + 1 in a mask
    prompts: tuple[str, ...]      # what CLIP's text encoder reads for them, same order
    background: tuple[str, ...]   # what else a picture may show: the rivals of the classes in the CAM's softmax
    folder: str | None = None     # where a folder of one's own lies

    @property
    def num_classes(self) -> int:
        """C, background included."""
        return 1 + len(self.classes)


TEMPLATE = "a clean origami {}."
VOC_CLASSES = tuple("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
                    "pottedplant sheep sofa train tvmonitor".split())
COCO_CLASSES = tuple((
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush").split(", "))
REWRITTEN = {  # names for which the papers' prompt says something else; the rest is read as it is
    "person": "person with clothes,people,human", "bird": "bird avian", "chair": "chair seat",
    "tvmonitor": "tvmonitor screen", "tv": "tvmonitor screen", "motorcycle": "motorbike", "airplane": "aeroplane",
    "couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable", "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol", "handbag": "handbag,purse", "tie": "necktie", "baseball glove": "glove",
    "snowboard": "sknowboard",  # a slip of the released list; it changes the tokens, so it is kept
    "spoon": "dessertspoon", "remote": "remote control", "hair drier": "hairdrier,blowdrier"}
VOC_BACKGROUND = tuple("ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet "
                       "cloud house mountain ocean road rock street valley bridge sign".split())
COCO_BACKGROUND = tuple(word for word in VOC_BACKGROUND if word not in ("keyboard", "sign"))  # COCO classes
SHAPES_CLASSES, SHAPES_BACKGROUND = tuple(draw.FIGURES), tuple(draw.GROUNDS)



def with_prompts(name: str, classes: Iterable[str], background: Iterable[str]) -> DatasetInfo:
    """Any words as a data set; prompts are the papers' where they have one."""
    return DatasetInfo(name, tuple(classes), tuple(REWRITTEN.get(word, word) for word in classes), tuple(background))


DATASETS = {"voc": with_prompts("voc", VOC_CLASSES, VOC_BACKGROUND),
            "coco": with_prompts("coco", COCO_CLASSES, COCO_BACKGROUND),
            "shapes": with_prompts("shapes", SHAPES_CLASSES, SHAPES_BACKGROUND)}
SPLITS = {  # the splits of each data set and how many images the published ones have
    "voc": {"train_aug": 10_582, "train": 1_464, "val": 1_449, "test": 1_456},
    "coco": {"train": 82_081, "val": 40_137},  # images with at least one of the 80 classes
    "shapes": {"train": None, "val": None}, "folder": {"train": None, "val": None}}
FETCH = {  # what to fetch, from where, and what must then exist
    "voc": ("VOCtrainval_11-May-2012.tar (2 GB, md5 6cd6e144f989b92b3379bac3b3de84fd); for train_aug also the list "
            "train_aug.txt (into ImageSets/Segmentation) or the masks SegmentationClassAug",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (often reported down, torchvision takes it from "
            "thor.robots.ox.ac.uk); the list: github.com/zbf1991/WeCLIP, datasets/voc; the masks: made from SBD, "
            "home.bharathh.info/pubs/codes/SBD (reported dead, like their copy on Dropbox)",
            "VOCdevkit/VOC2012/JPEGImages"),
    "coco": ("train2014.zip (13 GB), val2014.zip (6 GB) and annotations_trainval2014.zip",
             "http://images.cocodataset.org/zips/ and http://images.cocodataset.org/annotations/",
             "annotations/instances_train2014.json")}


def dataset_info(name_or_folder: str, background: list[str] | None = None) -> DatasetInfo:
    """What are the classes called, and what is CLIP asked?

    name_or_folder  a row of DATASETS, or a folder of one's own: its class names, in alphabetical order, are the prompts
    background      other background words than the data set's; a folder has VOC's, less those that it has as classes
    Raises  DataError  if it is neither, or the folder has no classes
    """
    if (info := DATASETS.get(str(name_or_folder))) is None:
        root = find_root(name_or_folder)
        rows = folder_rows(root)
        classes = tuple(sorted({name for _, names, _ in rows for name in names}))
        if not 0 < len(classes) < IGNORE_INDEX:
            raise DataError(f"{name_or_folder}: {len(classes)} classes, wanted 1 to {IGNORE_INDEX - 1}; "
                            "write labels.csv (file,class;class) or make one sub-folder of pictures per class")
        words = tuple(word for word in VOC_BACKGROUND if word not in classes)
        info = DatasetInfo("folder", classes, tuple(name.replace("_", " ") for name in classes), words, str(root))
        if twice := [prompt for prompt, number in Counter(map(str.lower, info.prompts)).items() if number > 1]:
            raise DataError(f"{name_or_folder}: two classes that CLIP reads as {', '.join(twice)}; give them one name")
        if odd := [repr(name) for name in classes if {"Cc", "Cs"} & {*map(unicodedata.category, name)}]:  # Cs: bytes, no UTF-8
            raise DataError(f"{name_or_folder}: control characters in class names: {', '.join(odd)}; rename them, in UTF-8")
    return replace(info, background=tuple(background)) if background else info


def find_root(name_or_folder: str, data_path: str | Path | None = None) -> Path:
    """Where is the data? `data_path`, else data/NAME beside this file, else the folder itself.

    For VOC the devkit's parent, VOCdevkit and VOC2012 will all do; -> VOC2012. `shapes` is drawn if there is no folder.
    Raises  DataError  in three lines: what to fetch, from where, where to put it
    """
    name = str(name_or_folder)
    root = Path(data_path or (HERE / "data" / name if name in DATASETS else name)).expanduser()
    if name == "shapes" and not root.exists():
        draw.make_shapes(root, save_mask)
    folders = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012") if name == "voc" else (root,)
    for folder in folders:
        if (folder / "JPEGImages" if name == "voc" else folder).is_dir():
            return folder
    if name not in FETCH:
        raise DataError(f"{root}: no such folder, and no data set of that name; wanted one of {', '.join(DATASETS)} "
                        "or a folder with labels.csv or one sub-folder per class")
    what, where, exists = FETCH[name]
    raise DataError(f"no {name} data in {root}. Fetch {what}\nfrom {where}\n"
                    f"so that {root / exists} exists, or say where it lies: --data-path DIR (without any data: shapes)")


# ---------------------------------------------------------------- pictures and masks

@cache
def picture_formats() -> dict[str, str]:
    """Ending of a file name -> its format, for those of FORMATS that this Pillow has."""
    return {ending: name for ending, name in Image.registered_extensions().items() if name in FORMATS and name in Image.OPEN}


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in picture_formats() and path.name[0] != "." and path.is_file()


def read_picture(path: str | Path, read):
    """read(the opened PIL image), whose format is told by its content; whatever goes wrong becomes a DataError with the path."""
    try:
        with Image.open(path, formats=sorted(set(picture_formats().values()))) as image:
            return read(image)
    except Exception as error:  # broken files make Pillow raise nearly anything, DecompressionBombError among it
        raise DataError(f"{path}: cannot be read as a picture ({type(error).__name__}: {error}); replace the file "
                        "(by JPEG, PNG, WebP, ...: its content counts, not its name) or take it off the list") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 from grey, palette, CMYK, 1 bit, 16 bits, with or without transparency (dropped, not blended)."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip to white
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency
    return np.array(image.convert("RGB"))


def turned(image: Image.Image) -> Image.Image:
    """The picture as people see it. A broken EXIF tag costs the tag and not the picture."""
    image.load()
    with suppress(Exception):  # whatever Pillow makes of broken tags
        ImageOps.exif_transpose(image, in_place=True)
    return image


def load_image(path: str | Path, as_displayed: bool = False) -> np.ndarray:
    """What is in the file? -> (H, W, 3) uint8 RGB, whatever the file holds; of several frames the first.

    as_displayed  turn the picture as its EXIF data says: pictures and folders of one's own. Masks of VOC and COCO fit the
                  stored pixels
    Raises  DataError  with the path, if the file is missing, broken, too large for Pillow, or of floating-point numbers
    """
    return read_picture(path, lambda image: to_rgb(turned(image) if as_displayed else image))


def load_mask(path: str | Path, num_classes: int, size_hw: tuple[int, int] | None = None, as_displayed: bool = False) -> np.ndarray:
    """Which class is at each pixel? -> (H, W) uint8: 0 background, 1..C-1, 255 void.

    size_hw  the size of its picture, if the mask must have it
    Raises   DataError  if the file is no palette or grey picture, has another size, or values that are no class
    """
    mode, mask = read_picture(path, lambda image: (image.mode, np.array(turned(image) if as_displayed else image)))
    if mode not in ("P", "L"):
        raise DataError(f"{path}: a mask is a palette or grey picture (mode P or L) of class numbers, not mode {mode}; "
                        "turn its colours into class numbers")
    if size_hw is not None and mask.shape != tuple(size_hw):
        raise DataError(f"{path}: mask of {mask.shape} (height, width) for a picture of {tuple(size_hw)}; "
                        "make it the picture's size, without interpolation")
    if wrong := [int(value) for value in np.unique(mask) if num_classes <= value != IGNORE_INDEX]:
        raise DataError(f"{path}: values {wrong[:10]} are no class; wanted 0..{num_classes - 1}, or 255 for void")
    return mask


def normalize(image: np.ndarray, mean: tuple = IMAGE_MEAN, std: tuple = IMAGE_STD) -> torch.Tensor:
    """(H, W, 3) in 0..255 -> (3, H, W) float32; mean and deviation, in 0..255, are ImageNet's unless told."""
    scaled = (image.astype(np.float32) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(scaled.transpose(2, 0, 1).copy())


def left_out(paths: Iterable[Path], root: Path | None = None) -> str:
    """What was not taken, in words: "3 .heic, 1 folder", with `root` "3 .heic in images"; "" if nothing."""
    kinds = Counter(("folder" if path.is_dir() else path.suffix.lower() or "without ending")
                    + (f" in {path.parent.relative_to(root)}" if root else "") for path in paths)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


# ---------------------------------------------------------------- image-level labels: all the supervision there is

@dataclass(frozen=True)
class Sample:
    name: str                 # unique in its split; what its prediction is called
    image: str                # path
    mask: str | None          # path, if there is one
    labels: tuple[int, ...]   # 0-based foreground classes in the picture; from VOC's XML in its order, else ascending
    source: str               # where the labels come from: "xml", "json", "csv", "folder", "mask", or "none"
    as_displayed: bool = False  # picture and mask are read as people see them: a folder of one's own; else as they are stored


def list_samples(info: DatasetInfo, root: str | Path | None, split: str, problems: list[str] | None = None) -> list[Sample]:
    """Which pictures does a split have, and which classes does each one show?

    info, root  from `dataset_info` and `find_root` (or anything `find_root` accepts as data_path)
    problems    a list: what is wrong is added to it and left out of the result, instead of raising
    ->          in the order of the split's list; a picture without any class has labels ()
    Raises      DataError  missing files (how many, the first ten), broken labels, unknown classes, no such split
    """
    if split not in SPLITS[info.name]:
        raise DataError(f"{info.name} has no split {split!r}; wanted one of {', '.join(SPLITS[info.name])}")
    found: list[str] = []
    samples = LOADERS[info.name](info, find_root(info.name, root), split, found)
    if found and problems is None:
        raise DataError("\n".join(found[:10] + [f"and {len(found) - 10} more"] * (len(found) > 10)))
    if problems is not None:
        problems += found
    return samples


def describe(samples: list[Sample]) -> str:
    """One line for logs: how many pictures, where their labels come from, how many show no class, how many masks."""
    if not samples:
        return "no images"
    sources = ", ".join(f"{source} ({count})" for source, count in Counter(s.source for s in samples).items())
    return (f"{len(samples)} images, labels from {sources}, {sum(not s.labels for s in samples)} without "
            f"a foreground class, {sum(s.mask is not None for s in samples)} masks")


def missing(what: str, names: list[str]) -> str:
    """A problem in words; "" if no name is missing."""
    return names and (f"{len(names)} {what} missing: {', '.join(names[:10])}{', ...' * (len(names) > 10)}; "
                      "fetch them or take their names off the list") or ""


def gather(read, items: list, problems: list[str]) -> list:
    """[read(item) for item in items]; a DataError goes to the problems, and its item is left out."""
    results = []
    for item in items:
        try:
            results.append(read(item))
        except DataError as error:
            problems.append(str(error))
    return results


def join_samples(info: DatasetInfo, split: str, root: Path, names: list[str], pictures: dict[str, Path],
                 masks: dict[str, Path], read_labels, source: str, problems: list[str]) -> list[Sample]:
    """What all loaders end with: name by name, the picture, its mask and its labels.

    read_labels(name) -> classes, or None where `source` knows nothing of the picture: then its mask tells them
    """
    def sample(name: str) -> Sample:
        labels, mask, origin = read_labels(name), masks.get(name), source
        if labels is None:
            origin = "mask" if mask else "none"
            labels = mask_labels(load_mask(mask, info.num_classes)) if mask else ()
        return Sample(name, str(pictures[name]), str(mask) if mask else None, labels, origin)

    samples = gather(sample, [name for name in names if name in pictures], problems)
    unlabelled = [sample.name for sample in samples if sample.source == "none" and split != "test"]
    problems += filter(None, (missing(f"images of {split} in {root}", [name for name in names if name not in pictures]),
                              missing(f"label files of {split} in {root}", unlabelled)))
    return samples


def mask_labels(mask: np.ndarray) -> tuple[int, ...]:
    """The classes of a mask, ascending, 0-based: without background and void."""
    return tuple(int(value) - 1 for value in np.unique(mask) if value not in (0, IGNORE_INDEX))


def files_by_stem(folder: Path, suffixes: Iterable[str] | None = None) -> dict[str, Path]:
    """Name without suffix -> path, of pictures unless told; {} if there is no such folder. One look instead of 80 000 questions.

    Raises  DataError  if two files have one name
    """
    suffixes, found = picture_formats() if suffixes is None else suffixes, {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and path.name[0] != ".":
            if (other := found.setdefault(nfc(path.stem), path)) != path:
                raise DataError(f"{path} and {other.name}: two files of one name; take one away")
    return found


def nfc(text: str) -> str:
    """Accents as one letter: a Mac writes them as two in the names of files."""
    return unicodedata.normalize("NFC", text)


def read_text(path: Path) -> str:
    try:
        return nfc(path.read_text(encoding="utf-8-sig"))  # with or without the mark that Excel writes
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from error


def safe_name(name: str, file: Path) -> str:
    """`name`, which `file` brought along, with / for \\, unless it leads out of the data set's folder."""
    path = PureWindowsPath(str(name))
    if not isinstance(name, str) or path.anchor or ".." in path.parts:
        raise DataError(f"{file}: file name {name!r} leads out of the data set; wanted a relative one without '..'")
    return path.as_posix()


# PASCAL VOC

def xml_labels(path: Path, classes: tuple[str, ...]) -> tuple[int, ...]:
    """The objects of a VOC annotation, in the file's order, each class once, those marked difficult included.

    Without the difficult ones a class would be lost in one image of five.
    """
    text = read_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path}: DOCTYPE and ENTITY are refused (they can fill the memory or read files); remove them")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}); take the file out of the archive again") from error
    if tree.tag != "annotation":
        raise DataError(f"{path}: not an annotation of VOC's kind: it begins with <{tree.tag}>; export it as Pascal VOC")
    # not iter("object"): the parts of a body are named inside
    names = list(dict.fromkeys((found.findtext("name") or "").strip() for found in tree.findall("object")))
    return class_numbers(names, classes, path)


def class_numbers(names: list[str], classes: tuple[str, ...], file: Path) -> tuple[int, ...]:
    """0-based, in the order of `names`."""
    if unknown := [name for name in names if name not in classes]:
        raise DataError(f"{file}: unknown class {', '.join(map(repr, unknown[:10]))}; wanted one of {', '.join(classes)}")
    return tuple(classes.index(name) for name in names)


def voc_names(root: Path, split: str, pictures: dict[str, Path]) -> list[str]:
    """The names of a split. train_aug without its list: what has a mask in SegmentationClassAug and is not in val."""
    lists = root / "ImageSets" / "Segmentation"
    path = lists / f"{split}.txt"
    if path.exists():  # a line is NAME, or in DeepLab's list "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        return list(dict.fromkeys(line if line in pictures else PureWindowsPath(line.split()[0]).stem for line in lines))
    masks = files_by_stem(root / "SegmentationClassAug", {".png"})
    if split == "train_aug" and masks and (lists / "val.txt").exists():
        return sorted(masks.keys() - set(voc_names(root, "val", pictures)))
    raise DataError(f"{path} is missing; `python 01_data.py voc --check` says what else would do, and where it can be had")


def voc_samples(info: DatasetInfo, root: Path, split: str, problems: list[str]) -> list[Sample]:
    """Labels from Annotations/NAME.xml, else from the mask; masks from SegmentationClassAug, else SegmentationClass."""
    xmls, pictures = files_by_stem(root / "Annotations", {".xml"}), files_by_stem(root / "JPEGImages")
    masks = files_by_stem(root / "SegmentationClass", {".png"}) | files_by_stem(root / "SegmentationClassAug", {".png"})
    return join_samples(info, split, root, voc_names(root, split, pictures), pictures, masks,
                        lambda name: xml_labels(xmls[name], info.classes) if name in xmls else None, "xml", problems)


# COCO

def coco_name(stem: str) -> str:
    """COCO_val2014_000000000042 -> 000000000042, as the 2017 pictures and the released label files are called."""
    return re.sub(r"^COCO_(train|val)2014_", "", stem)


def coco_places(root: Path, split: str) -> tuple[Path, Path | None, Path]:
    """A split's pictures, its json (None: there is none) and its masks, in the native layout or the VOC-style one."""
    names = (f"{split}2014", f"{split}2017", split)
    folders = [path for name in names for path in (root / name, root / "JPEGImages" / name) if path.is_dir()]
    if not folders:
        raise DataError(f"no images of {split} in {root}: neither {names[0]}/ nor {names[1]}/ nor JPEGImages/{split}/; "
                        "`python 01_data.py coco --check` says where they can be had")
    years = names[:2] if folders[0].name == split else (folders[0].name,)
    jsons = [path for year in years if (path := root / "annotations" / f"instances_{year}.json").exists()]
    masks = [root / "SegmentationClass" / name for name in (folders[0].name, *names)]
    return folders[0], jsons[0] if jsons else None, next((path for path in masks if path.is_dir()), masks[0])


def read_coco_json(path: Path, classes: tuple[str, ...], problems: list[str]) -> dict[str, tuple[int, int, list]]:
    """Picture's name -> (height, width, [(0-based class, segmentation, id), ...]), crowds included.

    COCO's category ids have gaps (1..90 for 80 classes); classes go by name, which gives 0..79 in the same order.
    Objects of pictures that are not listed, or of no category, are left out and said to be so.
    """
    records, odd = {}, []

    def record(image: dict) -> None:
        try:
            name = coco_name(Path(safe_name(image["file_name"], path)).stem)
            new = int(image["height"]), int(image["width"]), objects[image["id"]], image["id"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: a wrong record of a picture, {image!r:.100} ({type(error).__name__}: {error})") from error
        if (other := records.setdefault(name, new)) is not new:
            raise DataError(f"{path}: two records of {image['file_name']}, with the ids {other[3]} and {new[3]}; make them one")

    try:
        content = json.loads(read_text(path))
        ids, names = zip(*((category["id"], category["name"]) for category in content["categories"]))
        numbers = dict(zip(ids, class_numbers(names, classes, path)))
        objects = {image.get("id"): [] for image in content["images"]}
        for found in content["annotations"]:
            try:
                objects[found["image_id"]].append((numbers[found["category_id"]], found.get("segmentation"), found.get("id")))
            except KeyError:
                odd.append(f"{found.get('id')} of picture {found.get('image_id')}")
        gather(record, content["images"], problems)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not COCO's instance format ({type(error).__name__}: {error}); unpack it again") from error
    if odd:
        remark(f"{path}: objects of pictures or categories that it does not list are left out, {len(odd)}: {', '.join(odd[:10])}")
    return {name: found[:3] for name, found in records.items()}


def coco_samples(info: DatasetInfo, root: Path, split: str, problems: list[str]) -> list[Sample]:
    """Labels from the json (training needs nothing else), without it from the masks.

    Images without any of the 80 classes are no part of the published splits (82 081 of 82 783, 40 137 of 40 504).
    """
    folder, json_path, mask_folder = coco_places(root, split)
    pictures, masks = ({coco_name(stem): path for stem, path in files_by_stem(place, suffixes).items()}
                       for place, suffixes in ((folder, None), (mask_folder, {".png"})))
    records = read_coco_json(json_path, info.classes, problems) if json_path else {}
    labels = {name: tuple(sorted({number for number, *_ in objects})) for name, (_, _, objects) in records.items()}
    names = list(labels) if json_path else sorted(pictures)
    samples = join_samples(info, split, root, names, pictures, masks, labels.get, "json", problems)
    return [sample for sample in samples if sample.labels]


# a folder of one's own, and the toy world

def picture_folder(root: Path) -> Path:
    return root / "images" if (root / "images").is_dir() else root


NOT_IN_NAMES = {*"{}[]\"#,;|"}  # of classes in a table: JSON, and more than one class
HEADS = ("file", "filename", "file_name", "image", "image_name", "image_id", "img", "name", "path", "picture")  # of a column


def folder_rows(root: Path) -> list[tuple[str, list[str], str]]:
    """[(file, class names, split), ...] from labels.csv, with or without a headline, else from FOLDER/CLASS/* or FOLDER/train/CLASS/*.

    Columns are separated by commas, tabs or semicolons, classes of a picture by semicolons or bars.
    """
    table, rows = root / "labels.csv", []
    if not table.exists():
        folder = picture_folder(root)
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            parts = parts if parts[0] in ("train", "val") and len(parts) > 2 else ("train", *parts)
            if is_picture(path) and len(parts) > 2 and parts[1] not in ("masks", "predictions", "test") and not any(
                    part[0] == "." for part in parts):
                rows.append((path.relative_to(folder).as_posix(), [nfc(parts[1])], parts[0]))
        return rows
    text = read_text(table)
    comma = "\t" if "\t" in text else "," if "," in text else ";"
    for number, line in enumerate(text.splitlines(), 1):
        try:
            file, names, split, *more = [cell.strip() for cell in next(csv.reader([line], delimiter=comma, strict=True), [])] + [""] * 3
        except csv.Error as error:
            raise DataError(f"{table}, line {number}: {error}; save it as CSV with commas, in UTF-8") from error
        if not line.strip(", ;\t") or (number == 1 and file.lower() in HEADS):
            continue
        classes = [name.strip() for name in re.split("[;|]" if comma != ";" else "[|,]", names) if name.strip()]
        if not file or split not in ("", "train", "val") or any(more) or NOT_IN_NAMES & {*"".join(classes)}:
            raise DataError(f"{table}, line {number}: {line!r} is not file,class;class or file,class;class,train|val")
        rows.append((safe_name(file, table), classes, split or "train"))
    return rows


def divide(root: Path, share: float) -> None:
    """Write FOLDER/labels.csv for sub-folders of classes; `share` of each class, drawn by chance, is kept for scoring (val)."""
    table, rows = root / "labels.csv", folder_rows(root)
    if table.exists() or not 0 < share < 1 or any(split == "val" for _, _, split in rows):
        raise DataError(f"--val-share {share}: wanted a share between 0 and 1, and {root} without labels.csv and val/")
    if odd := [name for _, [name], _ in rows if NOT_IN_NAMES & {*name}]:
        raise DataError(f"{root / odd[0]}: a table cannot have classes with {' '.join(sorted(NOT_IN_NAMES))}; rename the folder")
    text, total, passed = io.StringIO(), Counter(name for _, [name], _ in rows), Counter()
    for number in np.random.default_rng(0).permutation(len(rows)):
        file, [name], _ = rows[number]
        csv.writer(text).writerow((file, name, "val" if passed[name] < share * total[name] else "train"))
        passed[name] += 1
    write_text(table, text.getvalue())


def folder_samples(info: DatasetInfo, root: Path, split: str, problems: list[str]) -> list[Sample]:
    """A row is a sample, cat/a.jpg is called cat/a; its mask, if any, is masks/cat/a.png."""
    rows = [(Path(file).with_suffix("").as_posix(), file, classes)
            for file, classes, part in folder_rows(root) if part == split]
    if twice := [name for name, count in Counter(name for name, _, _ in rows).items() if count > 1]:
        problems.append(f"{root}: {', '.join(twice[:10])} in more than one line or with more than one suffix; name each once")
    folder, source = picture_folder(root), "csv" if (root / "labels.csv").exists() else "folder"
    there = {nfc(path.relative_to(folder).as_posix()): path for path in folder.rglob("*")}  # a Mac writes accents otherwise
    pictures = {name: path for name, file, _ in rows if (path := there.get(file, folder / file)).is_file()}
    masks = {name: path for name, _, _ in rows if (path := root / "masks" / f"{name}.png").is_file()}
    labels = {name: classes for name, _, classes in rows}

    def read_labels(name: str) -> tuple[int, ...]:
        return tuple(sorted(set(class_numbers(labels[name], info.classes, pictures[name]))))

    samples = join_samples(info, split, folder, list(labels), pictures, masks, read_labels, source, problems)
    return [replace(sample, as_displayed=True) for sample in samples]


LOADERS = {"voc": voc_samples, "coco": coco_samples, "shapes": folder_samples, "folder": folder_samples}


# ---------------------------------------------------------------- augmentation: scale, flip, crop, in this order

def rescale(image: np.ndarray, factor: float, resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """(H, W[, 3]) uint8 -> (int(factor H), int(factor W)[, 3]) uint8, at least one pixel each way."""
    height, width = (max(1, int(factor * side)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def crop(image: np.ndarray, size: int, top: int, left: int, fill: int = 0) -> np.ndarray:
    """(H, W[, 3]) -> (size, size[, 3]): a piece of the image, or all of it on a canvas of `fill`, each way by itself.

    top, left  in 0..|H - size| and 0..|W - size|: where the crop starts in the image; in a direction in which the image
               is smaller, where the image starts in the crop. (The released code puts the image at a random place of
               a canvas of max(size, H) x max(size, W) and crops that at random: the same.)
    """
    canvas = np.full((size, size, *image.shape[2:]), fill, dtype=image.dtype)
    height, width = image.shape[:2]
    y, x = top if height < size else 0, left if width < size else 0  # of the image in the canvas
    piece = image[0 if height < size else top:, 0 if width < size else left:][:size, :size]
    canvas[y:y + height, x:x + width] = piece
    return canvas


def augment(image: np.ndarray, mask: np.ndarray | None, size: int, rng: np.random.Generator,
            scales: tuple[float, float] = (0.5, 2.0)) -> tuple[np.ndarray, np.ndarray | None]:
    """One random view: scale from the range `scales`, mirrored with p = 0.5, a crop of size x size on black; no jitter.

    -> image (size, size, 3) uint8, mask (size, size) uint8 with 255 where there is no image, or None
    The canvas is black before normalisation, so padding ends up at -mean / std. The image-level label stays that of the
    whole picture even if the crop misses the object, as in the released code.
    """
    factor, step = rng.uniform(*scales), rng.choice((1, -1))
    image = rescale(image, factor)[:, ::step]
    top, left = (rng.integers(abs(side - size) + 1) for side in image.shape[:2])
    if mask is not None:
        mask = crop(rescale(mask, factor, Image.Resampling.NEAREST)[:, ::step], size, top, left, fill=IGNORE_INDEX)
    return crop(image, size, top, left), mask


# ---------------------------------------------------------------- what the loops read

def check_sum(parts: Iterable[bytes]) -> str:
    """Was it the same? 8 hex digits."""
    return f"{reduce(lambda total, part: zlib.crc32(part, total), parts, 0):08x}"


def load_pair(sample: Sample, num_classes: int, with_mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """A picture (H, W, 3) and, if asked for, its mask (H, W), both as people see them or both as they are stored."""
    image = load_image(sample.image, sample.as_displayed)
    return image, load_mask(sample.mask, num_classes, image.shape[:2], sample.as_displayed) if with_mask else None


def as_item(sample: Sample, image: np.ndarray, mask: np.ndarray | None, num_classes: int) -> dict:
    """name; image (3, H, W) float32, normalised; labels (C-1,) float32, 1 for a class shown; mask (H, W) uint8."""
    labels = torch.zeros(num_classes - 1)
    labels[list(sample.labels)] = 1
    item = {"name": sample.name, "image": normalize(image), "labels": labels}
    return item if mask is None else item | {"mask": torch.from_numpy(mask)}


# ---------------------------------------------------------------- whatever is written

def write_whole(path: str | Path, write, flush: bool = True) -> None:
    """write(binary file) under a temporary name, then rename: whatever happens, `path` is whole, old or new.

    flush   to the disk first: so even if the power fails; takes milliseconds. Without, other processes may write the same
    Raises  DataError  with the path: a full disk, a folder that is closed to us. Folders are made if need be
    """
    path = Path(path).resolve()  # what a link leads to
    temporary = path.with_name(f"{path.name[:99]}{'' if flush else os.getpid()}.tmp")  # a name may have 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        for wait in (.1, .2, .3, .4, 0):
            try:
                return os.replace(temporary, path)
            except PermissionError as error:  # on Windows, as long as another program reads the old file
                refused = error
            time.sleep(wait)
    except BaseException as error:
        with suppress(OSError, ValueError):
            temporary.unlink()
        if isinstance(error, (OSError, RuntimeError, ValueError)):  # torch's, when the disk is full; Pillow's, of its limits
            raise DataError(f"{path} could not be written ({getattr(error, 'strerror', '') or error}); a file from before is "
                            "intact. Free some space, or choose another --output-dir or a shorter name") from error
        raise
    raise DataError(f"{path} could not be replaced ({refused}); the new file is kept as {temporary}. Close what reads the old one, "
                    "then rename it")


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, whole; names of files that are none keep their bytes as \\udc80, which json reads."""
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def save_picture(path: str | Path, image: Image.Image) -> None:
    """In the format of its ending, whole."""
    write_whole(path, partial(image.save, format=picture_formats()[Path(path).suffix.lower()]), flush=False)


# ---------------------------------------------------------------- pictures for people

def colormap(n: int = 256) -> np.ndarray:
    """(n, 3) uint8, VOC's palette: bits 0, 3, 6 of the class are the top bits of red, bits 1, 4, 7 green, 2, 5 blue."""
    ids, colours = np.arange(n), np.zeros((n, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def save_mask(path: str | Path, mask: np.ndarray) -> None:
    """(H, W) uint8 -> a palette PNG: the values are the classes, the colours VOC's."""
    image = Image.fromarray(np.asarray(mask, dtype=np.uint8)).convert("P")
    image.putpalette(colormap().ravel().tolist())
    save_picture(path, image)


@cache
def display_colours() -> np.ndarray:
    """(256, 3) uint8, what classes look like on pictures for people: bright, never grey, neighbouring numbers far apart.

    0 is black and void is white. PNG files of masks have VOC's palette instead, which tools expect.
    """
    hues = (.02 + .618034 * np.arange(256)) % 1  # the golden ratio spreads any number of them
    bright = [colorsys.hsv_to_rgb(hue, (.95, .6, .8)[k // 8 % 3], (1, 1, .85)[k // 8 % 3]) for k, hue in enumerate(hues)]
    colours = (255 * np.array(bright)).round().astype(np.uint8)
    colours[0], colours[IGNORE_INDEX] = 0, 255
    return colours


def fit(picture: np.ndarray, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """(h, w[, 3]) uint8 enlarged or reduced to a long side of `side` pixels, at least one pixel each way."""
    factor = side / max(picture.shape[:2])
    width_height = [max(1, round(factor * length)) for length in picture.shape[1::-1]]
    return np.asarray(Image.fromarray(picture).resize(width_height, resample))


def overlay(image: np.ndarray, mask: np.ndarray, classes: tuple[str, ...], side: int = 360) -> np.ndarray:
    """A picture under the colours of its mask, each region with its outline, and a legend of the classes found below it.

    image (H, W, 3) uint8, mask (H, W), classes the names of 1, 2, ... -> (h + legend, w, 3) uint8, `side` pixels long
    """
    colours, shown = display_colours(), mask_labels(mask)
    image, mask = fit(image, side), fit(mask.astype(np.uint8), side, Image.Resampling.NEAREST)
    tinted = .5 * image.mean(axis=2, keepdims=True) + .5 * colours[mask]  # grey below: one colour, one class
    tinted = np.where(mask[..., None] > 0, tinted, image)
    tinted = np.where(outline(mask)[..., None], colours[mask], tinted).round().astype(np.uint8)
    return legend(tinted, shown, classes)


def outline(regions: np.ndarray) -> np.ndarray:
    """(H, W) numbers -> (H, W) bool: the two outermost pixels of each region that is not 0."""
    height, width = regions.shape
    padded = np.pad(regions, 2, mode="edge")
    shifted = [padded[2 + y:2 + y + height, 2 + x:2 + x + width] for y, x in ((-2, 0), (2, 0), (0, -2), (0, 2))]
    return (regions > 0) & np.any([piece != regions for piece in shifted], axis=0)


def legend(picture: np.ndarray, class_ids: Sequence[int], classes: tuple[str, ...]) -> np.ndarray:
    """A line below the picture for each of the 0-based classes, with its colour."""
    font, line = ImageFont.load_default(14), 20
    canvas = Image.new("RGB", (max(picture.shape[1], 120), picture.shape[0] + line * len(class_ids)), "white")
    canvas.paste(Image.fromarray(picture))
    pen = ImageDraw.Draw(canvas)
    for top, number in zip(range(picture.shape[0], canvas.height, line), class_ids):
        pen.rectangle([4, top + 4, 16, top + 16], fill=tuple(display_colours()[number + 1].tolist()), outline="black")
        pen.text((22, top + 2), classes[number], fill="black", font=font)
    return np.array(canvas)


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int, side: int = 240) -> Image.Image:
    """Pictures (h, w, 3) uint8 in rows of `columns`, each `side` wide (narrower if it would be very high) under a line of text."""
    cells = []
    for picture, caption in zip(pictures, captions, strict=True):
        height, width = picture.shape[:2]
        small = Image.fromarray(fit(picture, max(height, width) * min(side / width, 3 * side / height)))
        cells.append(Image.new("RGB", (side + 8, small.height + 28), "white"))  # a caption that is too long ends with its cell
        cells[-1].paste(small, (4, 24))
        ImageDraw.Draw(cells[-1]).text((4, 4), caption, fill="black", font=ImageFont.load_default(14))
    heights = [max(cell.height for cell in cells[start:start + columns]) for start in range(0, len(cells), columns)]
    sheet = Image.new("RGB", (columns * (side + 8), sum(heights)), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * (side + 8), sum(heights[:number // columns])))
    return sheet


# ---------------------------------------------------------------- COCO: masks from the json

def run_lengths(text: str) -> list[int]:
    """COCO's compressed form: five bits a character, lowest first; from the fourth on, the difference to the last but one."""
    counts, value, shift = [], 0, 0
    for character in text.encode("ascii"):
        bits = character - 48
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:  # the number ends here
            value -= (bits >> 4 & 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def object_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """(H, W) bool of a COCO object: polygons (drawn by pycocotools) or {"counts": run lengths by columns}, compressed or not.

    A polygon of two points has no area: nothing is drawn. Raises ValueError for what is no segmentation of this picture
    """
    if not segmentation:
        raise ValueError("it has a box and no segmentation; take COCO's instances_*.json")
    if isinstance(segmentation, list):
        official = import_module("pycocotools.mask")
        polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
        if any(len(corners) % 2 or not (np.abs(corners) < 10 * max(height, width)).all() for corners in polygons):
            raise ValueError("a polygon with half a corner, or one far outside the picture")
        polygons = [corners.tolist() for corners in polygons if len(corners) > 4]  # four numbers would be taken for a box
        runs = official.merge(official.frPyObjects(polygons, height, width)) if polygons else None
        return official.decode(runs).astype(bool) if polygons else np.zeros((height, width), bool)
    counts, size = segmentation["counts"], segmentation.get("size", [height, width])
    counts = run_lengths(counts) if isinstance(counts, str) else counts
    if list(size) != [height, width] or sum(counts) != height * width:
        raise ValueError(f"run lengths of {sum(counts)} pixels, {size}, for a picture of {[height, width]} (height, width)")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def coco_mask(height: int, width: int, objects: list, name: str) -> np.ndarray:
    """(H, W) uint8 class mask of one picture: where objects overlap, the smaller one is on top. Errors name picture and object."""
    if not 0 < height * width <= Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{name}: a picture of {height} x {width}; correct its record")
    masks, result = [], np.zeros((height, width), np.uint8)
    for number, segmentation, identity in objects:
        try:
            masks.append((object_mask(segmentation, height, width), number))
        except ImportError as error:
            raise DataError("COCO's masks are drawn by the package pycocotools: `pip install pycocotools`") from error
        except Exception as error:  # pycocotools raises just that
            raise DataError(f"{name}: no mask is written, object {identity} cannot be drawn ({error}); mend it") from error
        if isinstance(segmentation, list) and min(map(len, segmentation)) < 6 or not masks[-1][0].any():
            remark(f"{name}: object {identity} or a part of it has no area; that is not drawn")
    for mask, number in sorted(masks, key=lambda item: -item[0].sum()):
        result[mask] = 1 + number
    return result


def is_older(path: str | Path, other: Path | None) -> bool:
    return other is not None and Path(path).stat().st_mtime < other.stat().st_mtime


def write_coco_masks(info: DatasetInfo, root: Path, split: str, problems: list[str]) -> None:
    """SegmentationClass/val2014/000000000042.png and so on, for the pictures that have none or one from before the json."""
    _, json_path, folder = coco_places(root, split)
    samples = list_samples(info, root, split, problems)
    names = [sample.name for sample in samples if sample.mask is None or is_older(sample.mask, json_path)]
    records = read_coco_json(json_path, info.classes, []) if names else {}
    written = gather(lambda name: save_mask(folder / f"{name}.png", coco_mask(*records[name], name)),
                     tqdm(names, desc=f"masks of {split}", disable=None), problems)
    print(f"{split}: wrote {len(written)} masks to {folder}")


# ---------------------------------------------------------------- the check and the command line

def inspect(sample: Sample, num_classes: int) -> tuple[str, bool]:
    """Open both files of a sample. -> what is wrong, and whether its mask shows other classes than its label says.

    That is no error: in the whole train_aug of VOC, XML and mask differ for about 8 % of the images.
    """
    try:
        image, mask = load_pair(sample, num_classes, sample.mask is not None)
        dark = f"{sample.image}: no pixel is brighter than {image.max()} of 255; stretch 10 to 14 bits to all 16"
        grey = (image == image[..., :1]).all()  # as all pictures of 16 bits are
        return dark if grey and image.max() <= 64 else "", mask is not None and set(mask_labels(mask)) != set(sample.labels)
    except DataError as error:
        return str(error), False


def contradiction(differing: int, masks: int) -> str:
    """Are these masks of other things? "" or a sentence. A few always differ."""
    if not differing or differing <= masks / 2:
        return ""
    return (f"{differing} of {masks} masks show other classes than the labels say. Likely causes: the object is marked 255, which "
            "is void; classes are numbered from 0, which is background; the palette is another; masks are from before the labels")


def report(info: DatasetInfo, root: Path, thorough: bool, problems: list[str]) -> None:
    """Print what each split has; all problems are added. `thorough` opens every file and compares masks with labels."""
    used = {str(root / "labels.csv")}
    for split, published in SPLITS[info.name].items():
        # test lies in an archive of its own, which only a submission to the server needs: without it, that is no problem
        found = gather(lambda split: list_samples(info, root, split, problems), [split], [] if split == "test" else problems)
        if not found:
            print(f"{split:10} not here" + "; its archive is had from the VOC server after registration" * (split == "test"))
            continue
        [samples] = found
        print(f"{split:10} {describe(samples)}")
        new = [sample for sample in samples if sample.image not in used]
        used.update(path for sample in samples for path in (sample.image, sample.mask))
        of_2017 = info.name == "coco" and coco_places(root, split)[0].name.endswith("2017")  # another division of the same
        if published not in (None, len(samples)) and not of_2017:
            problems.append(f"{split}: {len(samples)} usable images, the published split has {published}")
        counts = Counter(info.classes[label] for sample in samples for label in sample.labels)
        line = ", ".join(f"{name} {counts[name]}" for name in info.classes)
        print(textwrap.indent(textwrap.fill(line, 100), " " * 11) if samples else "", end="\n" * bool(samples))
        if thorough:
            results = thread_map(partial(inspect, num_classes=info.num_classes), new, desc=f"opening {split}", disable=None)
            differing, masks = sum(differs for _, differs in results), sum(sample.mask is not None for sample in new)
            problems += [problem for problem in (*(found for found, _ in results), contradiction(differing, masks)) if problem]
            print(f"{'':10} {len(new)} opened" + ", the others were before" * (len(new) < len(samples))
                  + (f"; of {masks} masks, {differing} show other classes than the labels" if masks else ""))
            json_path = coco_places(root, split)[1] if info.name == "coco" else None
            if old := sum(sample.mask is not None and is_older(sample.mask, json_path) for sample in samples):
                problems.append(f"{old} masks of {split} are older than the json; `python 01_data.py coco` writes them anew")
    if info.name == "folder":
        if rest := left_out((path for path in root.rglob("*") if not path.is_dir() and str(path) not in used and not any(
                part[0] == "." or part == "predictions" for part in path.relative_to(root).parts)), root):
            problems.append(f"left out: {rest}; wanted pictures that are listed, ending in {', '.join(sorted(picture_formats()))}; "
                            "their masks, if any, as masks/NAME.png")
        if made_of := [name for name in info.classes if len(set(re.split(r"[ ,&+/]+", name)) & {*info.classes} - {name}) > 1]:
            problems.append(f"classes made of other classes: {', '.join(made_of[:10])}; separate them so: file,class;class")
        if "background" in map(str.lower, info.classes):
            problems.append("a class called background: that is always class 0; leave the classes of a picture without any empty")


def draw_sheet(info: DatasetInfo, root: Path, split: str) -> Image.Image:
    """24 pictures, from all over the split, under their masks; the captions are the image-level labels."""
    pictures, captions = [], []
    samples = list_samples(info, root, split)
    for sample in samples[::max(1, len(samples) // 24)][:24]:
        image, mask = load_pair(sample, info.num_classes, sample.mask is not None)
        pictures.append(image if mask is None else overlay(image, mask, info.classes))
        captions.append(", ".join(info.classes[label] for label in sample.labels) or "no class")
    return contact_sheet(pictures, captions, columns=6)


def natural(text: str, least: int = 0, most: int = 10**9) -> int:
    """The type of an option: 0, 1, 2, ..."""
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: wanted a whole number from {least} to {most}")
    return int(text)


count = partial(natural, least=1)  # 1, 2, 3, ...


class CommandLine(argparse.ArgumentParser):
    """How all six files read their options: `--data_path` means `--data-path`, and --help has a line for each."""

    def __init__(self, text: str, arguments: str, **more):
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=125)
        super().__init__(usage=f"%(prog)s {arguments} [options]", description=text, formatter_class=form, **more)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub("^--[^=]+", lambda option: option[0].replace("_", "-"), arg) for arg in args]
        return super().parse_known_args(args, namespace)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = CommandLine(__doc__, "dataset")
    p.add_argument("dataset", help=f"{', '.join(DATASETS)}, or a folder of your own")
    p.add_argument("--data-path", metavar="DIR", help="where it lies (default: data/NAME beside this file)")
    p.add_argument("--check", action="store_true", help="open every file and list all problems; writes nothing")
    p.add_argument("--val-share", type=float, metavar="X", help="write labels.csv for class folders, this share marked val")
    p.add_argument("--sheet", metavar="OUT.png", help="draw a contact sheet of 24 training pictures with masks and labels")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if there are problems."""
    args = parse_args(argv)
    if args.sheet and picture_formats().get(Path(args.sheet).suffix.lower()) not in Image.SAVE:
        raise DataError(f"--sheet {args.sheet}: no picture's name; wanted one ending in .png or .jpg")
    root = find_root(args.dataset, args.data_path)
    info = dataset_info(args.dataset)
    if args.val_share is not None:
        if info.name != "folder" or args.check:
            raise DataError("--val-share writes labels.csv into a folder of one's own; --check writes nothing")
        divide(root, args.val_share)
    print(f"{info.name} in {root}; masks have 0 background, "
          + ", ".join(f"{number} {name}" for number, name in enumerate(info.classes, 1)) + f" and {IGNORE_INDEX} void")
    problems: list[str] = []
    if info.name == "coco" and not args.check:
        gather(lambda split: write_coco_masks(info, root, split, problems), list(SPLITS["coco"]), problems)
    report(info, root, args.check, problems)
    for problem in dict.fromkeys(problems):
        print(f"problem: {problem}")
    if problems and info.name in FETCH:
        print("to be had: {} from {}".format(*FETCH[info.name]))
    print(f"{len(set(problems))} problems" if problems else "no problems")
    if args.sheet:
        save_picture(args.sheet, draw_sheet(info, root, "train"))
        print(f"wrote {args.sheet}")
    return int(bool(problems))


def command(*words) -> str:
    """What to type next, with the Python that runs now: a fresh environment need not be activated."""
    here = str(Path.cwd()) + os.sep
    line = [str(word).removeprefix(here) for word in (sys.executable, *words)]
    return subprocess.list2cmdline(line) if os.name == "nt" else shlex.join(line)


def run(main) -> None:
    """How each of the six files ends: bad input is one clear message and exit status 2, Ctrl-C is quiet."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    try:
        sys.exit(main())
    except Exception as error:
        text = out_of_memory(error) or isinstance(error, (DataError, OSError)) and str(error)
        if not text:
            raise
        print(f"error: {text.rsplit('DataError: ', 1)[-1].strip()}", file=sys.stderr)  # a loader worker's comes with its traceback
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def out_of_memory(error: BaseException) -> str:
    """What to say if this is why; else "". Numpy and Pillow have a type for it; torch has words, others on each device."""
    words = "out of memory|can(no|')t allocate memory|not enough memory|ALLOC_FAILED"
    if not isinstance(error, MemoryError) and (isinstance(error, DataError) or not re.search(words, str(error), re.IGNORECASE)):
        return ""
    return ("not enough memory; take a smaller --long-side, --crop-size or -b, or fewer processes with -j "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})")


if __name__ == "__main__":
    run(main)
