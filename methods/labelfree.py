"""Label-free - What do class names alone give? What is different from WeCLIP is that nothing is learned.

In     pictures and words; the frozen CLIP, for one row DINOv2 too
Out    the label map of a picture, a panel per row; or the mIoU of a split, twice: by names only, and by names + the image's
       labels (names of absent classes leave the softmax): the first rungs of the ladder that ends at true masks
Paper  seven published ways to make CLIP's patches speak, each by another attention in its last block: CLIP as it is, MaskCLIP
       (ECCV 2022), SCLIP, ClearCLIP, ProxyCLIP (ECCV 2024), NACLIP (WACV 2025), CDAM (ICLR 2025). ROWS is the table of them

    python methods/labelfree.py cat.jpg --classes cat sofa                    # a panel for each row of the table
    python methods/labelfree.py cat.jpg --classes cat "sofa, couch" --attention naclip --pamr
    python methods/labelfree.py shapes                                        # the toy world; voc, coco and FOLDER too
    python methods/labelfree.py shapes --attention sclip --output-dir masks   # and its masks, by names only and with labels
    python methods/labelfree.py voc --attention naclip --protocol released --per-class

Two protocols, never to be compared with one another: `ours` is one for all rows (ProxyCLIP's windows and words, no threshold;
the toy has its own size, words, template and statistics), `released` is each method's own, on data of others that of VOC.
SCLIP's published scores on VOC, 59.6 and 50.5, differ by little else. Numbers and words of both stand in labelfree.json. For
want of released ones clip and maskclip have ClearCLIP's there, with the threshold that its author named for clip on VOC.

What only the released codes say, kept. Weights: the label pixels that change without it, on random towers. SCLIP adds its two
attentions, and beside the residual it counts that the rows sum to 2 (averaged: 11 %). CDAM's rows are not normalised (49 %),
and the last window sets the threshold of the whole picture. Positions are resized bicubically (bilinearly: up to 10 %).
Deviations: CLIP's grid stays (h, w) for ProxyCLIP, whose class swaps it (nothing in square windows, else features are off by
59 %). A flat picture has labels instead of NaN (ProxyCLIP, CDAM). All is float32 (released: half). ProxyCLIP has DINOv2
ViT-B/14 with registers, which its code offers beside the DINO ViT-B/8 that it prefers (not measured). Pictures are resized in
float, not by OpenCV (3 % of the grey values by one level). One above 1024 pixels is labelled at 1024 and enlarged.

Letters: T = 1 + N tokens (CLS first), N = h * w patches, M patches of DINO, D width, d of a head, E joint width, n names, K
classes.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")


# ----------------------------------------------------------------------------------------------------------------------
# The table: what stands in CLIP's last block. A new attention is a new line
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What is put into the last block, and what of the picture it asks for."""

    attention: Callable       # queries and keys (heads, T, d), s = 1 / sqrt(d), the Window w -> (heads, T, T) or (T, T)
    end: Callable             # the Window and out_proj(attention @ values), (T, D) -> the tokens that leave the block, (T, D)
    on_dino: bool = False     # tokens are DINO's patches; else CLS, whose own output nobody reads, and CLIP's patches
    asks_words: bool = False  # of the Window


def full(w: "Window", out: torch.Tensor) -> torch.Tensor:
    """As in CLIP: on top of the residual, then the MLP."""
    return w.x + out + w.block.mlp(w.block.ln_2(w.x + out))


def bare(w: "Window", out: torch.Tensor) -> torch.Tensor:
    """The attention's output and nothing else (ClearCLIP)."""
    return out


softmax = partial(torch.softmax, dim=-1)

ROWS = {
    "clip":      Row(lambda q, k, s, w: softmax(s * q @ k.mT), full),
    "maskclip":  Row(lambda q, k, s, w: torch.eye(k.shape[1], device=k.device), full),
    "sclip":     Row(lambda q, k, s, w: softmax(s * q @ q.mT) + softmax(s * k @ k.mT), full),
    "clearclip": Row(lambda q, k, s, w: softmax(s * q @ q.mT), bare),
    "naclip":    Row(lambda q, k, s, w: softmax(s * k @ k.mT + nearness(w.grid).to(k)), bare),
    "proxyclip": Row(lambda q, k, s, w: softmax(strongest(similarity(w.dino))), bare, on_dino=True),
    "cdam":      Row(lambda q, k, s, w: same_words(w.cosines(ROWS["maskclip"], w.words)), full, asks_words=True),
}


