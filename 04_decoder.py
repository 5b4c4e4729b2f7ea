"""04 - Refinement, decoder, losses: how do maps become labels, and features become a segmentation?

In     tokens and attention maps (02_backbone), CAMs (03_cam), image-level labels
Out    `refine` (CAM -> affinity -> PAR -> pseudo label), `WeCLIP` and `WeCLIPPlus` (the trained part), the losses,
       `multi_scale_logits`, `enlarged_labels`; `CONFIGS`, the one table of numbers of both methods
Paper  WeCLIP, CVPR 2024: decoder, refinement module (RFM), losses. WeCLIP+, TPAMI 2025: DINO branch, RFM+, self-labels.
       PAR and the affinity loss are AFA's (CVPR 2022), the static affinity is CLIP-ES's (CVPR 2023).

    python 04_decoder.py                                 # a picture of `shapes` through every stage, and the score of each
    python 04_decoder.py cat.jpg --classes cat sofa      # yours, from words alone: no training, no masks

Letters: B images, P (image, class) pairs, C classes with background, H, W pixels, N = h * w patches, T = 1 + N tokens,
D width of CLIP, M attention maps. Class 0 is the background; foreground class c of 03_cam is c + 1 in a label.
"""
import argparse
import math
import sys
import zipfile
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")

# ----------------------------------------------------------------------------------------------------------------------
# The table of numbers: a method on a data set is a row, not a copy of the code
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Every number of a run, those of the learning rate's shape aside. Defaults: WeCLIP on VOC, released code."""

    method: str = "weclip"
    # CAM
    cam_input: int = -1             # which block output enters CLIP's last block: -1 the one before it; -2 skips one, as released
    logit_scale_divisor: float = 1  # of exp(logit_scale); WeCLIP+ divides by 4 with ViT-L/14
    # Affinity
    static_maps: int = 8            # attention maps averaged before `dynamic_from`
    dynamic_maps: int = 6           # candidates of the refinement module (RFM)
    dynamic_from: int = 9_145       # step. Written as 15 000, but the released counter also counts validation forwards
    box_fraction: float | None = 0.4  # of the CAM's maximum; None: no box mask
    weigh_by_prob: bool = False     # RFM+: CAM times the current segmentation probability
    # Decoder
    fuse_blocks: int | None = None  # how many of the last block outputs are fused; None: all (11 of ViT-B)
    depth: int = 3                  # transformer blocks of the decoder; 5 with DINOv2 ViT-L
    # Losses
    self_label_after: int | None = None  # step after which confident predictions replace pseudo labels
    self_label_above: float = 0.75  # softmax probability
    affinity_radius: int = 8        # patches, in rows and in columns
    # Training
    max_iters: int = 30_000         # optimiser steps
    batch_size: int = 4             # images per step, all processes together
    lr: float = 2e-3                # AdamW, of the decoder. The config says 2e-4, the script multiplies by 10
    crop_size: int = 320            # pixels
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the random scale before the crop
    eval_every: int = 2_000         # steps
    # Inference
    long_side: int = 512            # pixels, at scale 1
    scales: tuple[float, ...] = (1.0, 0.75)


_PLUS = Config(method="weclip+", box_fraction=None, weigh_by_prob=True, dynamic_from=0, fuse_blocks=1,
               self_label_after=18_000, lr=2e-4, cam_input=-2, scales=(1.0, 1.5))
_SHAPES = dict(static_maps=3, dynamic_maps=4, box_fraction=0.2, fuse_blocks=None, cam_input=-1, depth=1, max_iters=900,
               batch_size=8, crop_size=112, scale_range=(1.0, 1.4), eval_every=900, long_side=112, scales=(1.0, 0.86),
               lr=1e-3)  # towers of 5 blocks, of which both methods read all but CLIP's last; pictures of 96 pixels, enlarged

