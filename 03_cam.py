"""03 - From words to labels: where in the image does a word light up, and how does that become a pseudo label?

In     what CLIP saw in an image (02_backbone), text features of the classes and of the background
Out    the stages of every method here, as functions of tensors: `grad_cam`, `box_masks`, affinities, `spread`, `par`,
       `crf`, labels. One map per (image, class) pair, batched; but for the CRF nothing leaves the device
Paper  WeCLIP, CVPR 2024, the initial CAM and the refinement module (RFM). Grad-CAM (Selvaraju et al. 2017) on the softmax
       over classes and background names, boxes, static affinity: CLIP-ES (CVPR 2023). PAR: AFA (CVPR 2022). Dense CRF:
       Kraehenbuehl and Koltun 2011.

    python 03_cam.py cat.jpg --classes cat sofa        # no training, no labels on disk: all the way to the pseudo label
    python 03_cam.py --index 3                         # the toy CLIP on a picture of `shapes`

Letters: B images, P (image, class) pairs, C classes with background, H, W pixels, N = h * w patches, T = 1 + N tokens,
D width, M attention maps, E joint embedding width. Class 0 is the background: foreground class c is c + 1 in a label.
"""
import math
import os
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")

EPS = 1e-7  # of the min-max normalisation. Refined maps can be as small as 1e-6: the constant is part of the result


def class_pairs(labels: torch.Tensor) -> torch.Tensor:
    """Which maps have to be made? One per image and class present in it.

    labels  (B, C-1) multi-hot image-level labels
    ->      (P, 2) long: image, class; images in order and classes ascending. P may be 0
    """
    return labels.nonzero()


def grad_cam(model: nn.Module, tokens: torch.Tensor, text_fg: torch.Tensor, text_bg: torch.Tensor, pairs: torch.Tensor,
             grid: tuple[int, int], logit_scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where is the evidence for a class? Softmax Grad-CAM at the last block's ln_1 (CLIP-ES; WeCLIP's CAM).

    The last block runs once per image. The patches of its output are averaged (CLS left out) into the image embedding;
    p = softmax(s cos(embedding, text)) over the classes of this image and all background names. The target is the
    probability and not the logit: that is what makes classes exclusive. Channel weights are the mean over the patches of
    dp / dA, A the output of ln_1; the map is their weighted sum of A. The gradient reaches A through attention only,
    since the shortcut goes around ln_1. Images do not see one another: the n-th classes of all images share one way back.

    model             CLIP (02_backbone.load_clip)
    tokens            (B, 1+N, D) that enter the last block
    text_fg, text_bg  (C-1, E) and (n_bg, E), unit norm
    pairs             (P, 2) image, foreground class; in any order, on the CPU
    grid              (h, w), with N = h * w
    logit_scale       s; the model's own exp(logit_scale) when None
    ->                cams (P, h, w) before relu and normalisation,
                      probs (B, C-1 + n_bg), 0 for classes that the image does not show,
                      last_map (B, 1+N, 1+N), attention of the last block averaged over its heads
    """
    visual, block = model.visual, model.visual.transformer.resblocks[-1]
    scale = model.logit_scale.exp() if logit_scale is None else logit_scale
    image_of, class_of = pairs.to(tokens.device).unbind(1)
    shown = torch.zeros(len(tokens), len(text_fg) + len(text_bg), dtype=torch.bool, device=tokens.device)
    shown[image_of, class_of] = shown[:, len(text_fg):] = True
    with torch.enable_grad():
        a = block.ln_1(tokens).detach().requires_grad_()  # A, (B, 1+N, D)
        attended, last_map = backbone.attend(block.attn, a, with_map=True)
        x = (tokens + attended)[:, 1:]  # (B, N, D), CLS has done its part
        pooled = visual.ln_post(x + block.mlp(block.ln_2(x))).mean(dim=1)  # (B, D)
        logits = scale * F.normalize(pooled @ visual.proj, dim=-1) @ torch.cat([text_fg, text_bg]).T
        probs = logits.masked_fill(~shown, -torch.inf).softmax(dim=-1)
        asked = probs[image_of, class_of]  # (P,)
    a_patches, cams = a.detach()[:, 1:], tokens.new_zeros(len(pairs), math.prod(grid))
    nth = torch.tril(pairs[:, None, 0] == pairs[:, 0], -1).sum(dim=1)  # (P,) which class of its image is it: 0, 1, ...
    for n in nth.unique():
        mine = (nth == n).to(tokens.device)
        (grad,) = torch.autograd.grad(asked, a, mine.to(asked.dtype), retain_graph=True)
        weights = grad[image_of[mine], 1:].mean(dim=1)  # Eq. 1, (pairs, D)
        cams[mine] = torch.einsum("pd,pnd->pn", weights, a_patches[image_of[mine]])  # Eq. 2
    return cams.unflatten(1, tuple(grid)), probs.detach(), last_map.detach()


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """(map - min) / (1e-7 + max(map - min)), each map by itself: (P, h, w) -> (P, h, w). A constant map becomes zero."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (EPS + maps.amax(dim=(1, 2), keepdim=True))