def nearness(grid: tuple[int, int], deviation: float = 5) -> torch.Tensor:
    """Which patches are near? A Gaussian of their distance, in patches, peak 1; 0 for CLS. (T, T), NACLIP's G."""
    places = torch.cartesian_prod(*(torch.arange(float(length)) for length in grid))  # (N, 2)
    return F.pad((-(places[:, None] - places).square().sum(dim=-1) / (2 * deviation ** 2)).exp(), (1, 0, 1, 0))


def similarity(dino: torch.Tensor) -> torch.Tensor:
    """Which patches look alike to DINO? (channels, h', w') -> (M, M) cosines."""
    unit = F.normalize(dino.flatten(1), dim=0)
    return unit.mT @ unit


def strongest(similar: torch.Tensor, shift: float = 1.2, gain: float = 3) -> torch.Tensor:
    """Which of them are more alike than usual? gain (S - shift mean(S)), -inf below 0. (M, M), ProxyCLIP.

    A patch keeps itself in any case: in a flat picture all are alike, and none more than usual
    """
    scores = gain * (similar - shift * similar.mean())
    return scores.masked_fill((scores < 0) & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)


def same_words(cosines: torch.Tensor) -> torch.Tensor:
    """Which patches go by the same words? The mean over seven sizes of the map, 0 for CLS. (n, h, w) -> (T, T), CDAM."""
    return F.pad(sum(word_map(cosines, ratio) for ratio in (1, .25, .37, .5, .63, .75, .87)) / 7, (1, 0, 1, 0))


def word_map(cosines: torch.Tensor, ratio: float, temperature: float = .1, eps: float = 1e-8) -> torch.Tensor:
    """How alike are the patches' distributions over the words? (n, h, w), reduced by `ratio` -> (N, N) in [0, 1], CDAM.

    1 - Jensen-Shannon divergence; each row stretched to [0, 1], through a softmax, stretched again
    """
    def stretched(x: torch.Tensor) -> torch.Tensor:
        x = x - x.amin(dim=1, keepdim=True)
        return x / (x.amax(dim=1, keepdim=True) + eps)

    grid, small = cosines.shape[1:], [max(1, int(length * ratio)) for length in cosines.shape[1:]]
    p = softmax(cam.enlarge(cosines, small).flatten(1).mT / temperature)  # (patches, n)
    log_p, rows = (p + eps).log(), []
    for p_i, log_i in zip(p, log_p):  # all at once would be N * N * n numbers
        log_m = ((p_i + p) / 2 + eps).log()
        rows.append((p_i * (log_i - log_m) + p * (log_p - log_m)).sum(dim=1) / 2)
    divergence = torch.stack(rows)
    for _ in range(2):  # back to the full grid, over the places of one patch, then over those of the other
        divergence = cam.enlarge(divergence.unflatten(1, small), grid).flatten(1).mT
    return stretched(softmax(stretched(1 - divergence) / temperature))


