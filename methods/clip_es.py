"""CLIP-ES - Masks without any training: what is different from WeCLIP is that nothing is learned.

In     pictures with their image-level labels (01_data), the frozen CLIP
Out    DIR/NAME.png in VOC's palette: classes, 0 background, 255 where the CRF is unsure; with true masks the score of each step
Paper  "CLIP is Also an Efficient Segmenter", CVPR 2023: the root of the family. Per picture Grad-CAM, CLIP's own attention as
       affinity, dense CRF: the functions of 03_cam in a row. WeCLIP took the first two over, with ImageNet's pixel statistics.

    python methods/clip_es.py voc --split train_aug --output-dir masks
    python 05_train.py voc --masks masks        # a decoder learns from them; it stands in for the paper's DeepLab
    python methods/clip_es.py shapes            # the toy world; FOLDER and coco too

What is stopped goes on where it was. Without the package pydensecrf2, or with --par, PAR takes the place of the CRF, and
nothing becomes 255.
Letters: K classes of a picture, H, W its pixels, h, w and N = h * w patches.
"""
import argparse
import json
import math
import os
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

if __name__ == "__mp_main__":  # a worker of the CRF: Ctrl-C ends it at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")

CLIP_MEAN, CLIP_STD = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)  # 0..255, CLIP's own
BOX_FRACTION = {"voc": 0.4, "coco": 0.7, "shapes": 0.2}  # of the CAM's maximum; a folder of one's own has VOC's
MAPS = 8                                                 # of CLIP's last blocks are averaged; the toy has fewer, all are taken
ALPHAS = {"CAM": range(1, 11), "refined": (1, 2)}        # backgrounds (1 - max)^alpha that are tried when scoring
CRF = (10, (1, 3), (67, 3, 4))                           # iterations; pixels, weight; pixels, grey levels, weight
LARGEST = 1024                                           # pixels: long side of what CLIP sees, at most
SAVE_EVERY = 50                                          # pictures


