"""04 - Learning: which parts are trained, what do they learn from, and how do all stages fit together?

In     what the frozen encoders see (02_backbone), the stages from words to labels (03_cam)
Out    `WeCLIP` and `WeCLIPPlus`, the methods: their functions are the stages in the order of the data, from the image to
       the loss and to the prediction; the trained parts, the losses, the rows of numbers, checkpoints
Paper  WeCLIP, CVPR 2024: decoder, refinement module (RFM), losses. WeCLIP+, TPAMI 2025: DINO branch, RFM+, self-labels.
       The affinity loss is AFA's (CVPR 2022).

    python 04_decoder.py                                     # a picture of `shapes` through every stage: shapes and sizes
    python 04_decoder.py --method weclip --index 3
    python 04_decoder.py cat.jpg --classes cat sofa          # yours

Another method is a file methods/NAME.py with a class METHOD that inherits from one of these and replaces some stages.

Letters: B images, P (image, class) pairs, C classes with background, H, W pixels, h, w and N = h * w patches, T = 1 + N
tokens, D width of CLIP, M attention maps.
"""
import argparse
import math
import sys
import types
import zipfile
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Union, get_args, get_origin

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")


# ----------------------------------------------------------------------------------------------------------------------
# The trained parts. Parameters bear the released code's names, so that its checkpoints of these load as they are
# ----------------------------------------------------------------------------------------------------------------------


class TokenMLP(nn.Module):
    """One block's tokens to the decoder's width: Linear, ReLU, Linear. (B, N, D) -> (B, N, width)."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.proj = nn.Linear(in_width, width)
        self.proj_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_2(self.proj(x).relu())


class FuseHead(nn.Module):
    """What do all blocks say together? One TokenMLP per block, concatenated, 1x1 convolution, channel dropout.

    forward  list of `blocks` token maps (B, N, in_width), grid (h, w) -> (B, width, h, w)
    """

    def __init__(self, in_width: int, blocks: int, width: int = 256, dropout: float = 0.1):
        super().__init__()
        self.linears_modulelist = nn.ModuleList(TokenMLP(in_width, width) for _ in range(blocks))
        self.linear_fuse = nn.Conv2d(blocks * width, width, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, tokens: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        parts = [mlp(x) for mlp, x in zip(self.linears_modulelist, tokens, strict=True)]
        maps = torch.cat(parts, dim=-1).mT.unflatten(2, tuple(grid)).contiguous()  # (B, blocks * width, h, w)
        return self.dropout(self.linear_fuse(maps))


class Decoder(nn.Module):
    """Which class is each patch? Pre-norm transformer blocks without position embedding, then a 1x1 convolution.

    forward  (B, width, h, w) -> logits (B, C, h, w)
    """

    def __init__(self, num_classes: int, depth: int = 3, width: int = 256, heads: int = 8):
        super().__init__()
        self.transformer = backbone.clip.model.Transformer(width, depth, heads)  # OpenAI's block: QuickGELU, MLP x 4
        self.linear_pred = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.transformer(features.flatten(2).permute(2, 0, 1))  # (N, B, width)
        maps = tokens.permute(1, 2, 0).unflatten(2, features.shape[-2:])
        return self.linear_pred(maps.contiguous())  # as in FuseHead: gradients in the layout that DDP expects


class Prediction(NamedTuple):
    """What one forward of the trained part gives."""

    logits: torch.Tensor  # (B, C, h, w)
    fused: torch.Tensor   # (B, 256, h, w), after dropout


class Head(nn.Module):
    """The trained part of WeCLIP: a fuse head over the last `blocks` of the blocks that 02_backbone.look gives, and the decoder.

    forward  02_backbone.Seen -> Prediction
    """

    def __init__(self, num_classes: int, clip_width: int = 768, blocks: int = 11, depth: int = 3, dropout: float = 0.1):
        super().__init__()
        self.blocks = blocks
        self.decoder_fts_fuse = FuseHead(clip_width, blocks, dropout=dropout)
        self.decoder = Decoder(num_classes, depth)

    def fuse_clip(self, seen) -> torch.Tensor:
        return self.decoder_fts_fuse([x[:, 1:] for x in seen.tokens[-self.blocks:]], seen.grid)  # without CLS

    def forward(self, seen) -> Prediction:
        fused = self.fuse_clip(seen)
        return Prediction(self.decoder(fused), fused)


class PredictionOfBoth(NamedTuple):
    """Prediction, and that of each branch: logits are their mean, fused features lie side by side."""

    logits: torch.Tensor   # (B, C, h, w)
    fused: torch.Tensor    # (B, 512, h, w)
    of_clip: torch.Tensor  # (B, C, h, w) logits
    of_dino: torch.Tensor  # (B, C, h, w) logits


class TwoBranches(Head):
    """The trained part of WeCLIP+: a second fuse head for DINO; one decoder reads both.

    forward  SeenByBoth -> PredictionOfBoth
    """

    def __init__(self, num_classes: int, clip_width: int = 768, dino_width: int = 384, blocks: int = 1, depth: int = 3,
                 dropout: float = 0.1):
        super().__init__(num_classes, clip_width, blocks, depth, dropout)
        self.dino_decoder_fts_fuse = FuseHead(dino_width, 1, dropout=dropout)

    def fuse_dino(self, seen) -> torch.Tensor:
        on_its_grid = self.dino_decoder_fts_fuse([seen.dino_map.flatten(2).mT], seen.dino_map.shape[-2:])
        return cam.enlarge(on_its_grid, seen.grid)

    def forward(self, seen) -> PredictionOfBoth:
        of_both = self.fuse_clip(seen), self.fuse_dino(seen)
        logits = [self.decoder(fused) for fused in of_both]
        return PredictionOfBoth(sum(logits) / 2, torch.cat(of_both, dim=1), *logits)


def learned_affinity(fused: torch.Tensor) -> torch.Tensor:
    """Do two patches show the same class? sigmoid(F^T F) of the fused features: (B, width, h, w) -> (B, N, N)."""
    flat = fused.flatten(2)
    return (flat.mT @ flat).sigmoid()


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


class SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes; backwards the sum of their gradients, since each process' loss depends on it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    backward = forward


def batch_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes; x itself when there is one. Gradients flow through it.

    Losses below are ratios of sums over the whole batch. With their sums taken over the processes, each process has the
    loss of the whole batch, and the mean of gradients that DistributedDataParallel takes is the gradient of that loss.
    """
    return SumOverProcesses.apply(x) if torch.distributed.is_initialized() else x