class Window:
    """A window of a picture where it enters CLIP's last block, and what the attentions ask about it."""

    def __init__(self, model: torch.nn.Module, image: torch.Tensor, words=None, dino=None):
        """image (3, H, W) normalised; words (n, E) unit norm, for CDAM; dino (channels, h', w'), its map, for ProxyCLIP."""
        self.visual, self.block, self.words, self.dino = model.visual, model.visual.transformer.resblocks[-1], words, dino
        self.seen = backbone.look(model, image[None], positions=positions)  # an `end` may begin earlier: ExCEL's path
        self.x, self.grid = self.seen.tokens[-1][0], self.seen.grid
        qkv = backbone.queries_keys_values(self.block.attn, self.block.ln_1(self.seen.tokens[-1]))
        self.q, self.k, self.v = (part[0] for part in qkv)  # (heads, T, d)

    def features(self, row: Row) -> torch.Tensor:
        """What do the patches say? (N, E) in CLIP's joint space, not normalised; with `on_dino` (M, E) of DINO's patches."""
        v = self.v
        if row.on_dino:
            v = cam.enlarge(v[:, 1:].mT.unflatten(2, self.grid), self.dino.shape[1:]).flatten(2).mT  # (heads, M, d)
        heads = row.attention(self.q, self.k, v.shape[-1] ** -.5, self) @ v
        tokens = row.end(self, self.block.attn.out_proj(heads.transpose(0, 1).flatten(1)))
        return self.visual.ln_post(tokens if row.on_dino else tokens[1:]) @ self.visual.proj

    def cosines(self, row: Row, texts: torch.Tensor) -> torch.Tensor:
        """How near is each patch to each text? (n, E) unit norm -> (n, h, w)"""
        grid = self.dino.shape[1:] if row.on_dino else self.grid
        return (texts @ F.normalize(self.features(row), dim=-1).mT).unflatten(1, grid)