def normalize_cams(cams: torch.Tensor) -> torch.Tensor:
    """Raw Grad-CAMs -> CAMs in [0, 1): relu, then min-max twice, as the released code does (so the peak is 1 - 1e-7)."""
    return min_max(min_max(cams.relu()))


def box_masks(cams: torch.Tensor, fraction: float) -> torch.Tensor:
    """Which patches may send activation? The bounding boxes of all connected regions above a threshold (CLIP-ES).

    cams      (P, h, w) in [0, 1)
    fraction  of the maximum: lambda, 0.4 for VOC, 0.7 for COCO
    ->        (P, h, w) bool, the union of the boxes; all False for a map without activation

    Maps are truncated to 0..255, the threshold is int(fraction * maximum), regions are 8-connected. A box is half open
    and its open ends are clamped to w-1 and h-1, so that the last row and column never lie in one (released code).
    """
    height, width = cams.shape[-2:]
    grey = (cams * 255).trunc()
    thresholds = torch.tensor([int(fraction * peak) for peak in range(256)], device=cams.device, dtype=cams.dtype)
    active = (grey > thresholds[grey.amax(dim=(1, 2)).long()][:, None, None])[:, None]  # (P, 1, h, w); a table: float32 rounds
    ys, xs = torch.meshgrid(*(torch.arange(n, device=cams.device, dtype=cams.dtype) for n in (height, width)), indexing="ij")
    nowhere = -float(height * width)
    boxes = torch.stack([-xs, -ys, xs, ys]).where(active, nowhere)  # (P, 4, h, w): of each active patch, itself so far
    # In each round a patch's box grows by those of its eight neighbours, so that after r rounds it is that of all patches
    # within r steps. A region whose centre needs r holds a path without short cuts of 2 r - 1 patches (Erdos, Saks and Sos
    # 1986), and a square of 2 x 2 at most two of them: after this many rounds the centre has the box of the whole region.
    for _ in range(math.ceil(height / 2) * math.ceil(width / 2)):
        boxes = F.max_pool2d(boxes, kernel_size=3, stride=1, padding=1).where(active, nowhere)
    left, top, right, bottom = boxes.flatten(2).unbind(1)  # (P, N)
    right, bottom = (right + 1).clamp(max=width - 1), (bottom + 1).clamp(max=height - 1)
    in_columns = (xs[0] >= -left[..., None]) & (xs[0] < right[..., None])      # (P, N, w)
    in_rows = (ys[:, 0] >= -top[..., None]) & (ys[:, 0] < bottom[..., None])   # (P, N, h)
    return torch.einsum("pnh,pnw->phw", in_rows.to(cams.dtype), in_columns.to(cams.dtype)) > 0


# ----------------------------------------------------------------------------------------------------------------------
# Refinement: CAM -> affinity -> PAR. No gradient flows through any of it
# ----------------------------------------------------------------------------------------------------------------------


def static_affinity(maps: torch.Tensor, count: int) -> torch.Tensor:
    """Which patches attend to each other in CLIP itself? (CLIP-ES; WeCLIP before the switch.)

    maps  (B, M, T, T) attention of the last M blocks; the last `count` are averaged, CLS cut off, not renormalised
    ->    (B, N, N)
    """
    return maps[:, -count:, 1:, 1:].mean(dim=1)