def seg_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Half of the cross-entropy over background pixels plus half of that over foreground pixels (WeCLIP, L_seg).

    logits  (B, C, H, W)
    labels  (B, H, W) long, 255 is left out; each half is averaged over its own pixels in the batch
    ->      scalar. Deviation: a half without pixels counts 0; in the released code it makes the value NaN (0 / 0), while
            the gradient is that of the other half, as here
    """
    pixelwise = F.cross_entropy(logits, labels, ignore_index=data.IGNORE_INDEX, reduction="none")
    halves = [labels == 0, (labels > 0) & (labels != data.IGNORE_INDEX)]
    return sum(batch_sum((pixelwise * half).sum()) / batch_sum(half.sum()).clamp(min=1) for half in halves) / 2


def near_pairs(grid: tuple[int, int], radius: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which patches are neighbours? (N, N) bool: at most `radius` rows and columns apart."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def affinity_label(labels: torch.Tensor, grid: tuple[int, int], radius: int) -> torch.Tensor:
    """Do two patches bear the same label? (B, H, W) -> (B, N, N) long: 1 same, 0 different, 255 not asked (far, void)."""
    patches = F.interpolate(labels[:, None].float(), size=tuple(grid), mode="nearest")[:, 0].flatten(1).long()
    same = (patches[:, :, None] == patches[:, None, :]).long()
    void = (patches == data.IGNORE_INDEX)
    skip = void[:, :, None] | void[:, None, :] | ~near_pairs(grid, radius, labels.device)
    return same.masked_fill(skip, data.IGNORE_INDEX)


def affinity_loss(learned: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pull pairs of the same label to 1, push others to 0 (AFA, L_aff). (B, N, N) and (B, N, N) of affinity_label."""
    positive, negative = target == 1, target == 0
    return (0.5 * batch_sum(((1 - learned) * positive).sum()) / (batch_sum(positive.sum()) + 1)
            + 0.5 * batch_sum((learned * negative).sum()) / (batch_sum(negative.sum()) + 1))


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How far is the soft overlap from full? (WeCLIP+.) 1 - mean over all C classes, absent ones included, of
    2 inter / (union + 1e-7); sums over the batch and its pixels.

    Void pixels have no target, but their probabilities still count in the union, as in the released code.
    """
    probs = logits.softmax(dim=1)
    classes = logits.shape[1]
    known = labels != data.IGNORE_INDEX
    target = F.one_hot(labels.where(known, 0), classes).permute(0, 3, 1, 2) * known[:, None]
    inter = batch_sum((probs * target).sum(dim=(0, 2, 3)))
    union = batch_sum((probs + target).sum(dim=(0, 2, 3)))
    return 1 - (2 * inter / (union + 1e-7)).mean()


def self_labels(labels: torch.Tensor, logits: torch.Tensor, above: float) -> torch.Tensor:
    """Where the prediction is surer than `above`, it becomes the label (WeCLIP+). (B, H, W), (B, C, H, W) -> (B, H, W)."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return predicted.where(confidence > above, labels)