CONFIGS = {
    ("weclip", "voc"): Config(),
    ("weclip", "coco"): Config(box_fraction=0.7, dynamic_maps=10, dynamic_from=40_000, max_iters=80_000, eval_every=10_000),
    ("weclip+", "voc"): _PLUS,
    ("weclip+", "coco"): replace(_PLUS, box_fraction=0.7, dynamic_maps=8, self_label_after=40_000, max_iters=80_000,
                                 batch_size=8, cam_input=-1, eval_every=10_000),
    ("weclip", "shapes"): replace(Config(), **_SHAPES, dynamic_from=450),
    ("weclip+", "shapes"): replace(_PLUS, **_SHAPES, self_label_after=540),
}


def config_for(method: str, dataset: str, clip_model: nn.Module, dino: nn.Module | None) -> Config:
    """Which numbers does a run use? The row of (method, data set), adapted to the backbones as the released code does.

    A folder of one's own takes the row of VOC. ViT-L/14 means 12 maps; WeCLIP+ then divides CLIP's scale by 4;
    DINOv2 ViT-L means 5 decoder blocks.
    """
    cfg = CONFIGS[method, dataset if (method, dataset) in CONFIGS else "voc"]
    if clip_model.visual.conv1.kernel_size[0] == 14:
        cfg = replace(cfg, static_maps=12, dynamic_maps=12, logit_scale_divisor=4 if method == "weclip+" else 1)
    if dino is not None and dino.norm.weight.numel() == 1024:
        cfg = replace(cfg, depth=5)
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# The trained part. Parameters bear the released code's names, so that its checkpoints of this part load as they are
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

    logits: torch.Tensor                # (B, C, h, w); WeCLIP+: mean of the two branches
    fused: torch.Tensor                 # (B, 256, h, w), WeCLIP+ (B, 512, h, w); after dropout
    branches: tuple[torch.Tensor, ...]  # WeCLIP+: logits from CLIP, logits from DINO; WeCLIP: ()