def dynamic_affinity(maps: torch.Tensor, count: int, learned: torch.Tensor) -> torch.Tensor:
    """Which attention maps deserve trust, now that the decoder has learned something? (RFM, refinement module.)

    maps     (B, M, T, T); the last `count` are the candidates
    learned  (B, N, N) of `learned_affinity`
    ->       (B, N, N): mean of the kept maps (over count + 1e-5), times `learned` element by element

    The released code keeps map l if sum(learned - map_l) is at most its mean over the candidates. The sum of `learned`
    is the same for all l: kept are the maps with at least the average patch-to-patch mass, those that attend least to CLS.
    """
    patches = maps[:, -count:, 1:, 1:]
    mass = patches.sum(dim=(2, 3))  # (B, count)
    keep = (mass >= mass.mean(dim=1, keepdim=True) * (1 - 1e-6)).to(maps.dtype)  # rounding must not drop equal maps
    return torch.einsum("bm,bmij->bij", keep / (keep.sum(dim=1, keepdim=True) + 1e-5), patches) * learned


def transition_matrix(affinity: torch.Tensor) -> torch.Tensor:
    """How does activation flow between patches? (B, N, N) -> (B, N, N); CLIP-ES.

    Columns, then rows are divided by their sums, three times in all (Sinkhorn); symmetrised; squared once.
    """
    for _ in range(3):
        affinity = affinity / affinity.sum(dim=1, keepdim=True)
        affinity = affinity / affinity.sum(dim=2, keepdim=True)
    affinity = (affinity + affinity.mT) / 2
    return affinity @ affinity