# ----------------------------------------------------------------------------------------------------------------------
# WeCLIP
# ----------------------------------------------------------------------------------------------------------------------


ABOVE_ZERO = ("max_iters", "batch_size", "lr", "crop_size", "scale_range", "eval_every", "eval_images", "long_side", "scales",
              "depth", "logit_scale_divisor", "static_maps", "dynamic_maps", "fuse_blocks")
AT_MOST = {"lr": 1e3, "crop_size": 8192, "long_side": 8192, "depth": 64, "scales": 16, "scale_range": 16}  # others 10**9


def fits(value, kind) -> bool:
    """Is it of that type, strictly? True is no number, but 1 is a float. A dict of types: each entry fits its own."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(key), wanted) for key, wanted in kind.items())
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (types.UnionType, Union):
        return any(fits(value, one) for one in inner)
    if not isinstance(value, (int, float) if kind is float else origin) or isinstance(value, bool) != (kind is bool):
        return False
    if origin is dict and inner:
        return fits([*value], list[inner[0]]) and fits([*value.values()], list[inner[1]])
    if origin is list or ... in inner:  # an empty tuple fits nothing
        inner = inner[:1] * max(len(value), origin is tuple)
    return origin not in (list, tuple) or (len(value) == len(inner) and all(map(fits, value, inner)))


@dataclass(frozen=True)
class Config:
    """The numbers that every method has. Defaults: WeCLIP on VOC, released code. Each field is an option of 05_train.py."""

    clip: str = "ViT-B/16"          # OpenAI's name, a file, or `shapes` (the toy)
    # Training
    max_iters: int = 30_000         # optimiser steps
    batch_size: int = 4             # images per step, all processes together; -b counts per process
    lr: float = 2e-3                # AdamW, of what is trained. The released config says 2e-4, its script multiplies by 10
    warmup: int = 50                # steps
    decay: str = "linear"           # of the learning rate, to 0; or cosine, to a hundredth
    weight_decay: float = 0.01      # AdamW
    crop_size: int = 320            # pixels
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the random scale before the crop
    eval_every: int = 2_000         # steps
    eval_images: int | None = None  # so many pictures of val are scored along the way, all at the end; None: always all
    # Inference
    long_side: int = 512            # pixels, at scale 1
    scales: tuple[float, ...] = (1.0, 0.75)
    crf_gaussian: tuple[float, float] = (3, 3)           # pixels, weight
    crf_bilateral: tuple[float, float, float] = (64, 5, 4)  # pixels, grey levels, weight

    def __post_init__(self):
        for field in fields(self):
            value, kind, option = getattr(self, field.name), field.type, f"--{field.name.replace('_', '-')}"
            if not fits(value, kind):
                raise data.DataError(f"{option} {value!r:.99}: wanted {kind if get_args(kind) else kind.__name__}")
            most, positive = AT_MOST.get(field.name, 10**9), field.name in ABOVE_ZERO
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not (0 <= number <= most and (number or not positive)):
                    raise data.DataError(f"{option} {number!s:.40}: wanted a number "
                                         f"{'above 0' if positive else 'that is not negative'}, at most {most:g}")
        if self.scale_range[0] > self.scale_range[1]:
            raise data.DataError("--scale-range {} {}: wanted the smaller one first".format(*self.scale_range))
        if self.decay not in ("linear", "cosine"):
            raise data.DataError(f"--decay {self.decay}: wanted linear or cosine")


@dataclass(frozen=True)
class WeCLIPConfig(Config):
    """WeCLIP's own numbers; defaults as in the released code for VOC."""

    # CAM
    cam_skip: int = 0               # blocks left out just before CLIP's last one
    logit_scale_divisor: float = 1  # of exp(logit_scale)
    box_fraction: float | None = 0.4  # of the CAM's maximum; None: no box mask
    # Affinity
    static_maps: int = 8            # attention maps averaged before `dynamic_from`
    dynamic_maps: int = 6           # candidates of the refinement module (RFM)
    dynamic_from: int = 9_145       # step. Written as 15 000, but the released counter also counts validation forwards
    # Decoder and losses
    fuse_blocks: int | None = None  # how many of the last block outputs are fused; None: all (11 of ViT-B)
    depth: int = 3                  # transformer blocks of the decoder
    affinity_radius: int = 8        # patches, in rows and in columns


SHAPES = dict(clip="shapes", static_maps=4, dynamic_maps=4, box_fraction=0.2, cam_skip=0, fuse_blocks=None, depth=1,
              max_iters=300, batch_size=8, lr=1e-3, crop_size=112, scale_range=(1.0, 1.4), eval_every=60, eval_images=40,
              long_side=112, scales=(1.0, 0.86))  # towers of 5 blocks, all but CLIP's last are read; pictures of 96 pixels