class WeCLIP(nn.Module):
    """The trained part of WeCLIP: fuse head over all CLIP blocks but the last, and the decoder.

    forward  tokens  list of (B, 1+N, D) as from 02_backbone.clip_features; grid (h, w)
             ->      Prediction
    """

    def __init__(self, num_classes: int, clip_width: int = 768, blocks: int = 11, depth: int = 3, dropout: float = 0.1):
        super().__init__()
        self.blocks = blocks
        self.decoder_fts_fuse = FuseHead(clip_width, blocks, dropout=dropout)
        self.decoder = Decoder(num_classes, depth)

    def fuse_clip(self, tokens: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        return self.decoder_fts_fuse([x[:, 1:] for x in tokens[-self.blocks:]], grid)  # without CLS

    def forward(self, tokens: list[torch.Tensor], grid: tuple[int, int], dino_map: None = None) -> Prediction:
        fused = self.fuse_clip(tokens, grid)
        return Prediction(self.decoder(fused), fused, ())


class WeCLIPPlus(WeCLIP):
    """The trained part of WeCLIP+: a second fuse head for DINO; one decoder reads both.

    forward  tokens, grid as in WeCLIP; dino_map (B, d, h', w') as from 02_backbone.dino_features
             ->      Prediction, the logits being the mean of both branches
    """

    def __init__(self, num_classes: int, clip_width: int = 768, dino_width: int = 384, blocks: int = 1, depth: int = 3,
                 dropout: float = 0.1):
        super().__init__(num_classes, clip_width, blocks, depth, dropout)
        self.dino_decoder_fts_fuse = FuseHead(dino_width, 1, dropout=dropout)

    def fuse_dino(self, dino_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        fused = self.dino_decoder_fts_fuse([dino_map.flatten(2).mT], dino_map.shape[-2:])  # on DINO's own grid
        return F.interpolate(fused, size=tuple(grid), mode="bilinear", align_corners=False)

    def forward(self, tokens: list[torch.Tensor], grid: tuple[int, int], dino_map: torch.Tensor) -> Prediction:
        fused = self.fuse_clip(tokens, grid), self.fuse_dino(dino_map, grid)
        branches = tuple(self.decoder(features) for features in fused)
        return Prediction(sum(branches) / 2, torch.cat(fused, dim=1), branches)


def build_model(cfg: Config, num_classes: int, clip_model: nn.Module, dino: nn.Module | None) -> WeCLIP:
    """The trained part that fits the backbones, freshly initialised."""
    width = clip_model.visual.conv1.out_channels
    blocks = cfg.fuse_blocks or len(clip_model.visual.transformer.resblocks) - 1
    if cfg.method == "weclip":
        return WeCLIP(num_classes, width, blocks, cfg.depth)
    return WeCLIPPlus(num_classes, width, dino.norm.weight.numel(), blocks, cfg.depth)


def learned_affinity(fused: torch.Tensor) -> torch.Tensor:
    """Do two patches show the same class? sigmoid(F^T F) of the fused features: (B, width, h, w) -> (B, N, N)."""
    flat = fused.flatten(2)
    return (flat.mT @ flat).sigmoid()


# ----------------------------------------------------------------------------------------------------------------------
# Refinement: CAM -> affinity -> PAR -> pseudo label. No gradient flows through any of it
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


def _neighbours(maps: torch.Tensor):
    """The 48 shifted views of (B, X, H, W), borders replicated; one padded copy, no copy per neighbour."""
    reach, (height, width) = max(PAR_DILATIONS), maps.shape[-2:]
    padded = F.pad(maps, (reach,) * 4, mode="replicate")
    for dy, dx in PAR_OFFSETS:
        yield padded[..., reach + dy:reach + dy + height, reach + dx:reach + dx + width]


def par_weights(images: torch.Tensor) -> torch.Tensor:
    """Which of its 48 neighbours does a pixel resemble? (B, 3, H, W) -> (B, 48, H, W); the weights sum to 1.01.

    Colour: softmax over the neighbours of the channel mean of -(|difference| / (0.3 std))^2, std unbiased over the
    neighbours; position: the same of the distances, times 0.01 (AFA).
    """
    count = len(PAR_OFFSETS)
    mean = sum(_neighbours(images)) / count
    squares = torch.zeros_like(images)
    for x in _neighbours(images):
        squares.addcmul_(x - mean, x - mean)
    precision = 1 / (0.3 * ((squares / (count - 1)).sqrt() + 1e-8))
    colour = images.new_empty(len(images), count, *images.shape[-2:])
    for n, x in enumerate(_neighbours(images)):
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
    weights = par_weights(images)
    for _ in range(iterations):
        refined = torch.zeros_like(maps)
        for weight, neighbour in zip(weights.unbind(1), _neighbours(maps), strict=True):
            refined.addcmul_(weight[:, None], neighbour)
        maps = refined
    return maps


def stack_scores(refined: torch.Tensor, pairs: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of each image under one another, its background score first.

    refined  (P, H, W) in [0, 1)
    pairs    (P, 2) on the CPU
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


class Refined(NamedTuple):
    """Every rung of the ladder from CAM to pseudo label."""

    transition: torch.Tensor  # (B, N, N), before the box mask
    spread: torch.Tensor      # (P, h, w), not normalised
    maps: torch.Tensor        # (P, H, W) in [0, 1)
    scores: torch.Tensor      # (B, 1+K, H, W) after PAR
    labels: torch.Tensor      # (B, H, W) long, the pseudo label


@torch.no_grad()
def refine(cfg: Config, images: torch.Tensor, cams: torch.Tensor, maps: torch.Tensor, learned: torch.Tensor,
           probs: torch.Tensor, pairs: torch.Tensor, size: tuple[int, int], dynamic: bool) -> Refined:
    """From CAMs to the pseudo label of a batch (WeCLIP: RFM; WeCLIP+: RFM+).

    images   (B, 3, H', W') as the network saw them
    cams     (P, h, w) normalised, of 03_cam.normalize_cams
    maps     (B, M, T, T) attention, the last block's included
    learned  (B, N, N) of `learned_affinity`
    probs    (B, C, h, w) softmax of the current prediction; read by WeCLIP+ only
    pairs    (P, 2) on the CPU
    size     (H, W) of the label: the crop in training, the original image when scoring
    dynamic  RFM's affinity; else the static one
    """
    affinity = (dynamic_affinity(maps, cfg.dynamic_maps, learned) if dynamic else static_affinity(maps, cfg.static_maps))
    transition = transition_matrix(affinity)
    sources = cams if cfg.box_fraction is None else cams * cam.box_masks(cams, cfg.box_fraction)
    if cfg.weigh_by_prob:  # after the boxes, which come from the plain CAM
        image_of, class_of = pairs.to(cams.device).unbind(1)
        sources = sources * probs[image_of, class_of + 1]
    flow = spread(transition, sources, pairs)
    upsampled = F.interpolate(cam.min_max(flow)[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    scores, ids = stack_scores(upsampled, pairs, len(images))
    scores = par(images, scores)
    return Refined(transition, flow, upsampled, scores, best_label(scores, ids))


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


def losses(cfg: Config, prediction: Prediction, learned: torch.Tensor, labels: torch.Tensor,
           step: int) -> dict[str, torch.Tensor]:
    """All losses of a step, by name; "total" is what is minimised.

    learned  (B, N, N) of `learned_affinity`, with its gradient
    labels   (B, H, W) long: pseudo labels, or true masks when fully supervised
    WeCLIP   seg + 0.1 aff
    WeCLIP+  seg + 0.1 aff + 0.1 (mutual_clip + mutual_dino) + dice; a mutual loss teaches one branch the other's argmax
    """
    def to_pixels(logits):
        return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)

    logits = to_pixels(prediction.logits)
    aff = affinity_loss(learned, affinity_label(labels, prediction.logits.shape[-2:], cfg.affinity_radius))
    if cfg.self_label_after is not None and step > cfg.self_label_after:  # the affinity label was taken before
        labels = self_labels(labels, logits.detach(), cfg.self_label_above)
    parts = {"seg": seg_loss(logits, labels), "aff": aff}
    total = parts["seg"] + 0.1 * aff
    if prediction.branches:
        of_clip, of_dino = (to_pixels(branch) for branch in prediction.branches)
        parts["mutual_clip"] = seg_loss(of_clip, of_dino.argmax(dim=1))
        parts["mutual_dino"] = seg_loss(of_dino, of_clip.argmax(dim=1))
        parts["dice"] = dice_loss(logits, labels)
        total = total + 0.1 * (parts["mutual_clip"] + parts["mutual_dino"]) + parts["dice"]
    return parts | {"total": total}


# ----------------------------------------------------------------------------------------------------------------------
# The stages in one call: what 05 does in a step, and what 06 does with a picture
# ----------------------------------------------------------------------------------------------------------------------


def label_images(cfg: Config, encoders, images: torch.Tensor, seen, prediction: Prediction, pairs: torch.Tensor,
                 size: tuple[int, int], dynamic: bool) -> tuple[torch.Tensor, Refined]:
    """Pseudo labels of a batch from its image-level labels: the CAMs (P, h, w) and everything that `refine` makes of them.

    encoders, seen  02_backbone.Encoders, and its `look` at the images with at least `maps_needed` attention maps
    prediction      of the trained part, on the same images; nothing here sends a gradient into it
    pairs           (P, 2) on the CPU, of 03_cam.class_pairs
    """
    scale = encoders.clip.logit_scale.exp() / cfg.logit_scale_divisor
    raw, _, last_map = cam.grad_cam(encoders.clip, seen.tokens[cfg.cam_input], encoders.text_fg, encoders.text_bg, pairs,
                                    seen.grid, scale)
    cams = cam.normalize_cams(raw)
    maps = torch.cat([seen.maps, last_map[:, None]], dim=1)
    with torch.no_grad():
        learned, probs = learned_affinity(prediction.fused), prediction.logits.softmax(dim=1)
    return cams, refine(cfg, images, cams, maps, learned, probs, pairs, size, dynamic)


def maps_needed(cfg: Config, dynamic: bool) -> int:
    """How many attention maps `label_images` reads, the last block's included: the other blocks need not form theirs."""
    return cfg.dynamic_maps if dynamic else cfg.static_maps


@torch.no_grad()
def ladder(cfg: Config, encoders, model: WeCLIP, image: torch.Tensor, labels: torch.Tensor,
           amp: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Every stage of one image as a label map: how much does each step add? Single scale, no mirror, dynamic affinity.

    image   (3, H, W) normalised, at its own size; the network sees it at long side cfg.long_side
    labels  (C-1,) multi-hot image-level labels. The CAM and what is made of it need them, the segmentation does not
    ->      {"CAM", "refined", "pseudo label", "segmentation"}: (H, W) long, and the maps behind the first two:
            {"cams", "refined_maps"}: (K, H, W) in [0, 1), classes ascending
    """
    size = image.shape[-2:]
    network = resize_long_side(image, cfg, encoders, smallest_scale=1)
    pairs = cam.class_pairs(labels[None].cpu())
    seen = backbone.look(encoders, network, maps_needed(cfg, dynamic=True), amp)
    prediction = model(seen.tokens, seen.grid, seen.dino_map)
    cams, refined = label_images(cfg, encoders, network, seen, prediction, pairs, size, dynamic=True)
    raw_maps = F.interpolate(cams[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]  # K may be 0
    return {"CAM": best_label(*stack_scores(raw_maps, pairs, 1))[0],
            "refined": best_label(*stack_scores(refined.maps, pairs, 1))[0],
            "pseudo label": refined.labels[0],
            "segmentation": enlarged_labels(prediction.logits[0], size),
            "cams": raw_maps, "refined_maps": refined.maps}


def resize_long_side(image: torch.Tensor, cfg: Config, encoders, smallest_scale: float) -> torch.Tensor:
    """(3, H, W) -> (1, 3, H', W') with long side cfg.long_side, the other truncated to int, bilinear.

    A side never gets shorter than what leaves one patch after scaling by `smallest_scale`.
    """
    ratio = cfg.long_side / max(image.shape[-2:])
    smallest = math.ceil(encoders.clip.visual.conv1.kernel_size[0] / min(1, smallest_scale))
    size = [max(int(length * ratio), smallest) for length in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def multi_scale_logits(cfg: Config, encoders, model: WeCLIP, image: torch.Tensor, scales: tuple[float, ...] | None = None,
                       flip: bool = True, amp: torch.dtype | None = None) -> torch.Tensor:
    """What is where in one image? Logits of several scales and their mirrors, averaged. No image-level label is needed.

    image   (3, H, W) normalised, at its own size
    scales  factors on a long side of cfg.long_side (the other side truncated); None: cfg.scales
    flip    average each scale with its mirror image; False with scales=(1,) is the "single scale" of the released scores
    ->      (C, h, w) logits on the first scale's grid of patches; `enlarged_labels` brings them to the image's size
    """
    scales = scales or cfg.scales
    base = resize_long_side(image, cfg, encoders, min(scales))
    sums, grid = 0, None
    for scale in scales:
        # Resized by the factor, not to a size: the sampling positions use the factor itself, as in the released code.
        x = base if scale == 1 else F.interpolate(base, scale_factor=scale, mode="bilinear", align_corners=False)
        x = torch.cat([x, x.flip(-1)]) if flip else x
        seen = backbone.look(encoders, x, amp=amp)
        logits = model(seen.tokens, seen.grid, seen.dino_map).logits
        grid = grid or logits.shape[-2:]  # of the first scale
        logits = F.interpolate(logits, size=grid, mode="bilinear", align_corners=False)
        sums = sums + ((logits[0] + logits[1].flip(-1)) / 2 if flip else logits[0])
    return sums / len(scales)


def enlarge(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, h, w) logits of patches -> (C, H, W) of pixels, bilinear."""
    return F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


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
# Checkpoints: the trained part, and everything that says what it is. Plain types only, so that weights_only=True reads it
# ----------------------------------------------------------------------------------------------------------------------


CHECKPOINT = {"step": int, "model": dict, "config": dict, "method": str, "dataset": str, "classes": list, "prompts": list,
              "background": list, "clip": dict, "dino": (dict, type(None))}  # what 06 needs; 05 needs some more


def read_checkpoint(path: str | Path) -> dict:
    """The dict that 05_train saved: CHECKPOINT, and what a training needs to go on.

    Raises  data.DataError for a missing, damaged or foreign file. Nothing in the file is ever executed
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not compare the check sums
        if damaged is not None:
            raise ValueError(f"the check sum of {damaged} differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise data.DataError(f"{path}: no such checkpoint; 05_train.py makes them") from None
    except Exception as error:  # whatever zipfile and torch raise on a foreign or truncated file
        raise data.DataError(f"{path}: not a checkpoint of 05_train.py, or damaged ({error})") from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    wrong = [key for key, kind in CHECKPOINT.items() if key not in entries or not isinstance(entries[key], kind)]
    if wrong:
        raise data.DataError(f"{path}: not a checkpoint of 05_train.py: {', '.join(wrong)} missing or of another type")
    return checkpoint


def restore(checkpoint: dict, path: str | Path, clip_name: str | None, dino_name: str | None, device) -> tuple:
    """The run behind a checkpoint: -> (DatasetInfo, Config, Encoders, trained part in eval mode).

    clip_name, dino_name  where the frozen backbones are now; None: where they were in training
    Raises                data.DataError if the backbones are not those it was trained on
    """
    info = data.DatasetInfo(checkpoint["dataset"], *(tuple(checkpoint[k]) for k in ("classes", "prompts", "background")))
    names = {"clip": clip_name or checkpoint["clip"].get("name", "?"),
             "dino": (dino_name or checkpoint["dino"].get("name", "?")) if checkpoint["dino"] else None}
    encoders = backbone.load_encoders(names["clip"], names["dino"], info, device)
    for what, name in names.items():
        ours, theirs = name and backbone.fingerprint(getattr(encoders, what)), checkpoint[what] or {}
        if ours != theirs.get("fingerprint"):
            raise data.DataError(f"{path}: trained on another {what} than {name} ({ours}): on {theirs.get('name')} "
                                 f"({theirs.get('fingerprint')}); give that one with --{what}")
    try:
        cfg = Config(**checkpoint["config"])
        model = build_model(cfg, info.num_classes, encoders.clip, encoders.dino).to(device)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # whatever a foreign file makes torch raise
        raise data.DataError(f"{path}: its weights do not fit its own config and backbones ({error})") from error
    return info, cfg, encoders, model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: one picture through every stage
# ----------------------------------------------------------------------------------------------------------------------


def draw_ladder(image: np.ndarray, cams: torch.Tensor, refined: Refined, ids: list[int], grid: tuple[int, int],
                truth: np.ndarray | None, captions: dict[str, str]) -> Image.Image:
    """What each step does to one picture (H, W, 3) uint8; captions by stage. cams (K, H, W), ids their K classes.

    "affinity" shows where the activation of one patch goes, the one that the first CAM is surest of
    """
    def paint(maps: torch.Tensor) -> np.ndarray:
        return cam.paint(image, maps.cpu().numpy(), ids)

    hottest = F.interpolate(cams[:1, None], size=grid, mode="area").argmax()
    pictures = {"image": image, "CAM": paint(cams),
                "affinity": backbone.glow(image, refined.transition[0, :, hottest].view(grid)), "refined": paint(refined.maps),
                "PAR": paint(refined.scores[0, 1:].clamp(max=1)), "pseudo label": data.overlay(image, refined.labels[0].cpu().numpy())}
    if truth is not None:
        pictures["truth"] = data.overlay(image, np.where(truth == data.IGNORE_INDEX, 0, truth))
    return data.contact_sheet(list(pictures.values()), [captions.get(stage, stage) for stage in pictures], columns=4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.CommandLine(__doc__, "[image]")
    p.add_argument("image", nargs="?", help="a picture (default: one of `shapes`, seen by the toy pair)")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="what your picture shows")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words (default: VOC's; with the toy, its own)")
    p.add_argument("--method", choices=("weclip+", "weclip"), default="weclip+", help="default: %(default)s")
    p.add_argument("--index", type=int, default=0, help="which picture of the validation split of `shapes` (default: %(default)s)")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: ViT-B/16 for your picture, the toy for `shapes`")
    p.add_argument("--dino", metavar="NAME|FILE", help="default: dinov2_vits14 for your picture, the toy for `shapes`")
    p.add_argument("--output-dir", "--out", metavar="DIR", help="for NAME_ladder.png (default: predictions/ beside your picture)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.image and not args.classes:
        raise data.DataError("which words shall light up? Name what the picture shows: --classes cat sofa")
    toy, device = args.image is None, backbone.choose_device(args.device)
    clip_name, dino_name = args.clip or ("shapes" if toy else "ViT-B/16"), args.dino or ("shapes" if toy else "dinov2_vits14")
    world = data.DATASETS["shapes" if toy or clip_name == "shapes" else "voc"]
    if toy:
        info, dataset = world, data.EvalDataset(data.list_samples(world, data.find_root("shapes"), "val"), world.num_classes)
        if not 0 <= args.index < len(dataset):
            raise data.DataError(f"--index {args.index}: the validation split has pictures 0 to {len(dataset) - 1}")
        item, image = dataset[args.index], data.load_image(dataset.samples[args.index].image)
        labels, truth, file = item["labels"], item["mask"], Path(item["name"])
    else:
        info, file, truth = cam.info_of_words(world, args.classes, args.background), Path(args.image), None
        image, labels = data.load_image(args.image, as_displayed=True), torch.ones(len(info.classes))
    encoders = backbone.load_encoders(clip_name, dino_name if args.method == "weclip+" else None, info, device)
    # An untrained decoder knows nothing: its probabilities must not weigh the CAMs, nor its features choose attention maps.
    cfg = replace(config_for(args.method, world.name, encoders.clip, encoders.dino), weigh_by_prob=False)
    image = data.rescale(image, min(1, cfg.long_side / max(image.shape[:2])))
    torch.manual_seed(0)
    model = build_model(cfg, info.num_classes, encoders.clip, encoders.dino).to(device).eval()
    pairs = cam.class_pairs(labels[None])
    images = resize_long_side(data.normalize(image).to(device), cfg, encoders, smallest_scale=1)
    seen = backbone.look(encoders, images, maps_needed(cfg, dynamic=False))
    prediction = model(seen.tokens, seen.grid, seen.dino_map)
    cams, refined = label_images(cfg, encoders, images, seen, prediction, pairs, image.shape[:2], dynamic=False)
    with torch.no_grad():
        parts = losses(cfg, prediction, learned_affinity(prediction.fused), refined.labels, step=0)

    print(f"{args.method}, picture {file.stem}: {', '.join(info.classes[c] for _, c in pairs.tolist())}")
    rows = {"image": images, "tokens of a block": seen.tokens[0], "attention maps": seen.maps, "CAM": cams,
            "fused features": prediction.fused, "learned affinity": learned_affinity(prediction.fused),
            "logits": prediction.logits, "transition matrix": refined.transition, "refined CAM": refined.spread,
            "PAR scores": refined.scores, "pseudo label": refined.labels}
    for stage, tensor in rows.items():
        print(f"  {stage:20} {tuple(tensor.shape)}")
    for part, module in model.named_children():
        print(f"  {part:24} {sum(p.numel() for p in module.parameters()):>9,} parameters")
    print("  losses of the untrained decoder: " + ", ".join(f"{part} {float(loss):.3f}" for part, loss in parts.items()))
    cams = F.interpolate(cams[:, None], size=image.shape[:2], mode="bilinear", align_corners=False)[:, 0]
    captions = {}
    for stage, label in (("CAM", best_label(*stack_scores(cams, pairs, 1))),
                         ("refined", best_label(*stack_scores(refined.maps, pairs, 1))), ("pseudo label", refined.labels)):
        if truth is not None:
            score = data.scores(data.confusion_matrix(truth, label[0].cpu(), info.num_classes))
            captions[stage] = f"{stage}, mIoU {100 * score['miou']:.1f}"
            print(f"  {captions[stage]} of this picture")
    [[target]] = data.result_files([file], args.output_dir, ("_ladder.png",))
    target.parent.mkdir(parents=True, exist_ok=True)
    mask = None if truth is None else truth.numpy()
    draw_ladder(image, cams, refined, pairs[:, 1].tolist(), seen.grid, mask, captions).save(target)
    print(target)
    return 0


if __name__ == "__main__":
    data.run(main)