def spread(transition: torch.Tensor, cams: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Send each CAM's activation along the transition matrix of its image. (P, h, w) -> (P, h, w), not normalised.

    A CAM multiplied by its box mask first is what the released code does with the matrix' columns.
    """
    flat = cams.flatten(1)[..., None]  # (P, N, 1)
    return (transition[pairs[:, 0].to(cams.device)] @ flat).view_as(cams)


PAR_DILATIONS = (1, 2, 4, 8, 12, 24)  # pixels
PAR_OFFSETS = [(dy * d, dx * d) for d in PAR_DILATIONS
               for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]  # 48 neighbours


def neighbours(maps: torch.Tensor, offsets: list[tuple[int, int]] = PAR_OFFSETS):
    """The 48 shifted views of (B, X, H, W), or others, borders replicated; one padded copy, no copy per neighbour."""
    reach, (height, width) = max(map(max, offsets)), maps.shape[-2:]
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    for dy, dx in offsets:
        yield padded[..., reach + dy:reach + dy + height, reach + dx:reach + dx + width]


def par_weights(images: torch.Tensor) -> torch.Tensor:
    """Which of its 48 neighbours does a pixel resemble? (B, 3, H, W) -> (B, 48, H, W); the weights sum to 1.01.

    Colour: softmax over the neighbours of the channel mean of -(|difference| / (0.3 std))^2, std unbiased over the
    neighbours; position: the same of the distances, times 0.01 (AFA).
    """
    count = len(PAR_OFFSETS)
    mean = sum(neighbours(images)) / count
    squares = torch.zeros_like(images)
    for x in neighbours(images):
        squares.addcmul_(x - mean, x - mean)
    precision = 1 / (0.3 * ((squares / (count - 1)).sqrt() + 1e-8))
    colour = images.new_empty(len(images), count, *images.shape[-2:])
    for n, x in enumerate(neighbours(images)):
        torch.mean((x - images).mul_(precision).square_(), dim=1, out=colour[:, n])
    distance = torch.tensor([(dy * dy + dx * dx) ** 0.5 for dy, dx in PAR_OFFSETS], device=images.device)
    position = -(distance / (distance.std() + 1e-8) / 0.3).square()
    colour.sub_(colour.amin(dim=1, keepdim=True)).neg_().exp_()  # softmax in place: no other tensor here is as large
    return colour.div_(colour.sum(dim=1, keepdim=True)).add_(0.01 * position.softmax(dim=0)[:, None, None])


def par(images: torch.Tensor, maps: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Pixel-adaptive refinement (PAR, AFA): let the maps follow the edges of the image.

    images  (B, 3, any size), normalised; resized to the maps with corners aligned
    maps    (B, X, H, W), any number X of maps per image
    ->      (B, X, H, W); each iteration replaces a pixel by the weighted sum of its 48 neighbours. Since these weights sum to
            1.01, twenty iterations scale the maps by 1.22, all alike
    """
    images = F.interpolate(images, size=maps.shape[-2:], mode="bilinear", align_corners=True)
    return refine(maps, par_weights(images), iterations)


def refine(maps: torch.Tensor, weights: torch.Tensor, iterations: int, offsets=PAR_OFFSETS) -> torch.Tensor:
    """Each iteration makes a pixel the weighted sum of its neighbours. (B, X, H, W), weights (B, neighbours, H, W)."""
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for weight, neighbour in zip(weights.unbind(1), neighbours(maps, offsets), strict=True):
            refined.addcmul_(weight[:, None], neighbour)
        maps = refined
    return maps


# ----------------------------------------------------------------------------------------------------------------------
# Labels: which class is each pixel?
# ----------------------------------------------------------------------------------------------------------------------


def enlarge(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps of patches -> maps of pixels, bilinear: (..., h, w) -> (..., H, W), at least one dimension more than two, its maps
    may be none."""
    flat = maps.flatten(0, -3)[:, None]
    return F.interpolate(flat, size=tuple(size), mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def stack_scores(refined: torch.Tensor, pairs: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of each image under one another, its background score first.

    refined  (P, H, W) in [0, 1)
    pairs    (P, 2) on the CPU, images in order
    ->       scores (B, 1+K, H, W), K the largest number of classes in an image: background 1 - max over the classes, the
             image's classes, zeros; ids (B, 1+K) label of each map. Without any class the background score is 1
    """
    counts = torch.bincount(pairs[:, 0], minlength=batch)
    slot = 1 + torch.arange(len(pairs)) - (counts.cumsum(0) - counts)[pairs[:, 0]]
    where = (pairs[:, 0].to(refined.device), slot.to(refined.device))
    scores = refined.new_zeros(batch, 1 + int(counts.max()), *refined.shape[-2:])
    ids = torch.zeros(scores.shape[:2], dtype=torch.long, device=refined.device)
    scores[where], ids[where] = refined, pairs[:, 1].to(refined.device) + 1
    scores[:, 0] = 1 - scores[:, 1:].amax(dim=1) if scores.shape[1] > 1 else 1
    return scores, ids


def best_label(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, 1+K, H, W) scores and (B, 1+K) ids -> (B, H, W) long: every pixel takes the id of its best map.

    None is void: the black padding of a crop gets a label too. 255 occurs in true masks only.
    """
    best = scores.argmax(dim=1)
    return ids.gather(1, best.flatten(1)).view_as(best)


def enlarged_labels(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which class is each pixel? `enlarge(logits, size).argmax(dim=0)`, (H, W) long, but one class at a time.

    The enlarged logits of all 81 classes of COCO would take 15 GB for a photo of 48 million pixels.
    """
    best = enlarge(logits[:1], size)[0]
    labels = torch.zeros_like(best, dtype=torch.long)
    for number in range(1, len(logits)):
        scores = enlarge(logits[number:number + 1], size)[0]
        labels.masked_fill_(scores > best, number)  # of equal ones the first stays, as with argmax
        best = torch.maximum(best, scores)
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# Dense CRF: borders follow the edges of the image. On the CPU, in processes of their own
# ----------------------------------------------------------------------------------------------------------------------


def crf_package() -> tuple:
    """pydensecrf's two modules. Raises data.DataError, which says how to get it, where it is not installed."""
    try:
        return import_module("pydensecrf.densecrf"), import_module("pydensecrf.utils")
    except ImportError as error:
        raise data.DataError("the dense CRF needs the package pydensecrf2: `pip install pydensecrf2`, with a C++ compiler (Python "
                             f"3.13: see README, Troubleshooting); or leave --crf away ({error})") from error


def crf(image: np.ndarray, probs: np.ndarray, iterations: int = 10, gaussian: tuple[float, float] = (3, 3),
        bilateral: tuple[float, float, float] = (64, 5, 4)) -> np.ndarray:
    """Which class is each pixel, if near pixels and pixels of like colour prefer the same one? WeCLIP's numbers.

    image      (H, W, 3) uint8 RGB
    probs      (K, H, W) float32 of a softmax; the unary energy is -log of them (of at least 1e-5)
    gaussian   pixels of the spatial kernel, its weight
    bilateral  pixels and grey levels (0..255) of the kernel of place and colour, its weight
    ->         (K, H, W) float32 marginals, summing to 1 at each pixel
    """
    dense_crf, utils = crf_package()
    classes, height, width = probs.shape
    field = dense_crf.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(utils.unary_from_softmax(probs)))
    field.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    field.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=np.array(image, order="C"), compat=bilateral[2])
    return np.array(field.inference(iterations), dtype=np.float32).reshape(classes, height, width)