class Rungs(NamedTuple):
    """Every rung of the ladder from CAM to pseudo label."""

    cams: torch.Tensor        # (P, h, w) in [0, 1)
    transition: torch.Tensor  # (B, N, N)
    flow: torch.Tensor        # (P, h, w), refined CAMs, not normalised
    maps: torch.Tensor        # (P, H, W) refined CAMs in [0, 1)
    scores: torch.Tensor      # (B, 1+K, H, W) of background and classes, after PAR
    labels: torch.Tensor      # (B, H, W) long, the pseudo label


class WeCLIP:
    """From the image to the loss: each function is a stage, in the order of the data. A relative replaces some of them.

    step        of the training; None: a picture is looked at or scored, by what has been learned so far
    prediction  of the trained part on the same images; None: nothing has been learned. No label sends a gradient into it
    pairs       (P, 2) of 03_cam.class_pairs, on the CPU: all the supervision there is
    """

    rows = {"voc": WeCLIPConfig(),
            "coco": WeCLIPConfig(box_fraction=0.7, dynamic_maps=10, dynamic_from=40_000, max_iters=80_000, eval_every=10_000),
            "shapes": WeCLIPConfig(**SHAPES, dynamic_from=150)}
    with_masks = {}  # numbers that are others where masks are given to learn from
    rungs = ("CAM", "refined", "pseudo label")  # (): it makes no labels, but learns from masks only

    @classmethod
    def load(cls, cfg, device) -> dict[str, nn.Module]:
        """What is frozen, by the name of its field in the row. A checkpoint keeps the fingerprint of each."""
        return {"clip": backbone.load_clip(cfg.clip, device)}

    @classmethod
    def suited(cls, cfg, frozen: dict):
        """What the released code changes in a row for another backbone: ViT-L/14 means 12 maps."""
        return replace(cfg, static_maps=12, dynamic_maps=12) if backbone.patch_size(frozen["clip"]) == 14 else cfg

    def __init__(self, cfg, info, frozen: dict, state: dict | None = None):
        """info: 01_data.DatasetInfo. state: of the trained part, from a checkpoint."""
        self.cfg, self.info, self.frozen, self.clip = cfg, info, frozen, frozen["clip"]
        self.device = self.clip.logit_scale.device
        self.model = self.build(state).to(self.device)
        if state is not None:
            self.model.load_state_dict(state)
        self.network = self.model  # 05_train puts DistributedDataParallel around it
        self.text_fg, self.text_bg = self.texts()

    def fused_blocks(self) -> int:
        """How many blocks of CLIP does the decoder read? Raises data.DataError if it has fewer, or none for the CAM."""
        blocks, cfg = len(self.clip.visual.transformer.resblocks) - 1, self.cfg
        if max(cfg.fuse_blocks or 1, cfg.cam_skip + 1) > blocks:
            raise data.DataError(f"--fuse-blocks {cfg.fuse_blocks}, --cam-skip {cfg.cam_skip}: {cfg.clip} has {blocks} "
                                 "blocks before its last; take fewer")
        return cfg.fuse_blocks or blocks

    def build(self, state: dict | None = None) -> nn.Module:
        """The trained part: forward(seen) -> Prediction. Its state dict is the checkpoint."""
        return Head(self.info.num_classes, self.clip.visual.conv1.out_channels, self.fused_blocks(), self.cfg.depth)

    def texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (C-1, E) of the classes, (n_bg, E) of the background words, unit norm."""
        return tuple(backbone.text_features(self.clip, words) for words in (self.info.prompts, self.info.background))

    def ready(self, samples: list = ()) -> None:
        """Is all there that only a training or its labels need, or can it be made of these pictures of the training
        (01_data.Sample)? Asked before the first step. Raises data.DataError if not."""

    def look(self, images: torch.Tensor, for_labels: bool, step: int | None = None, amp: torch.dtype | None = None):
        """What the frozen encoders see; only labels need attention maps. (B, 3, H, W) -> 02_backbone.Seen, or more."""
        maps = max(self.cfg.static_maps, self.cfg.dynamic_maps) - 1  # the last block's is made with the CAM
        return backbone.look(self.clip, images, maps if for_labels else 0, amp)

    def cams(self, seen, prediction, pairs: torch.Tensor, step: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where do the words light up? -> (P, h, w) in [0, 1); attention maps (B, M, T, T), the last block's now with them."""
        scale = self.clip.logit_scale.exp() / self.cfg.logit_scale_divisor
        raw, _, last = cam.grad_cam(self.clip, seen.tokens[-1 - self.cfg.cam_skip], self.text_fg, self.text_bg, pairs,
                                    seen.grid, scale)
        return cam.normalize_cams(raw), torch.cat([seen.maps, last[:, None]], dim=1)

    def learned(self, prediction, step: int | None = None) -> torch.Tensor:
        """Which patches belong together, says the trained part. -> (B, N, N)"""
        return learned_affinity(prediction.fused)

    def affinity(self, maps: torch.Tensor, prediction, step: int | None = None) -> torch.Tensor:
        """Which patches belong together? First CLIP says it alone, then with the trained part (RFM). -> (B, N, N)"""
        if not self.dynamic(prediction, step):
            return cam.static_affinity(maps, self.cfg.static_maps)
        return cam.dynamic_affinity(maps, self.cfg.dynamic_maps, self.learned(prediction, step))

    def dynamic(self, prediction, step: int | None) -> bool:
        """Has enough been learned to have a say in the labels?"""
        return prediction is not None and (step is None or step >= self.cfg.dynamic_from)

    def sources(self, cams: torch.Tensor, prediction, pairs: torch.Tensor, step: int | None = None) -> torch.Tensor:
        """Which activation may spread? That in the boxes around the strong regions. (P, h, w) -> (P, h, w)"""
        return cams if self.cfg.box_fraction is None else cams * cam.box_masks(cams, self.cfg.box_fraction)

    def label(self, images: torch.Tensor, seen, flow: torch.Tensor, pairs: torch.Tensor,
              size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Refined CAMs -> maps (P, H, W), scores (B, 1+K, H, W) along the edges of the images, labels (B, H, W)."""
        maps = cam.enlarge(cam.min_max(flow), size)
        scores, ids = cam.stack_scores(maps, pairs, len(images))
        scores = cam.par(images, scores)
        return maps, scores, cam.best_label(scores, ids)

    @torch.no_grad()
    def pseudo_labels(self, images: torch.Tensor, pairs: torch.Tensor, seen, prediction, size: tuple[int, int],
                      step: int | None = None) -> Rungs:
        """All stages in a row: from the image-level labels of (B, 3, H', W') images to labels of `size` (H, W)."""
        cams, maps = self.cams(seen, prediction, pairs, step)
        transition = cam.transition_matrix(self.affinity(maps, prediction, step))
        flow = cam.spread(transition, self.sources(cams, prediction, pairs, step), pairs)
        return Rungs(cams, transition, flow, *self.label(images, seen, flow, pairs, size))

    def affinity_loss(self, prediction, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Patches of one label belong together, others do not."""
        target = affinity_label(labels, prediction.logits.shape[-2:], self.cfg.affinity_radius)
        return affinity_loss(self.learned(prediction, step), target)

    def losses(self, prediction, labels: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """All losses by name, "total" is what is minimised. labels (B, H, W) long: pseudo labels or masks, 255 is left out."""
        parts = {"seg": seg_loss(cam.enlarge(prediction.logits, labels.shape[-2:]), labels),
                 "aff": self.affinity_loss(prediction, labels, step)}
        return parts | {"total": parts["seg"] + 0.1 * parts["aff"]}

    def network_image(self, image: torch.Tensor, scale: float = 1) -> torch.Tensor:
        """(3, H, W) at its own size -> (1, 3, H', W') as the network sees it: long side cfg.long_side, times `scale`.

        Resized by the factor, not to a size: the sampling positions use the factor itself, as in the released code.
        """
        shortest = math.ceil(backbone.patch_size(self.clip) / min(1, scale))  # what leaves a patch
        base = backbone.at_long_side(image, self.cfg.long_side, shortest)
        return base if scale == 1 else F.interpolate(base, scale_factor=scale, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def logits(self, image: torch.Tensor, scales: tuple[float, ...] | None = None, flip: bool = True,
               amp: torch.dtype | None = None) -> torch.Tensor:
        """What is where in one image (3, H, W) at its own size, without any label? -> (C, h, w) on the first scale's patches.

        scales  averaged; None: cfg.scales. flip: each with its mirror image. (1,) and False: the released "single scale"
        """
        sums, grid = 0, None
        for scale in scales or self.cfg.scales:
            x = self.network_image(image, scale)
            found = self.model(self.look(torch.cat([x, x.flip(-1)]) if flip else x, for_labels=False, amp=amp)).logits
            grid = grid or found.shape[-2:]
            found = cam.enlarge(found, grid)
            sums = sums + ((found[0] + found[1].flip(-1)) / 2 if flip else found[0])
        return sums / len(scales or self.cfg.scales)

    @torch.no_grad()
    def ladder(self, image: torch.Tensor, labels: torch.Tensor, amp: torch.dtype | None = None, trained: bool = True) -> "Ladder":
        """Every stage of one image (3, H, W) as a label map: how much does each add? One scale, no mirror.

        labels   (C-1,) multi-hot image-level labels: the rungs need them, the segmentation does not
        trained  False: nothing has been learned, there is no segmentation
        """
        images, pairs, size = self.network_image(image), cam.class_pairs(labels[None].cpu()), image.shape[-2:]
        seen = self.look(images, for_labels=True, amp=amp)
        prediction = self.model(seen) if trained else None
        found = self.pseudo_labels(images, pairs, seen, prediction, size)
        maps = dict(zip(self.rungs, (cam.enlarge(found.cams, size), found.maps)))
        steps = {rung: cam.best_label(*cam.stack_scores(x, pairs, 1))[0] for rung, x in maps.items()}
        steps[self.rungs[-1]] = found.labels[0]
        return Ladder(steps | ({"segmentation": cam.enlarged_labels(prediction.logits[0], size)} if trained else {}), maps)


class Ladder(NamedTuple):
    """One image through all stages, by the name of the rung."""

    labels: dict[str, torch.Tensor]  # (H, W) long; the last is the segmentation, if anything is trained
    maps: dict[str, torch.Tensor]    # (K, H, W) in [0, 1), what the first labels are made of; classes ascending


# ----------------------------------------------------------------------------------------------------------------------
# WeCLIP+
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeCLIPPlusConfig(WeCLIPConfig):
    """WeCLIP+'s numbers; defaults as in the released code for VOC."""

    dino: str = "dinov2_vits14"     # Meta's name, a file, or `shapes` (the toy)
    lr: float = 2e-4
    cam_skip: int = 1               # as released
    box_fraction: float | None = None
    dynamic_from: int = 0
    fuse_blocks: int | None = 1
    self_label_after: int | None = 18_000  # step after which confident predictions replace pseudo labels; None: never
    self_label_above: float = 0.75  # softmax probability
    scales: tuple[float, ...] = (1.0, 1.5)


class SeenByBoth(NamedTuple):
    """What CLIP saw, as in 02_backbone.Seen, and what DINO saw."""

    tokens: list[torch.Tensor]
    maps: torch.Tensor
    grid: tuple[int, int]
    dino_map: torch.Tensor  # (B, d, h', w')


class WeCLIPPlus(WeCLIP):
    """A frozen DINO beside CLIP, one decoder for both (TPAMI 2025). Replaces: load, suited, build, look, sources, losses."""

    rows = {"voc": WeCLIPPlusConfig(),
            "coco": WeCLIPPlusConfig(box_fraction=0.7, dynamic_maps=8, self_label_after=40_000, max_iters=80_000, batch_size=8,
                                     cam_skip=0, eval_every=10_000),
            "shapes": WeCLIPPlusConfig(**SHAPES, dino="shapes", self_label_after=180)}
    with_masks = {"self_label_after": None}  # nothing is surer than a mask

    @classmethod
    def load(cls, cfg, device):
        return super().load(cfg, device) | {"dino": backbone.load_dino(cfg.dino, device)}

    @classmethod
    def suited(cls, cfg, frozen):
        """With ViT-L/14 CLIP's scale is divided by 4, with DINOv2 ViT-L the decoder has 5 blocks."""
        if backbone.patch_size(frozen["clip"]) == 14:
            cfg = replace(cfg, logit_scale_divisor=4)
        return super().suited(replace(cfg, depth=5) if frozen["dino"].norm.weight.numel() == 1024 else cfg, frozen)

    def build(self, state=None):
        return TwoBranches(self.info.num_classes, self.clip.visual.conv1.out_channels, self.frozen["dino"].norm.weight.numel(),
                           self.fused_blocks(), self.cfg.depth)

    def look(self, images, for_labels, step=None, amp=None):
        dino_map = backbone.dino_features(self.frozen["dino"], images, amp)
        return SeenByBoth(*super().look(images, for_labels, step, amp), dino_map)

    def sources(self, cams, prediction, pairs, step=None):
        """RFM+: the CAM times what is predicted now. The boxes, if any, come from the plain CAM."""
        boxed = super().sources(cams, prediction, pairs, step)
        if prediction is None:
            return boxed
        image_of, class_of = pairs.to(cams.device).unbind(1)
        return boxed * prediction.logits.softmax(dim=1)[image_of, class_of + 1]

    def losses(self, prediction, labels, step):
        """seg + 0.1 aff + 0.1 (mutual_clip + mutual_dino) + dice; a mutual loss teaches one branch the other's argmax."""
        logits, of_clip, of_dino = (cam.enlarge(x, labels.shape[-2:])
                                    for x in (prediction.logits, prediction.of_clip, prediction.of_dino))
        aff = self.affinity_loss(prediction, labels, step)  # before labels are replaced
        if self.cfg.self_label_after is not None and step > self.cfg.self_label_after:
            labels = self_labels(labels, logits.detach(), self.cfg.self_label_above)
        parts = {"seg": seg_loss(logits, labels), "aff": aff, "mutual_clip": seg_loss(of_clip, of_dino.argmax(dim=1)),
                 "mutual_dino": seg_loss(of_dino, of_clip.argmax(dim=1)), "dice": dice_loss(logits, labels)}
        mutual = parts["mutual_clip"] + parts["mutual_dino"]
        return parts | {"total": parts["seg"] + 0.1 * aff + 0.1 * mutual + parts["dice"]}


# ----------------------------------------------------------------------------------------------------------------------
# Which method, with which numbers: 05_train.py and 06_infer.py know methods by these functions only
# ----------------------------------------------------------------------------------------------------------------------


HERE_ARE = {"weclip+": WeCLIPPlus, "weclip": WeCLIP}


def method_class(name: str) -> type[WeCLIP]:
    """This file's two, or METHOD of methods/NAME.py, imported when asked for.

    Raises  data.DataError  if there is none: a name may come from a foreign checkpoint, and imports nothing but such a file
    """
    files = sorted(path.stem for path in (HERE / "methods").glob("[a-z]*.py"))
    if name not in HERE_ARE and name not in files:
        raise data.DataError(f"no method {name!r}; wanted one of {', '.join([*HERE_ARE, *files])}")
    found = HERE_ARE.get(name) or getattr(import_module(f"methods.{name}"), "METHOD", None)
    if found is None:
        raise data.DataError(f"{name} trains nothing; run it by itself: python methods/{name}.py --help")
    return found


def new_method(name: str, info, options: dict, device) -> WeCLIP:
    """A method that has learned nothing: the row of its data set, what another backbone changes in it, then `options`.

    info     01_data.DatasetInfo; a folder of one's own takes the row of VOC
    options  fields of the row by name
    """
    found = method_class(name)
    row = found.rows.get(info.name, found.rows["voc"])
    frozen = found.load(replace(row, **options), device)
    return found(replace(found.suited(row, frozen), **options), info, frozen)


def add_row_options(parser: argparse.ArgumentParser, config: type[Config], leave_out: tuple[str, ...] = ()) -> list[str]:
    """An option for each field of a row, named like it; none of them is in the result unless given. -> the names.

    A field that may be None takes the word `none`, a tuple takes several numbers.
    """
    chosen = [field for field in fields(config) if field.name not in leave_out]
    for field in chosen:
        inner = [kind for kind in get_args(field.type) if kind not in (types.NoneType, ...)]
        kind = inner[0] if inner else field.type
        how = {"type": partial(none_or, kind) if types.NoneType in get_args(field.type) else kind}
        if get_origin(field.type) is tuple:
            how["nargs"] = "+" if ... in get_args(field.type) else len(inner)
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **hidden, **how)
    return [field.name for field in chosen]


def none_or(kind: type, text: str):
    """The word `none`, or a number."""
    try:
        return None if text == "none" else kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted none, or a number ({kind.__name__})") from None


def chosen_options(args: argparse.Namespace, names: list[str]) -> dict:
    """What was given of the options of `add_row_options`."""
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: the trained part, and everything that says what it is. Plain types only, so that weights_only=True reads it
# ----------------------------------------------------------------------------------------------------------------------


CHECKPOINT = {"step": int, "model": dict[str, torch.Tensor], "config": dict, "method": str, "dataset": str,
              "classes": list[str], "prompts": list[str], "background": list[str], "frozen": dict[str, dict[str, str]]}  # for 06
TOLD = {"dataset": str, "data_path": str | None, "masks": str | None, "split": str | None, "background": list[str] | None,
        "seed": int, "amp": bool}
TO_GO_ON = {"evaluated": int, "best": float, "optimizer": {"state": dict}, "split": str, "masks": str | None, "seed": int,
            "amp": bool, "samples": str, "command": TOLD}  # for 05 --resume


def read_checkpoint(path: str | Path) -> dict:
    """The dict that 05_train saved: CHECKPOINT, and what a training needs to go on.

    Raises  data.DataError for a missing, damaged or foreign file. Nothing in the file is ever executed
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr]  # torch reads nothing there
            if (damaged := archive.testzip()) is not None or folders:  # torch itself does not compare the check sums
                raise ValueError(f"{damaged or folders[0]} is not what was written")
        checkpoint = backbone.read_plain(path)
    except FileNotFoundError:
        raise data.DataError(f"{path}: no such checkpoint; 05_train.py makes them") from None
    except Exception as error:  # whatever zipfile and torch raise on a foreign or truncated file
        raise data.DataError(f"{path}: not a checkpoint of 05_train.py, or damaged ({error})") from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if "config" in entries and "frozen" not in entries:
        raise data.DataError(f"{path}: made by an earlier version of this project; use it with that version, or train again")
    found = method_class(entries["method"]) if fits(entries.get("method"), str) else None
    wrong = [key for key, kind in (CHECKPOINT | TO_GO_ON).items()
             if (key in entries or key in CHECKPOINT) and not fits(entries.get(key), kind)]
    if not wrong:
        step, seed = entries["step"], entries.get("command", entries).get("seed", 0)
        possible = {"step": 0 <= step <= 10**9, "evaluated": -1 <= entries.get("evaluated", 0) <= step,
                    "seed": 0 <= seed <= 10**9, "best": -1 <= entries.get("best", 0) <= 1,
                    "dataset": entries["dataset"] in data.SPLITS,
                    "classes, prompts": 0 < len(entries["classes"]) == len(entries["prompts"]) < data.IGNORE_INDEX}
        wrong = [key for key, fine in possible.items() if not fine]
    if wrong:
        raise data.DataError(f"{path}: not a checkpoint of 05_train.py: {', '.join(wrong)} missing or of an impossible type or value")
    try:
        type(found.rows["voc"])(**entries["config"])
    except (TypeError, ValueError, data.DataError) as error:
        raise data.DataError(f"{path}: its config cannot be used ({error})") from error
    return checkpoint


def finite(model: nn.Module) -> bool:
    """Are all of its weights numbers?"""
    return all(weight.isfinite().all() for weight in model.parameters())


def frozen_names(cfg: Config, frozen: dict[str, nn.Module]) -> dict[str, dict]:
    """What is frozen, as a checkpoint says it: {"clip": {"name": ..., "fingerprint": ...}, ...}."""
    return {what: {"name": getattr(cfg, what), "fingerprint": backbone.fingerprint(model)} for what, model in frozen.items()}


def restore(checkpoint: dict, path: str | Path, options: dict, device) -> WeCLIP:
    """The method behind a checkpoint, its trained part in eval mode.

    options  fields of the row that are others than in training: where the frozen backbones are now, scales
    Raises   data.DataError  if the backbones are not those it was trained on, or the file contradicts itself
    """
    found = method_class(checkpoint["method"])
    info = data.DatasetInfo(checkpoint["dataset"], *(tuple(checkpoint[k]) for k in ("classes", "prompts", "background")))
    try:
        cfg = type(found.rows["voc"])(**{**checkpoint["config"], **options})
        frozen = found.load(cfg, device)
        for what, ours in frozen_names(cfg, frozen).items():
            theirs = checkpoint["frozen"].get(what, {})
            if ours["fingerprint"] != theirs.get("fingerprint"):
                raise data.DataError(f"{path}: trained on another {what} than {ours['name']} ({ours['fingerprint']}): on "
                                     f"{theirs.get('name')} ({theirs.get('fingerprint')}); give that one with --{what}")
        method = found(cfg, info, frozen, checkpoint["model"])
        if not finite(method.model):
            raise ValueError("some are not finite")
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # a foreign file makes torch raise these
        if data.out_of_memory(error):
            raise
        raise data.DataError(f"{path}: its weights do not fit its own config and backbones ({error})") from error
    method.model.eval()
    return method


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: one picture through every stage
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    p = backbone.demo_options(__doc__)
    p.add_argument("--method", default="weclip+", help=f"{', '.join(HERE_ARE)}, or a file of methods/ (default: %(default)s)")
    args = p.parse_args(argv)
    found = method_class(args.method)
    if not found.rungs:
        raise data.DataError(f"{args.method} makes no labels, which this shows; see python methods/{args.method}.py --help")
    info, samples = backbone.demo_pictures(args)
    torch.manual_seed(0)
    options = {name: getattr(args, name) for name in ("clip", "dino", "long_side") if hasattr(found.rows["voc"], name)}
    method = new_method(args.method, info, options, backbone.choose_device(args.device))

    def show(sample) -> None:
        image = data.load_image(sample.image, as_displayed=True)
        images = method.network_image(data.normalize(image).to(method.device))
        pairs = torch.tensor([(0, label) for label in sample.labels])
        seen = method.look(images, for_labels=True)
        prediction = method.model.eval()(seen)
        rungs = method.pseudo_labels(images, pairs, seen, None, image.shape[:2])  # an untrained decoder has no say
        with torch.no_grad():
            losses = method.losses(prediction, rungs.labels, step=0)
        print(f"{args.method}, {sample.image}: {', '.join(info.classes[c] for c in sample.labels)}")
        for stage, tensor in {"image": images, "tokens of a block": seen.tokens[0], "attention maps": seen.maps,
                              **prediction._asdict(), **rungs._asdict()}.items():
            print(f"  {stage:20} {tuple(tensor.shape)}")
        print("  losses of the untrained decoder: " + ", ".join(f"{part} {float(loss):.3f}" for part, loss in losses.items()))

    failed = backbone.attempt(show, samples)
    for part, module in method.model.named_children():
        print(f"{part:24} {sum(p.numel() for p in module.parameters()):>9,} parameters")
    return int(failed > 0)


if __name__ == "__main__":
    data.run(main)
