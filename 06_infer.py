"""06 - Inference: what does it see now?

In     a checkpoint of 05_train and the frozen backbones it was trained on; pictures, or a split of its data set
Out    palette PNGs at the size of the input, overlays with a legend; for a split the IoU of each class and scores.json,
       pseudo labels (--cams), an archive for the VOC server (--submit). Segmenting needs no image-level label.
Paper  WeCLIP (CVPR 2024) and WeCLIP+ (TPAMI 2025), inference: several scales and their mirrors, averaged (that is
       `logits` of the method), dense CRF (03_cam.crf), mIoU from one confusion matrix.

    python 06_infer.py runs/shapes-weclip+/best.pt                       # score val: single scale, multi-scale + flip
    python 06_infer.py best.pt cat.jpg holiday/                          # pictures -> predictions/ beside them
    python 06_infer.py A.pt B.pt cat.jpg --beside masks                  # and a sheet: a row for each method
    python 06_infer.py best.pt --split train_aug --cams                  # CAMs and pseudo labels of a split, scored
    python 06_infer.py best.pt --split train_aug --with-labels --crf     # masks for `05_train.py --masks`
    python 06_infer.py best.pt --split test --crf --submit results.tgz   # for the VOC server
"""
import argparse
import json
import os
import signal
import sys
import tarfile
from functools import partial
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # before torch: threads that wait spin shortly, then leave the cores to others
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
if __name__ == "__mp_main__":  # a worker of the CRF, started by this file: Ctrl-C ends it at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")

SINGLE = "single scale"                         # scale 1 without its mirror, as in the released scores; "segmentation" in 05
OVERLAY_SIDES = (360, 1024)                     # pixels: overlays are to be looked at, no smaller and no larger
SHEET_COLUMNS, SHEET_SIDE = 8, 180              # pictures of a sheet at most; pixels of each
PRINT_EVERY = 50                                # images, where there is no terminal for a bar
VOC_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


class Segmented(NamedTuple):
    """What was found in one picture."""

    image: np.ndarray           # (H, W, 3) uint8
    truth: torch.Tensor | None  # (H, W) uint8, when scoring
    labels: dict                # rung -> (H, W) uint8 tensor; the last rung is the prediction


def rung_name(scales: tuple[float, ...], flip: bool) -> str:
    """What a prediction is called in the table of scores."""
    name = "multi-scale" if len(scales) > 1 else SINGLE if scales == (1,) else f"scale {scales[0]:g}"
    return f"{name} + flip" if flip else name


def segment(method, sample, args: argparse.Namespace) -> tuple[Segmented, tuple | None]:
    """One picture through everything that the command line asks for -> what was found, and with --crf what is left to do.

    sample  01_data.Sample; with a mask, what the prediction is compared with is made too: one scale, no mirror
    Raises  data.DataError  if a file cannot be used
    """
    info = method.info
    image, truth = data.load_pair(sample, info.num_classes, sample.mask is not None)
    item = data.as_item(sample, image, truth, info.num_classes)
    pixels, wanted = item["image"].to(method.device), rung_name(args.scales, args.flip)
    kept = [0, *(1 + c for c in range(len(info.classes)) if not args.with_labels or c in sample.labels)]

    def labelled(logits: torch.Tensor) -> torch.Tensor:
        return torch.tensor(kept, dtype=torch.uint8)[cam.enlarged_labels(logits[kept], image.shape[:2]).cpu()]

    labels = {}
    if args.cams:
        rungs = method.ladder(pixels, item["labels"], args.amp).labels
        labels = {rung: rungs[rung].to(torch.uint8).cpu() for rung in method.rungs}
    if wanted != SINGLE and (sample.mask or args.cams):
        labels[SINGLE] = labelled(method.logits(pixels, (1,), False, args.amp))
    logits = method.logits(pixels, args.scales, args.flip, args.amp)
    labels[wanted] = labelled(logits)
    job = None
    if args.par:
        labels[f"{wanted} + PAR"] = torch.tensor(kept, dtype=torch.uint8)[cam.par_labels(pixels, logits[kept]).cpu()]
    if args.crf:
        ids, probs = cam.likely_classes(cam.enlarge(logits[kept], image.shape[:2]))
        numbers = (10, method.cfg.crf_gaussian, method.cfg.crf_bilateral)
        job = (image, np.array(kept, np.uint8)[ids.cpu().numpy()], probs.cpu().numpy(), *numbers)
    return Segmented(image, item.get("mask"), labels), job