def network_image(image: np.ndarray, patch: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (H', W', 3) uint8, each side enlarged to the next multiple of the patch: Pillow's bicubic.

    Deviation: photographs of more than LARGEST pixels are made smaller; attention grows with the fourth power of a side.
    """
    factor = min(1, LARGEST / max(image.shape[:2]))
    height, width = (patch * math.ceil(factor * length / patch) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def refined_cams(model, images: torch.Tensor, text_fg: torch.Tensor, text_bg: torch.Tensor, pairs: torch.Tensor,
                 fraction: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where do the words light up, and where after CLIP's attention has spread it? Nothing learned has a say.

    images  (1, 3, H', W') normalised with CLIP's own statistics
    ->      cams (K, h, w) in [0, 1), transition (1, N, N), flow (K, h, w) not normalised
    """
    seen = backbone.look(model, images, MAPS - 1)
    raw, _, last = cam.grad_cam(model, seen.tokens[-1], text_fg, text_bg, pairs, seen.grid)
    cams = cam.normalize_cams(raw)
    transition = cam.transition_matrix(cam.static_affinity(torch.cat([seen.maps, last[:, None]], dim=1), MAPS))
    return cams, transition, cam.spread(transition, cams * cam.box_masks(cams, fraction), pairs)


def stacked(maps: np.ndarray, alpha: float = 1) -> np.ndarray:
    """(K, H, W) in [0, 1) -> (1+K, H, W), the background (1 - max)^alpha first, not normalised. alpha below 1: a constant.

    In the precision of `maps`; the released scores are those of float16 files, in float16 throughout.
    """
    background = (1 - maps.max(axis=0)) ** maps.dtype.type(alpha) if alpha >= 1 else np.full_like(maps[0], alpha)
    return np.concatenate([background[None], maps])


def crf_mask(image: np.ndarray, ids: np.ndarray, scores: np.ndarray, sure: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """A job for a worker process: the picture (H, W, 3) and `stacked` maps of the labels `ids` (1+K,) -> (H, W) labels, and
    where they are unsure: the largest marginal is below `sure`. (That is all of the paper's confidence-guided loss.)"""
    marginals = cam.crf(image, scores.astype(np.float32), *CRF)
    return ids[marginals.argmax(axis=0)], marginals.max(axis=0) < sure


def par_mask(image: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`crf_mask` by PAR, which has no marginals: nothing is unsure."""
    refined = cam.par(data.normalize(image)[None], torch.from_numpy(scores.astype(np.float32))[None])[0]
    return ids[refined.argmax(dim=0).numpy()], np.zeros(image.shape[:2], bool)


class Progress:
    """DIR/progress.json: which pictures are done, and their confusion matrices. It belongs to the settings of the command."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.done, self.matrices, self.settings = path, [], {}, settings
        if path.exists():
            stored = json.loads(data.read_text(path))
            if stored["settings"] != settings:
                raise data.DataError(f"{path.parent} holds masks of other settings: {stored['settings']}, now {settings}; "
                                     "choose another --output-dir")
            self.done, self.matrices = stored["done"], {k: torch.tensor(m) for k, m in stored["matrices"].items()}

    def add(self, name: str, truth: np.ndarray | None, labels: dict[str, np.ndarray], num_classes: int) -> None:
        self.done.append(name)
        for rung, label in labels.items() if truth is not None else ():
            matrix = cam.confusion_matrix(torch.from_numpy(truth), torch.from_numpy(label), num_classes)
            self.matrices[rung] = self.matrices.get(rung, 0) + matrix

    def save(self) -> None:
        matrices = {rung: matrix.tolist() for rung, matrix in self.matrices.items()}
        data.write_text(self.path, json.dumps({"settings": self.settings, "done": self.done, "matrices": matrices}))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.CommandLine(__doc__, "dataset")
    p.add_argument("dataset", help=f"{', '.join(data.DATASETS)}, or a folder of your own")
    p.add_argument("--data-path", metavar="DIR", help="where the data lies (default: data/NAME)")
    p.add_argument("--split", help="default: train_aug for voc, else train")
    p.add_argument("--output-dir", metavar="DIR", help="default: runs/NAME-clip_es")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words instead of the data set's")
    p.add_argument("--box-fraction", type=float, metavar="X", help="of the CAM's maximum (default: 0.4; COCO 0.7, shapes 0.2)")
    p.add_argument("--par", action="store_true", help="PAR in place of the CRF, also where pydensecrf2 is installed")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: ViT-B/16 (shapes: its toy)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    p.add_argument("-j", "--workers", type=partial(data.count, most=256), metavar="N",
                   default=max(1, min(8, (os.cpu_count() or 1) // 2)),
                   help="processes for the CRF (default: half of the cores, at most 8)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be used."""
    args = parse_args(argv)
    info, root = data.dataset_info(args.dataset, args.background), data.find_root(args.dataset, args.data_path)
    split = args.split or next(iter(data.SPLITS[info.name]))
    samples, device = data.list_samples(info, root, split), backbone.choose_device(args.device)
    model = backbone.load_clip(args.clip or ("shapes" if info.name == "shapes" else "ViT-B/16"), device)
    texts = [backbone.text_features(model, words) for words in (info.prompts, info.background)]
    fraction = args.box_fraction or BOX_FRACTION.get(info.name, 0.4)
    through, last = partial(cam.crf_in_processes, workers=args.workers, work=crf_mask), "CRF"
    try:
        cam.crf_package()
    except data.DataError as error:
        print(f"PAR instead of the CRF, and no pixel becomes 255: {error}")
        args.par = True
    if args.par:
        through, last = lambda jobs: ((key, par_mask(*job)) for key, job in jobs), "PAR"
    output = Path(args.output_dir or f"runs/{root.resolve().name if info.name == 'folder' else info.name}-clip_es")
    progress = Progress(output / "progress.json", {"dataset": info.name, "classes": info.classes and list(info.classes), "split": split,
                        "background": list(info.background), "box_fraction": fraction, "clip": backbone.fingerprint(model), "last": last})
    done, failed = set(progress.done), []
    todo = [sample for sample in samples if sample.labels and sample.name not in done]
    print(f"{split} of {info.name}: {data.describe(samples)}; {len(done)} done before -> {output}", flush=True)

    def jobs():
        for sample in tqdm(todo, desc="masks", disable=None):
            try:
                image, truth = data.load_pair(sample, info.num_classes, sample.mask is not None)
            except data.DataError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
                failed.append(sample.name)
                continue
            images = data.normalize(network_image(image, backbone.patch_size(model)), CLIP_MEAN, CLIP_STD)[None].to(device)
            pairs = torch.tensor([(0, label) for label in sample.labels])
            cams, _, flow = refined_cams(model, images, *texts, pairs, fraction)
            maps = {rung: cam.enlarge(x, image.shape[:2]).cpu().numpy() for rung, x in (("CAM", cams), ("refined", cam.min_max(flow)))}
            ids = np.array([0, *(1 + label for label in sample.labels)], np.uint8)
            tried = {f"{rung}, alpha {alpha}": ids[stacked(maps[rung].astype(np.float16), alpha).argmax(axis=0)]
                     for rung, alphas in ALPHAS.items() for alpha in alphas if truth is not None}
            yield (sample, truth, tried), (image, ids, stacked(maps["refined"]))

    for number, ((sample, truth, tried), (labels, unsure)) in enumerate(through(jobs()), 1):
        data.save_mask(output / f"{sample.name}.png", np.where(unsure, data.IGNORE_INDEX, labels))
        progress.add(sample.name, truth, tried | {last: labels}, info.num_classes)
        if number % SAVE_EVERY == 0:
            progress.save()
    progress.save()
    result = {rung: cam.scores(matrix) for rung, matrix in progress.matrices.items()}
    if result:
        best = [max((rung for rung in result if rung.startswith(step)), key=lambda rung: result[rung]["miou"]) for step in ALPHAS]
        cam.print_scores({rung: result[rung] for rung in (*best, last)}, info, f"{split} of {info.name}, {last} without 255")
    where = ("--data-path", args.data_path) if args.data_path else ()
    next_command = data.command(Path(__file__).parents[1] / "05_train.py", args.dataset, *where, "--masks", output)
    print(f"{len(progress.done)} masks in {output}, {sum(not sample.labels for sample in samples)} pictures without a class passed "
          f"over, {len(failed)} unusable; next: {next_command}")
    return int(bool(failed))


if __name__ == "__main__":
    data.run(main)