def likely_classes(logits: torch.Tensor, floor: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Which classes are worth the time of what comes after? A class that is nowhere costs as much as one that is.

    logits  (C, H, W)
    ->      ids (K,) long of the classes that are more probable than `floor` somewhere, or the best one somewhere;
            their probabilities (K, H, W), not renormalised: the CRF asks for their ratios only
    Measured on VOC pictures with made-up logits (truth plus noise), against the CRF of all classes: of 21 classes 7 are
    kept and 1 pixel in 800 000 changes; of 81 classes 15 are kept, none changes, and it takes a fifth of the time.
    """
    probs = logits.softmax(dim=0)
    keep = probs.amax(dim=(1, 2)) > floor
    keep[logits.argmax(dim=0).unique()] = True
    return keep.nonzero().flatten(), probs[keep]


def par_labels(image: torch.Tensor, logits: torch.Tensor, long_side: int = 1024) -> torch.Tensor:
    """Which class is each pixel, if probabilities follow the edges of the image? PAR in place of the CRF: not the papers'.

    image      (3, H, W) normalised
    logits     (C, h, w) of its patches
    long_side  pixels; a larger picture is refined at this size, and the result enlarged
    ->         (H, W) long
    """
    small = backbone.at_long_side(image, min(long_side, max(image.shape[-2:])), 1)
    ids, probs = likely_classes(enlarge(logits, small.shape[-2:]))
    return ids[enlarged_labels(par(small, probs[None])[0], image.shape[-2:])]


def crf_labels(image: np.ndarray, ids: np.ndarray, probs: np.ndarray, *numbers) -> np.ndarray:
    """A job for a worker process: `ids` (K,) the classes of `probs` (K, H, W), numbers as in `crf` -> (H, W) labels."""
    return ids[crf(image, probs, *numbers).argmax(axis=0)]


def live_as_long_as_the_training(worker: int = 0) -> None:
    """First act of a process that works for a training. It ends when that ends, however it does, not by signals to both.

    Ctrl-C and torchrun's signals go to whole process groups, but the training, which saves first, still needs its workers.
    When it is killed, torch's own workers wait for ever if a server has started them, as on Linux from Python 3.14.
    """
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    training = parent_process()
    threading.Thread(target=lambda: (training.join(), os._exit(1)), daemon=True).start()


def crf_in_processes(jobs, workers: int, work=crf_labels):
    """Many pictures through the CRF: while worker processes are at some, the caller's network goes on with the next ones.

    jobs  an iterable of (key, arguments of `work`, or None where there is nothing to do)
    ->    (key, result or None) in the same order, up to 2 * workers pictures late
    """
    waiting = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), live_as_long_as_the_training)
    try:
        for key, job in jobs:
            waiting.append((key, job and pool.submit(work, *job)))
            while len(waiting) > 2 * workers:
                key, future = waiting.popleft()
                yield key, future and future.result()
        for key, future in waiting:
            yield key, future and future.result()
    except BrokenProcessPool as error:
        raise data.DataError(f"a CRF process died ({error}); if memory ran out, take fewer with -j") from error
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Scores: how good are labels?
# ----------------------------------------------------------------------------------------------------------------------


def confusion_matrix(truth: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> torch.Tensor:
    """How often is class i (row, truth) called class j (column)? Sum these over a split; nothing else has to be kept.

    truth, prediction  the same shape, integer; truth 255 (void) is left out
    ->                 (C, C) int64
    Raises  ValueError  for different shapes or a prediction that is no class
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} differ in shape; "
                         "bring the prediction to the size of the picture first")
    counted = truth < num_classes
    truth, prediction = truth[counted].long(), prediction[counted].long()
    counts = torch.bincount(truth * num_classes + prediction, minlength=num_classes ** 2)
    if (prediction >= num_classes).any():
        raise ValueError(f"prediction {int(prediction.max())} is no class; wanted 0..{num_classes - 1}")
    return counts.reshape(num_classes, num_classes)