def positions(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """CLIP's trained positions on another grid; on one of as many patches, of whatever shape, as they are (released)."""
    return embedding if math.prod(grid) == len(embedding) - 1 else backbone.stretched_position_embedding(embedding, grid)


# ----------------------------------------------------------------------------------------------------------------------
# What is not attention: sizes, words, and how cosines become labels
# ----------------------------------------------------------------------------------------------------------------------


SETTINGS = json.loads(data.read_text(Path(__file__).with_suffix(".json")))


class Protocol(NamedTuple):
    """What is not attention, from the picture in to the label map out. A row's is in labelfree.json; defaults are `ours`."""

    background: list[str]        # words
    names: dict[str, str]        # of classes that go by another name, or by several
    short: int = 336             # pixels of the picture's short side; the long one has at most 2048
    side: int | None = 336       # pixels of a window; None: the whole picture
    stride: int = 112            # pixels from window to window
    pad: int = 1                 # a window is padded to multiples of so many pixels
    scale: float = 40            # of the cosines in the softmax over all names
    threshold: float | None = 0  # where the best score is below it, background; None: CDAM's, by entropy
    area: float = 0              # a class of at most this share of the foreground is not there
    pamr: bool = False           # refined along the edges of the picture
    further: list[str] = SETTINGS["further"]      # words that CDAM's attention has beside the names
    templates: list[str] = SETTINGS["templates"]  # OpenAI's, for ImageNet
    pixels: tuple = ((122.771, 116.746, 104.094), (68.501, 66.632, 70.323))  # CLIP's mean and deviation, rounded as released


TOY = {"short": 112, "side": None, "further": [], "templates": [data.TEMPLATE], "pixels": (data.IMAGE_MEAN, data.IMAGE_STD)}


class Way(NamedTuple):
    """A row with its protocol and its words."""

    row: Row
    protocol: Protocol
    owners: torch.Tensor  # (n,) the class of each name, ascending; 0 background
    words: torch.Tensor   # (n or more, E) unit norm: the names, then CDAM's further words


def prepare(model: torch.nn.Module, name: str, info: data.DatasetInfo, args: argparse.Namespace) -> Way:
    """A row as it is used on a data set: by its protocol, where the command line says nothing else."""
    released, known, toy = args.protocol == "released", info.name in SETTINGS, args.clip == "shapes"
    settings = SETTINGS[info.name if known else "voc"]
    if released and (toy or name not in settings):
        raise data.DataError(f"nothing is released for {'the toy CLIP' if toy else name}; take --protocol ours")
    p = Protocol(**settings[name if released else "ours"] | (TOY | {"background": info.background} if toy else {}))
    if not (released and known):  # on COCO "bed" is released as a background word and as a class
        p = p._replace(background=[word for word in p.background if word not in info.classes])
    p = p._replace(**{key: x for key, x in vars(args).items() if key in p._fields and x is not None})
    if not p.background:
        raise data.DataError(f"{name}: all background words are classes; name others: --background wall floor")
    lists = [[*p.background], *((p.names if known else {}).get(of, of.replace("_", " ")).split(", ") for of in info.classes)]
    owners = torch.tensor([number for number, words in enumerate(lists) for _ in words])
    words = text_means(model, (*sum(lists, []), *(p.further if ROWS[name].asks_words else [])), tuple(p.templates))
    return Way(ROWS[name], p, owners.to(words.device), words)


@cache
def text_means(model: torch.nn.Module, words: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
    """What does CLIP think of these words in any sentence? (n, E), mean over the templates, unit norm."""
    bar = tqdm(templates, desc=f"reading {len(words)} words", leave=False, disable=len(templates) == 1 or None)
    return F.normalize(sum(backbone.text_features(model, words, template) for template in bar), dim=-1)


def network_image(image: np.ndarray, short: int) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H', W') whole grey levels, with that short side, the long one at most 2048 pixels; bilinear."""
    factor = min(2048 / max(image.shape[:2]), short / min(image.shape[:2]))
    size = [int(length * factor + .5) for length in image.shape[:2]]
    return cam.enlarge(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)), size).round()


def windows(height: int, width: int, side: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of each, row by row; the last ones end at the edges."""
    def along(length: int) -> list[tuple[int, int]]:
        ends = [min(i * stride + side, length) for i in range(max(length - side + stride - 1, 0) // stride + 1)]
        return [(max(end - side, 0), end) for end in ends]
    return [(top, left, bottom, right) for top, bottom in along(height) for left, right in along(width)]


def picture_cosines(model: torch.nn.Module, dino, way: Way, image: torch.Tensor) -> tuple[torch.Tensor, float]:
    """How near is each pixel to each name? Windows are averaged where they overlap.

    image  (3, H, W) normalised, at network size
    ->     (n, H, W), and the threshold: CDAM's is that of the last window, each overwrites it
    """
    p, texts, size, patch = way.protocol, way.words[:len(way.owners)], image.shape[1:], backbone.patch_size(model)
    sums, seen, threshold = image.new_zeros(len(texts), *size), image.new_zeros(size), p.threshold
    for top, left, bottom, right in windows(*size, p.side or max(size), p.stride):
        more_y, more_x = (max(-length % p.pad, patch - length) for length in (bottom - top, right - left))
        y, x = more_y // 2, more_x // 2  # where the window begins in its padding
        padded = F.pad(image[:, top:bottom, left:right], (x, more_x - x, y, more_y - y))
        dino_map = backbone.dino_features(dino, for_dino(padded, p)[None])[0] if way.row.on_dino else None
        cosines = Window(model, padded, way.words, dino_map).cosines(way.row, texts)
        sums[:, top:bottom, left:right] += cam.enlarge(cosines, padded.shape[1:])[:, y:y + bottom - top, x:x + right - left]
        seen[top:bottom, left:right] += 1
        if p.threshold is None:
            unsure = entropy(cosines, p.scale)
            threshold = float(2.5 / (unsure.min() + unsure.max()))
    return sums / seen, threshold


def for_dino(image: torch.Tensor, p: Protocol) -> torch.Tensor:
    """From the protocol's statistics of pixels to ImageNet's, which DINO was trained with. (3, H, W)"""
    mean, std, its_mean, its_std = torch.tensor((*p.pixels, data.IMAGE_MEAN, data.IMAGE_STD)).to(image)[..., None, None]
    return (image * std + mean - its_mean) / its_std


def entropy(cosines: torch.Tensor, scale: float) -> torch.Tensor:
    """How unsure is a patch of its name? (n, h, w) -> (h, w), bits; 0 log 0 is 0."""
    return torch.special.entr((scale * cosines).softmax(dim=0)).sum(dim=0) / math.log(2)


def pamr(image: torch.Tensor, maps: torch.Tensor, steps: int = 10, dilations: tuple[int, ...] = (8, 16)) -> torch.Tensor:
    """Let the maps follow the edges of the picture: pixel-adaptive mask refinement, as NACLIP has it.

    image  (3, H, W)
    maps   (n, h, w), enlarged with corners aligned
    ->     (n, H, W). Against 03_cam.par: two distances, no square, no term of the place, weights that sum to 1
    """
    offsets = [(y * d, x * d) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1)]  # itself for each d
    around = [offset for offset in offsets if offset != (0, 0)]
    spread = 1e-8 + .1 * torch.stack([*cam.neighbours(image[None], offsets)]).std(dim=0)
    weights = torch.cat([-((x - image).abs() / spread).mean(dim=1) for x in cam.neighbours(image[None], around)]).softmax(0)
    maps = F.interpolate(maps[None], size=image.shape[1:], mode="bilinear", align_corners=True)
    return cam.refine(maps, weights[None], steps, around)[0]


def class_scores(cosines: torch.Tensor, owners: torch.Tensor, scale: float, area: float = 0) -> tuple[torch.Tensor, ...]:
    """How well does the best name of each class fit? A softmax over all names, the maximum over those of a class.

    cosines  (n, H, W)
    owners   (n,)
    area     a class that wins at most this share of what all but the background win gets 0 (SCLIP's rule)
    ->       (K, H, W), which do not sum to 1, of the classes (K,) that have a name
    """
    probs, ids = (scale * cosines).softmax(dim=0), owners.unique()
    scores = torch.stack([probs[owners == number].amax(dim=0) for number in ids])
    if area:
        won = torch.bincount(scores.argmax(dim=0).flatten(), minlength=len(ids)) * (ids > 0)
        scores[(won <= area * won.sum()) & (ids > 0)] = 0
    return scores, ids


def decide(scores: torch.Tensor, ids: torch.Tensor, threshold: float) -> torch.Tensor:
    """The best class, of equal ones the first; background where it is below the threshold. -> (H, W) long"""
    best, which = scores.max(dim=0)
    return ids[which].masked_fill(best < threshold, 0)


def label_maps(model: torch.nn.Module, dino, way: Way, image: np.ndarray, known: list) -> list[torch.Tensor]:
    """What is where in a picture (H, W, 3) uint8? known: the classes, 0-based, that may be there -> for each (H, W) uint8."""
    p, size = way.protocol, image.shape[:2]
    mean, std = torch.tensor(p.pixels)[..., None, None]
    seen = ((network_image(image, p.short) - mean) / std).to(way.words.device)
    cosines, threshold = picture_cosines(model, dino, way, seen)
    shown = [max(1, round(length * min(1, LARGEST / max(size)))) for length in size]
    cosines, found = cam.enlarge(cosines, shown), []
    cosines = pamr(cam.enlarge(seen, shown), cosines) if p.pamr else cosines
    for classes in known:
        names = sum(way.owners == number for number in (0, *(1 + c for c in classes))) > 0
        label = decide(*class_scores(cosines[names], way.owners[names], p.scale, p.area), threshold)
        found.append(F.interpolate(label[None, None].byte(), size=size)[0, 0].cpu())
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


LARGEST = 1024  # pixels of the long side: the cosines of a larger picture might not fit into memory
KNOWN = ("names only", "names + image labels")


def draw(image: np.ndarray, maps: dict[str, list[torch.Tensor]], target: Path, classes: tuple[str, ...]) -> None:
    """The picture, and a panel for each row."""
    panels = {"image": image} | {name: data.overlay(image, label.numpy(), classes) for name, [label] in maps.items()}
    data.save_picture(target, data.contact_sheet(list(panels.values()), list(panels), min(4, len(panels)), side=360))
    tqdm.write(str(target))


def report(matrices: dict[str, list[torch.Tensor]], info: data.DatasetInfo, what: str, per_class: bool) -> None:
    """The mIoU of each row by each of KNOWN, from their confusion matrices."""
    scores = {name: [cam.scores(matrix) for matrix in both] for name, both in matrices.items()}
    for number, known in enumerate(KNOWN if per_class else ()):
        cam.print_scores({name: both[number] for name, both in scores.items()}, info, f"{what}, {known}")
    print(f"\nmIoU in percent, {what}\n{'':12}" + "".join(f"{known:>22}" for known in KNOWN))
    for name, both in scores.items():
        print(f"{name:12}" + "".join(f"{100 * score['miou']:22.1f}" for score in both))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.CommandLine(__doc__, "dataset | pictures ... --classes NAME ...")
    p.add_argument("what", nargs="+", help=f"{', '.join(data.DATASETS)}, a folder with labels; or pictures, folders of them")
    p.add_argument("--classes", nargs="+", metavar="NAME", help='what pictures may show; "sofa, couch" is one class')
    p.add_argument("--attention", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    p.add_argument("--protocol", choices=("ours", "released"), default="ours", help="default: ours, the same for all rows")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words instead of the protocol's")
    p.add_argument("--threshold", type=float, metavar="X", help="background where the best score is below it")
    p.add_argument("--pamr", action=argparse.BooleanOptionalAction, help="refine along edges (default: as the protocol says)")
    p.add_argument("--data-path", metavar="DIR", help="where the data lies (default: data/NAME)")
    p.add_argument("--split", default="val", help="which part of the data set (default: %(default)s)")
    p.add_argument("--per-class", action="store_true", help="print the IoU of each class too")
    p.add_argument("--output-dir", metavar="DIR", help="where pictures go (default: predictions/ beside yours); of a split "
                   "the masks, to DIR/ROW and, with image labels, DIR/ROW_labels")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: ViT-B/16 (shapes: its toy)")
    p.add_argument("--dino", metavar="NAME|FILE", help="default: dinov2_vitb14_reg (with the toy CLIP the toy)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be used."""
    args = parse_args(argv)
    if args.classes:
        info, samples = data.with_prompts("words", args.classes, data.SHAPES_BACKGROUND), backbone.samples_of(args.what)
        targets = backbone.result_files(samples, args.output_dir, ("_labelfree.png",))
    elif len(args.what) > 1 or Path(args.what[0]).is_file():
        raise data.DataError("which words shall be looked for? Name what the pictures may show: --classes cat sofa")
    else:
        info, root = data.dataset_info(args.what[0]), data.find_root(args.what[0], args.data_path)
        samples = [sample for sample in data.list_samples(info, root, args.split) if sample.mask]
        if not samples:
            raise data.DataError(f"{root}: no picture of {args.split} has a mask, nothing to score; draw them with --classes")
    args.clip = args.clip or ("shapes" if info.name == "shapes" else "ViT-B/16")
    rows, device, failed = args.attention or list(ROWS), backbone.choose_device(args.device), 0
    dino_name = args.dino or ("shapes" if args.clip == "shapes" else "dinov2_vitb14_reg")
    dino = backbone.load_dino(dino_name, device) if any(ROWS[name].on_dino for name in rows) else None
    model = backbone.load_clip(args.clip, device)
    ways, matrices = {name: prepare(model, name, info, args) for name in rows}, {name: [0, 0] for name in rows}
    for number, sample in enumerate(tqdm(samples, disable=None)):
        try:
            image, truth = data.load_pair(sample, info.num_classes, not args.classes)
            known = [range(len(info.classes)), sample.labels][:1 if args.classes else 2]
            maps = {name: label_maps(model, dino, way, image, known) for name, way in ways.items()}
            if args.classes:
                draw(image, maps, *targets[number], info.classes)
                continue
            for name, both in maps.items():
                for folder, label in zip((name, f"{name}_labels"), both if args.output_dir else ()):
                    data.save_mask(Path(args.output_dir) / folder / f"{sample.name}.png", label.numpy())
                matrices[name] = [before + cam.confusion_matrix(torch.from_numpy(truth), label, info.num_classes)
                                  for before, label in zip(matrices[name], both)]
        except data.DataError as error:
            backbone.complain(error)
            failed += 1
    if not args.classes and failed < len(samples):
        report(matrices, info, f"{args.split} of {info.name}, protocol {args.protocol}", args.per_class)
    print(f"{len(samples) - failed} pictures, and {failed} that could not be used")
    return int(failed > 0)


if __name__ == "__main__":
    data.run(main)