def segment_all(method, samples: list, args: argparse.Namespace):
    """For each sample, in order: Segmented, or data.DataError for a file that cannot be used.

    With --crf, results come some pictures late: while worker processes are at these, the network goes on.
    """
    def found():
        for number, sample in enumerate(samples, 1):
            try:
                result, job = segment(method, sample, args)
            except data.DataError as error:
                result, job = error, None
            if not (sys.stderr.isatty() or args.images or number % PRINT_EVERY and number < len(samples)):
                print(f"{number}/{len(samples)} images", flush=True)
            yield result, job

    for result, labels in cam.crf_in_processes(found(), args.workers) if args.crf else found():
        if labels is not None:
            result.labels[f"{rung_name(args.scales, args.flip)} + CRF"] = torch.from_numpy(labels)
        yield result


def segment_pictures(method, args: argparse.Namespace, name: str, rows: dict[str, dict]) -> int:
    """Palette PNG, overlay and a line of text for each picture of one's own. -> how many files could not be used.

    name  of the method among several: a part of its files' names
    rows  of the sheet, {what: {picture file: cell}}; the method's is added
    """
    info, samples = method.info, backbone.samples_of(args.images)
    ending, rows[name] = f"_{name}" if len(args.checkpoints) > 1 else "", {}

    def save(sample: data.Sample, found: Segmented | data.DataError, targets: list[Path]) -> None:
        if isinstance(found, data.DataError):
            raise found
        prediction, overlay = targets
        mask = list(found.labels.values())[-1].numpy()
        data.save_mask(prediction, mask)
        side = min(OVERLAY_SIDES[1], max(OVERLAY_SIDES[0], *mask.shape))
        data.save_picture(overlay, Image.fromarray(data.overlay(found.image, mask, info.classes, side)))
        shares = np.bincount(mask.ravel(), minlength=info.num_classes)[1:] / mask.size
        seen = [f"{info.classes[c]} {shares[c]:.1%}" for c in np.argsort(-shares) if shares[c]]
        tqdm.write(f"{sample.image} -> {prediction}: {', '.join(seen) or 'background only'}")
        if sample.image in rows["picture"] or len(rows["picture"]) < SHEET_COLUMNS:
            rows["picture"][sample.image] = found.image
            rows[name][sample.image] = data.overlay(found.image, mask, info.classes, SHEET_SIDE)

    results = backbone.result_files(samples, args.output_dir, (f"{ending}.png", f"{ending}_overlay.png"))
    return backbone.attempt(save, samples, segment_all(method, samples, args), results)


def save_sheet(rows: dict[str, dict], info, args: argparse.Namespace) -> int:
    """A column for each picture; a row for each method and for each folder of masks beside them, of the classes of `info`.

    -> how many of these masks could not be used
    """
    def add(folder: str, file: str) -> None:
        image = rows["picture"][file]
        mask = data.load_mask(Path(folder) / f"{Path(file).stem}.png", info.num_classes, image.shape[:2], as_displayed=True)
        rows[folder][file] = data.overlay(image, mask, info.classes, SHEET_SIDE)

    rows.update((folder, {}) for folder in args.beside)
    places = [(folder, file) for folder in args.beside for file in rows["picture"]]
    failed = backbone.attempt(add, *zip(*places)) if places else 0
    rows["picture"] = {file: data.fit(image, SHEET_SIDE) for file, image in rows["picture"].items()}
    blank = np.full((1, 1, 3), 255, np.uint8)  # where a picture or a mask could not be used
    cells, captions = zip(*((row.get(file, blank), name) for name, row in rows.items() for file in rows["picture"]))
    [target], *_ = backbone.result_files(backbone.samples_of(rows["picture"]), args.output_dir, ("_sheet.png",))
    data.save_picture(target, data.contact_sheet(cells, captions, len(rows["picture"]), SHEET_SIDE))
    print(f"{target}: a row for each of {', '.join(rows)}")
    return failed


def split_samples(info, split: str, data_path: str | None) -> list:
    """The samples of a split of the data set that the checkpoint was trained on.

    Raises  data.DataError  if the data is not there or of other classes, or nothing is in the split
    """
    if info.name == "folder" and data_path is None:
        raise data.DataError("trained on a folder of one's own; say where it is (--data-path FOLDER), or give pictures")
    there = data.dataset_info(data_path if info.name == "folder" else info.name)
    if there.classes != info.classes:
        raise data.DataError(f"trained on the classes {', '.join(info.classes)}, but {data_path or info.name} has "
                             f"{', '.join(there.classes)}; take the data of the training, or train on this")
    samples = data.list_samples(info, data_path, split)
    if not samples:
        raise data.DataError(f"{data_path or info.name}: no pictures in {split}; choose another --split")
    return samples