def scores(matrix: torch.Tensor) -> dict:
    """Pixel accuracy, mean accuracy, IoU per class and their mean, in [0, 1], from a confusion matrix (C, C).

    Classes without a pixel of truth are left out of both means; a class in neither truth nor prediction has IoU NaN.
    """
    matrix = matrix.double().cpu()
    hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, present = hits / (truth + predicted - hits), truth > 0
    return {"pixel_accuracy": float(hits.sum() / matrix.sum()), "mean_accuracy": float((hits / truth)[present].mean()),
            "miou": float(iou[present].mean()), "iou": iou.tolist(), "present": present.tolist()}


def print_scores(result: dict[str, dict], info: data.DatasetInfo, title: str) -> None:
    """A line per class, a column per kind of prediction, IoU in percent. nan: in neither masks nor predictions."""
    names = ("background", *info.classes)
    width = max(map(len, names))
    print(f"\nIoU in percent, {title}\n{'':{width}}  " + "  ".join(f"{key:>4}" for key in result))
    rows = [(name, [score["iou"][number] for score in result.values()]) for number, name in enumerate(names)]
    for name, values in rows + [("mIoU", [score["miou"] for score in result.values()])]:
        print(f"{name:{width}}  " + "  ".join(f"{100 * value:{max(4, len(key))}.1f}" for key, value in zip(result, values)))
    if note := without_truth(result, info):
        print(note)


def without_truth(result: dict[str, dict], info: data.DatasetInfo) -> str:
    """Which classes is the mIoU silent about? "" if none."""
    present = next(iter(result.values()))["present"]
    names = [name for name, there in zip(("background", *info.classes), present) if not there]
    return f"no pixel of truth, left out of the mIoU: {', '.join(names[:10])}{', ...' * (len(names) > 10)}" if names else ""


# ----------------------------------------------------------------------------------------------------------------------
# Pictures for people
# ----------------------------------------------------------------------------------------------------------------------


def paint(image: np.ndarray, maps: torch.Tensor, class_ids: list[int], classes: tuple[str, ...],
          side: int = 360) -> np.ndarray:
    """CAMs over their picture: each class glows in its colour, with a line around its stronger half; the rest is dim and grey.

    image (H, W, 3) uint8, maps (K, h, w) in [0, 1], class_ids K 0-based classes -> (H' + legend, W', 3) uint8, `side` long
    """
    image, colours = data.fit(image, side), data.display_colours()
    maps = enlarge(maps, image.shape[:2]).clamp(0, 1).cpu().numpy()
    dark = [1 - .8 * x[..., None] * colours[c + 1] / 255 for x, c in zip(maps, class_ids)]
    light = 1 - np.prod(dark, axis=0)  # as lamps add up
    shown = .45 * image.mean(axis=2, keepdims=True) * (1 - maps.max(axis=0, initial=0)[..., None]) + 255 * light
    for x, c in zip(maps, class_ids):
        shown = np.where(data.outline(x > .5)[..., None], colours[c + 1], shown)
    return data.legend(shown.clip(0, 255).astype(np.uint8), class_ids, classes)


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: any picture and any words, all the way to a pseudo label
# ----------------------------------------------------------------------------------------------------------------------


def draw_ladder(image: np.ndarray, cams: torch.Tensor, transition: torch.Tensor, flow: torch.Tensor, scores: torch.Tensor,
                label: torch.Tensor, ids: list[int], classes: tuple[str, ...], captions: dict[str, str]) -> Image.Image:
    """What each stage does to one picture (H, W, 3) uint8; the maps (K, ...) are those of the K classes `ids`.

    captions  {"CAM", "refined", "pseudo label"}: what is written above these
    "affinity" shows where the activation of one patch goes, the one that the first CAM is surest of, framed in white
    """
    def painted(maps: torch.Tensor) -> np.ndarray:
        return paint(image, maps, ids, classes)

    surest, large = cams[0].argmax(), data.fit(image, 360)
    here = F.one_hot(surest, cams[0].numel()).view(1, 1, *cams.shape[-2:]).float()
    affinity = backbone.glow(large, transition[0, :, surest].view(cams.shape[-2:]))
    affinity[data.outline(F.interpolate(here, large.shape[:2])[0, 0].cpu().numpy())] = 255
    pictures = {"image": image, captions["CAM"]: painted(cams), "affinity": affinity,
                captions["refined"]: painted(min_max(flow)), "PAR": painted(scores[0, 1:].clamp(max=1)),
                captions["pseudo label"]: data.overlay(image, label.cpu().numpy(), classes)}
    return data.contact_sheet(list(pictures.values()), list(pictures), columns=len(pictures))


def score(label: torch.Tensor, truth: np.ndarray | None, num_classes: int) -> str:
    """A caption's end: how good is this label of one picture?"""
    if truth is None:
        return ""
    return f", mIoU {100 * scores(confusion_matrix(torch.from_numpy(truth), label.cpu(), num_classes))['miou']:.1f}"


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be read."""
    p = backbone.demo_options(__doc__)
    p.add_argument("--maps", type=data.count, metavar="N", default=8, help="maps in the affinity (default: %(default)s)")
    p.add_argument("--box", type=float, metavar="X", default=0.4, help="of the CAM's maximum (default: %(default)s)")
    args = p.parse_args(argv)
    (info, samples), device = backbone.demo_pictures(args), backbone.choose_device(args.device)
    model = backbone.load_clip(args.clip, device)
    texts = [backbone.text_features(model, names) for names in (info.prompts, info.background)]

    def show(sample: data.Sample, targets: list[Path]) -> None:
        image, truth = backbone.demo_image(sample, info.num_classes, args.long_side)
        size, pairs = image.shape[:2], torch.tensor([(0, label) for label in sample.labels])
        images = backbone.at_long_side(data.normalize(image).to(device), args.long_side, backbone.patch_size(model))

        seen = backbone.look(model, images, args.maps - 1)
        raw, probs, last = grad_cam(model, seen.tokens[-1], *texts, pairs, seen.grid)
        cams = normalize_cams(raw)
        transition = transition_matrix(static_affinity(torch.cat([seen.maps, last[:, None]], dim=1), args.maps))
        flow = spread(transition, cams * box_masks(cams, args.box), pairs)
        before, ids = stack_scores(enlarge(min_max(flow), size), pairs, 1)
        scores = par(images, before)

        labels = {"CAM": best_label(*stack_scores(enlarge(cams, size), pairs, 1))[0],
                  "refined": best_label(before, ids)[0], "pseudo label": best_label(scores, ids)[0]}
        captions = {stage: stage + score(label, truth, info.num_classes) for stage, label in labels.items()}
        data.save_picture(targets[0], draw_ladder(image, cams, transition, flow, scores, labels["pseudo label"],
                                                  list(sample.labels), info.classes, captions))
        tqdm.write(f"{targets[0]}: " + ", ".join(f"{info.classes[c]} {100 * probs[0, c]:.0f} %" for c in sample.labels)
                   + "; " + "; ".join(captions.values()))

    return int(backbone.attempt(show, samples, backbone.result_files(samples, args.output_dir, ("_cam.png",))) > 0)


if __name__ == "__main__":
    data.run(main)