def segment_split(method, args: argparse.Namespace, checkpoint: dict) -> int:
    """Predictions of a split; with masks its scores, with --submit the archive. -> how many files could not be used.

    Of an image nothing is kept but its PNGs and what it adds to one confusion matrix per rung.
    """
    info = method.info
    samples = split_samples(info, args.split, args.data_path)
    if (args.cams or args.with_labels) and not any(sample.labels for sample in samples):
        raise data.DataError(f"{args.split} has no image-level labels, which --cams and --with-labels need; take another "
                             "--split")
    output = Path(args.output_dir or Path(args.checkpoint).parent / args.split)
    settings = {"checkpoint": str(Path(args.checkpoint).resolve()), "step": checkpoint["step"], "split": args.split,
                "scales": list(args.scales), **{key: getattr(args, key) for key in ("flip", "crf", "par", "with_labels")},
                "amp": str(args.amp) if args.amp else None}
    keep_to_settings(output, settings)
    folders = {rung: output / rung.replace(" ", "_") for rung in method.rungs if args.cams}
    summary = data.describe(samples)
    print(f"{args.split} of {info.name}: {summary} -> {output}", flush=True)

    matrices, written, scored = {}, [], []  # the last two: names

    def save(sample: data.Sample, found: Segmented | data.DataError) -> None:
        if isinstance(found, data.DataError):
            raise found
        *_, prediction = found.labels.values()
        for folder, labels in [(output / "predictions", prediction), *((folders[r], found.labels[r]) for r in folders)]:
            data.save_mask(folder / f"{sample.name}.png", labels.numpy())
        written.append(sample.name)
        if sample.mask:
            scored.append(sample.name)
            for rung, labels in found.labels.items():
                matrices[rung] = matrices.get(rung, 0) + cam.confusion_matrix(found.truth, labels, info.num_classes)

    failed = backbone.attempt(save, samples, segment_all(method, samples, args))
    if matrices:
        names = ("background", *info.classes)
        result = {rung: cam.scores(matrix) for rung, matrix in matrices.items()}
        of = "" if len(scored) == len(samples) else f" of {len(samples)}"  # without mask, or unusable
        cam.print_scores(result, info, f"{args.split} of {info.name}, {len(scored)}{of} images, {describe(args, method.cfg)}")
        for score in result.values():
            score["iou"] = {name: None if np.isnan(iou) else iou for name, iou in zip(names, score["iou"])}
        trained = {key: checkpoint.get(key) for key in ("method", "step", "masks", "seed", "frozen", "config")}
        unusable = sorted({sample.name for sample in samples}.difference(written))
        report = settings | {"dataset": info.name, "images": len(scored), "unusable": unusable, "samples": summary,
                             "rungs": result, "training": trained}
        data.write_text(output / "scores.json", json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print("nothing is scored: no picture that could be used has a mask")
    if args.submit and failed:
        backbone.complain(f"{args.submit} is not written: it would lack {failed} of {len(samples)} pictures")
    elif args.submit:
        write_submission(args.submit, output / "predictions", written)
    return failed


def keep_to_settings(output: Path, settings: dict) -> None:
    """OUTPUT/settings.json says how the predictions there are made. Raises data.DataError if it says something else."""
    path = output / "settings.json"
    try:
        before = json.loads(data.read_text(path)) if path.exists() else settings
        changed = ", ".join(f"{key} {before.get(key)}" for key in settings if before.get(key) != settings[key])
    except (ValueError, AttributeError) as error:
        raise data.DataError(f"{path}: not what 06_infer.py has written ({error}); choose another --output-dir") from error
    if changed:
        raise data.DataError(f"{output} holds predictions that were made otherwise ({changed}); choose another --output-dir")
    data.write_text(path, json.dumps(settings))


def describe(args: argparse.Namespace, cfg) -> str:
    """How the prediction is made, in words."""
    return (f"long side {cfg.long_side} x {', '.join(f'{scale:g}' for scale in args.scales)}, "
            f"{'with' if args.flip else 'no'} mirror, {'with' if args.crf else 'no'} CRF" + ", PAR (not the papers')" * args.par
            + ", classes of the image only" * args.with_labels)


def write_submission(path: str, folder: Path, names: list[str]) -> None:
    """Predictions as the VOC server wants them, in a .tgz that does not say who made it. Whole or not at all."""
    def pack(file) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(f"{VOC_FOLDER}/{name}.png")
                member.size = (folder / f"{name}.png").stat().st_size
                with open(folder / f"{name}.png", "rb") as picture:
                    archive.addfile(member, picture)

    data.write_whole(path, pack)
    print(f"{len(names)} predictions for the VOC server are in {path}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.CommandLine(__doc__, "checkpoint [checkpoints ...] [images ...]")
    p.add_argument("checkpoint", help="best.pt or last.pt of 05_train.py; several .pt before pictures: compared on a sheet")
    p.add_argument("images", nargs="*", help="pictures or folders of pictures; without any: the split is scored")
    p.add_argument("--data-path", metavar="DIR", help="where the data lies (default: data/NAME)")
    p.add_argument("--split", default="val", help="which part of the data set (default: %(default)s)")
    p.add_argument("--scales", type=float, nargs="+", metavar="X", help="default: the checkpoint's, say 1 1.5")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images too (default: yes)")
    p.add_argument("--crf", action="store_true", help="dense CRF on top, as in the papers (needs pydensecrf2)")
    p.add_argument("--par", action="store_true", help="PAR on top, not the papers': no package, runs on a GPU")
    p.add_argument("--cams", action="store_true", help="CAMs and pseudo labels too, from the split's labels")
    p.add_argument("--with-labels", action="store_true", help="predict only classes that the split's labels name")
    p.add_argument("--beside", metavar="DIR", nargs="+", default=[], help="masks DIR/NAME.png: rows of the sheet too")
    p.add_argument("--submit", metavar="FILE.tgz", help="pack the predictions for the VOC server")
    p.add_argument("--output-dir", metavar="DIR", help="default: predictions/ beside a picture, SPLIT/ beside the checkpoint")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: as in training")
    p.add_argument("--dino", metavar="NAME|FILE", help="default: as in training")
    p.add_argument("--attention", metavar="NAME|DIR", help="of a method whose labels need one; default: as in training")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="encoders in half precision (default: no)")
    p.add_argument("-j", "--workers", type=partial(data.count, most=256), metavar="N",
                   default=max(1, min(8, (os.cpu_count() or 1) // 2)),
                   help="processes for the CRF (default: half of the cores, at most 8)")
    args = p.parse_intermixed_args(argv)  # `ckpt --crf cat.jpg` too
    args.checkpoints = [args.checkpoint, *takewhile(lambda path: path.endswith(".pt"), args.images)]
    args.images = args.images[len(args.checkpoints) - 1:]
    return args


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be used."""
    args = parse_args(argv)
    if args.images and (args.cams or args.with_labels or args.submit):
        raise data.DataError("--cams, --with-labels and --submit are for a split: pictures of your own have no image-level "
                             "labels (python 03_cam.py PICTURE --classes ... takes them from you)")
    if not args.images and (args.checkpoints[1:] or args.beside):
        raise data.DataError("several checkpoints, and --beside, are for a sheet; name some pictures, before --beside")
    if strangers := [folder for folder in args.beside if not Path(folder).is_dir()]:
        raise data.DataError(f"--beside {strangers[0]}: no such folder")
    if args.crf:
        cam.crf_package()  # missing? say so now and not after the first picture
    device = backbone.choose_device(args.device)
    args.amp = backbone.half_precision(device) if args.amp else None
    checkpoint, *others = map(decoder.read_checkpoint, args.checkpoints)
    if args.cams and not decoder.method_class(checkpoint["method"]).rungs:
        raise data.DataError(f"{args.checkpoint}: {checkpoint['method']} makes no CAMs and pseudo labels; leave out --cams")
    if args.submit and (checkpoint["dataset"], args.split) != ("voc", "test"):
        raise data.DataError(f"{args.checkpoint}: trained on {checkpoint['dataset']}; --submit is for VOC's server, which wants "
                             f"--split test, not {args.split}")
    options = {what: getattr(args, what) for what in ("clip", "dino", "attention") if getattr(args, what)}
    options |= {"scales": tuple(args.scales)} if args.scales else {}
    methods, infos, rows, failed = [one["method"] for one in (checkpoint, *others)], [], {"picture": {}}, 0
    for number, (path, one) in enumerate(zip(args.checkpoints, (checkpoint, *others)), 1):
        known = {what: value for what, value in options.items() if what in one["config"] or len(args.checkpoints) == 1}
        method = decoder.restore(one, path, known, device)
        infos.append(method.info)
        if args.cams:
            method.ready()
        args.scales = method.cfg.scales
        print(f"{one['method']}, trained on {one['dataset']} for {one['step']} steps; "
              f"{describe(args, method.cfg)}; on {device}", flush=True)
        name = one["method"] if methods.count(one["method"]) == 1 else f"{one['method']}_{number}"
        failed = max(failed, segment_pictures(method, args, name, rows) if args.images else segment_split(method, args, checkpoint))
    if len(rows) + len(args.beside) > 2 and rows["picture"]:
        failed += save_sheet(rows, infos[0], args)
    if failed:
        backbone.complain(f"{failed} pictures could not be used (see above), the others are done")
    return int(failed > 0)


if __name__ == "__main__":
    data.run(main)
