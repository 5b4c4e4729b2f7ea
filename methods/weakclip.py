"""WeakCLIP - Better masks from masks: what is different from WeCLIP is that it makes no labels; it mends those it is given.

In     pictures with masks of any source (methods/clip_es.py, `06 --cams`, a truth), the frozen CLIP
Out    `METHOD`: 05 trains it, 06 writes its predictions, and another training learns from those
Paper  "WeakCLIP: Adapting CLIP for Weakly-Supervised Semantic Segmentation", IJCV 2024. Learned vectors before each class
       name, words and patches that read one another, a pyramid of CLIP's blocks beside their cosines with the words

    python methods/clip_es.py voc --split train_aug --output-dir A                              # masks without any training
    python 05_train.py voc --method weakclip --masks A                                          # this file
    python 06_infer.py runs/voc-weakclip-masks/last.pt --split train_aug --crf --output-dir B   # better masks
    python 05_train.py voc --masks B/predictions                                                # the final network
    python methods/weakclip.py                                                                  # the sizes of the parts

`shapes`, coco and FOLDER in place of voc (their split is `train`). `06 --with-labels` keeps only classes that a picture is
known to show: not the paper's way, which uses no image-level label. What is reported is last.pt; best.pt is chosen by true
masks of val, as the released one was (step 8 000 of 20 000). `06 last.pt` scores this network on val: the refiner, without a
final stage.

Otherwise than in the released code, and how much it weighs:
- CLIP is frozen. There the cosine leads groups whose rate is 0 *up* to 1e-6: until step 8 000 AdamW may carry each weight of
  CLIP by 0.001 (of about 0.02), and one step from there on changes the loss of the next by 0.2 %.
- The adapters are random and stay so, as there but for that leak; `--train-adapters` trains them.
- Two of three co-attention layers on each side have no part in the result there, nor a gradient: 4 207 616 numbers less here.
- Augmentation is that of 01_data: colours are left alone, a crop that one class fills to 75 % is not drawn anew, beyond the
  picture is black from before the normalisation (there: after), scales are the picture's (there: of a short side of 512; the
  row has its [0.5, 2] for VOC's usual 375 pixels, or COCO's 480), `train` is not twice in an epoch, pictures without a class
  are left out. Not measured.
- Pictures are resized by torch, not by OpenCV in whole numbers: logits of windows move by 2 to 3 %, 0.6 to 3 % of the labels.
- The picture of the loss's CRF is 0.001 grey levels brighter; without that, rounding takes a whole level from 1 to 4 % of it.
  The CRF is not smooth in the colours: q moves by up to 1e-2, losses by 1e-4. The last CRF has all classes that are likelier
  than 1 % somewhere in the picture (03_cam.likely_classes), there those that win somewhere.
- COCO has 81 classes. The released list has COCO's 90 ids, the released masks 80 in a row: from "street sign" on they differ.
- The final network is WeCLIP+'s decoder (or any other here) in place of DeepLabV1. Names may have more than 3 tokens. Scales
  of pictures longer than 1024 pixels are averaged at that size.
- With torchrun, batch norm has the statistics of all processes on CUDA; on the CPU each process has its own images', and the
  first one's running statistics go into the checkpoint.
Kept: CLS has the class embedding twice, positions are resized twice, void counts in the identity loss's mean (it lowers it).

Letters: B images, C classes with background, D width of CLIP, E joint embedding width, N = h * w patches, T = 1 + N tokens.
"""
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")

TAU, IDENTITY_WEIGHT = 0.07, 0.4        # of the identity loss
LOSS_CRF = (10, (3, 3), (80, 13, 10))   # of the boundary loss: iterations; pixels, weight; pixels, grey levels, weight
AVERAGED_AT = 1024                      # pixels, the long side at most


@dataclass(frozen=True)
class WeakCLIPConfig(decoder.Config):
    """WeakCLIP's numbers; defaults as in the released code for VOC."""

    max_iters: int = 20_000
    batch_size: int = 16
    lr: float = 1e-4
    warmup: int = 1_500
    decay: str = "cosine"
    weight_decay: float = 3e-5
    crop_size: int = 512
    scale_range: tuple[float, float] = (0.7, 2.7)
    # Parts
    native: int = 512               # pixels; positions are resized to its grid first, then to the picture's
    levels: tuple[int, ...] = (3, 5, 7, 11)  # blocks of the pyramid, from 0; a deeper CLIP has them at the same shares
    prompt_tokens: int = 8          # learned vectors
    attention_width: int = 256      # of the co-attention
    attention_heads: int = 4
    pyramid_width: int = 256
    train_adapters: bool = False
    dropout: float = 0.1
    drop_path: float = 0.1          # of CLIP's last block; linear from 0 at the first
    # Losses
    loss_size: int = 64             # pixels each way, of seeding and boundary loss
    boundary_weight: float = 1      # 0 leaves the CRF out
    # Inference
    long_side: int = 2_048          # pixels at scale 1: the larger size that keeps both
    short_side: int = 512
    window: int = 512               # pixels
    stride: int = 341               # pixels
    scales: tuple[float, ...] = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
    crf_bilateral: tuple[float, float, float] = (83, 5, 3)

    def __post_init__(self):
        super().__post_init__()
        for name in ("native", "prompt_tokens", "attention_width", "attention_heads", "pyramid_width", "loss_size",
                     "short_side", "window", "stride"):
            if not 0 < getattr(self, name) <= 8192:
                raise data.DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: wanted a number above 0, at most 8192")
        if max(self.dropout, self.drop_path) >= 1:
            raise data.DataError(f"--dropout {self.dropout}, --drop-path {self.drop_path}: wanted shares below 1")
        if len(self.levels) != 4 or self.attention_width % self.attention_heads:
            raise data.DataError(f"--levels {self.levels}, --attention-width {self.attention_width}: wanted four blocks, and "
                                 f"a width that the {self.attention_heads} heads share")


# ----------------------------------------------------------------------------------------------------------------------
# What the frozen CLIP sees and reads
# ----------------------------------------------------------------------------------------------------------------------


class SeenWeakCLIP(NamedTuple):
    """What CLIP saw in a batch, and what else the trained part asks."""

    tokens: list[torch.Tensor]   # of the four levels, (B, T, D)
    grid: tuple[int, int]        # (h, w) patches
    projected: torch.Tensor      # (B, T, E), all tokens of the last block in the joint space, not normalised
    images: torch.Tensor         # (B, 3, H, W), whose edges the boundary loss follows
    clip: nn.Module              # its text tower reads the prompts in the graph
    texts: torch.Tensor | None = None  # (C, E), when scoring: the same for all windows


@torch.no_grad()
def see(clip: nn.Module, images: torch.Tensor, native: int, drop_path: float = 0,
        amp: torch.dtype | None = None) -> tuple[list[torch.Tensor], tuple[int, int], torch.Tensor]:
    """What does CLIP see, to its very last block? -> tokens after each block L x (B, T, D), grid, projected (B, T, E).

    native     patches each way; positions go from CLIP's own grid to this one, then to that of the images, both bilinear
    drop_path  how often the last block's branches are left out for an image (stochastic depth); linear from 0 at the first

    CLS has the class embedding twice, as released: once by itself, once in its position.
    """
    visual, blocks = clip.visual, clip.visual.transformer.resblocks
    with backbone.in_precision(amp, images.device):
        patches = visual.conv1(images)  # (B, D, h, w)
        grid = tuple(patches.shape[-2:])
        at_native = backbone.clip_position_embedding(visual.positional_embedding, (native, native))
        position = backbone.clip_position_embedding(at_native, grid)
        position[0] += visual.class_embedding
        cls = visual.class_embedding.expand(len(images), 1, -1)
        x, tokens = visual.ln_pre(torch.cat([cls, patches.flatten(2).mT], dim=1) + position), []
        for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)).tolist()):
            x = x + left_out(backbone.attend(block.attn, block.ln_1(x), with_map=False)[0], rate)
            x = x + left_out(block.mlp(block.ln_2(x)), rate)
            tokens.append(x.float())
        projected = visual.ln_post(x) @ visual.proj
    return tokens, grid, projected.float()


def left_out(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """(B, T, D) with the branches of some images zero, the others enlarged by what that takes from the mean."""
    return branch * F.dropout(branch.new_ones(len(branch), 1, 1), rate) if rate else branch


def prompt_ids(classes: tuple[str, ...], clip_context: int, prompt_tokens: int) -> torch.Tensor:
    """The bare names, background first: start, name, end, zeros. -> (C, length) long, as long as the longest name needs.

    Raises  data.DataError  for a name that leaves no room for the learned vectors
    """
    names = ["background", *(name.replace("_", " ") for name in classes)]
    try:
        ids = backbone.clip.tokenize(names, clip_context - prompt_tokens).long()
    except RuntimeError as error:
        raise data.DataError(f"a class name is too long for CLIP beside {prompt_tokens} learned vectors: {error}") from error
    return ids[:, :int((ids > 0).sum(dim=1).max())]


def prompted_texts(clip: nn.Module, ids: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """What does CLIP think of the names behind learned vectors? Gradients flow through the whole text tower into these.

    ids       (C, length) of `prompt_ids`
    contexts  (1, M, width of the text tower), put in after the start token
    ->        (C, E) at the end tokens, not normalised
    """
    words = clip.token_embedding(ids)
    x = torch.cat([words[:, :1], contexts.expand(len(ids), -1, -1), words[:, 1:]], dim=1)
    x = x + clip.positional_embedding[:x.shape[1]]
    for block in clip.transformer.resblocks:
        q, k, v = backbone.queries_keys_values(block.attn, block.ln_1(x))
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.out_proj(heard.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    ends = ids.argmax(dim=1) + contexts.shape[1]  # the end token has the largest id
    return clip.ln_final(x)[torch.arange(len(x), device=x.device), ends] @ clip.text_projection


# ----------------------------------------------------------------------------------------------------------------------
# The trained parts. Parameters bear the released code's names
# ----------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What does the memory say to x? (B, X, width), (B, Y, width) -> (B, X, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory)))
        return self.dropout(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class ReadingLayer(nn.Module):
    """x reads itself, then the memory, which is not normalised again. (B, X, width), (B, Y, width) -> (B, X, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn, self.cross_attn = (Attention(width, heads, dropout) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.dropout(self.mlp(self.norm3(x)))


class CoAttention(nn.Module):
    """How do the words change when they have read the picture, and the picture when it has read the words?

    forward  texts (B, C, E), visual tokens (B, T, E) -> what is added to each, same shapes

    "2": the released code has three layers on each side, all fed the same; the last one's result is used.
    """

    def __init__(self, embed: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed), nn.Linear(embed, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(embed), nn.Linear(embed, width))
        self.decoder, self.anti_decoder = (nn.ModuleDict({"2": ReadingLayer(width, heads, dropout)}) for _ in range(2))
        self.out_proj, self.anti_out_proj = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed)) for _ in range(2))
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, texts: torch.Tensor, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u, m = self.text_proj(texts), self.memory_proj(visual)
        return self.out_proj(self.decoder["2"](u, m)), self.anti_out_proj(self.anti_decoder["2"](m, u))


class Adapters(nn.Module):
    """CLIP's one grid as the four of a pyramid: 4, 2, 1 and 1/2 times its patches. Random, seeded, kept in the checkpoint.

    forward  four of (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h // 2, w // 2)
    """

    def __init__(self, width: int):
        super().__init__()

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.fpn1 = nn.Sequential(nn.GroupNorm(1, width), twice(), nn.BatchNorm2d(width), nn.GELU(), twice())
        self.fpn2 = nn.Sequential(nn.GroupNorm(1, width), twice())
        self.fpn3 = nn.GroupNorm(1, width)
        self.fpn4 = nn.Sequential(nn.GroupNorm(1, width))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        levels = [fpn(x) for fpn, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]
        halved = [min(2, side) for side in levels[3].shape[-2:]]  # a single row of patches stays
        return [*levels[:3], F.max_pool2d(levels[3], halved)]


class Unit(nn.Module):
    """A convolution: by itself with a bias, or (`norm`) without, then batch norm and ReLU. He's start values."""

    def __init__(self, inside: int, outside: int, kernel: int, norm: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(outside) if norm else None
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if not norm:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu() if self.bn else self.conv(x)


class Pyramid(nn.Module):
    """What a coarse level knows goes down to the finer ones (FPN). Four of (B, inside, ., .) -> four of (B, width, ., .)."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(Unit(inside, width, 1) for _ in range(4))
        self.fpn_convs = nn.ModuleList(Unit(width, width, 3) for _ in range(4))

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        found = [unit(x) for unit, x in zip(self.lateral_convs, levels, strict=True)]
        for fine in (2, 1, 0):
            found[fine] = found[fine] + F.interpolate(found[fine + 1], size=found[fine].shape[-2:], mode="nearest")
        return [unit(x) for unit, x in zip(self.fpn_convs, found)]


class PyramidHead(nn.Module):
    """Which class is where? All levels are brought to the size of the first and added. Four maps -> logits (B, C, 4h, 4w)."""

    def __init__(self, num_classes: int, width: int, dropout: float):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for units in (1, 1, 2, 3):
            steps = [step for _ in range(units) for step in (
                Unit(width, width, 3, norm=True), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))]
            self.scale_heads.append(nn.Sequential(*steps[:None if len(self.scale_heads) else 1]))  # the finest stays
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        size = levels[0].shape[-2:]
        return self.conv_seg(self.dropout(sum(cam.enlarge(head(x), size) for head, x in zip(self.scale_heads, levels))))


class PredictionWeakCLIP(NamedTuple):
    """What one forward of the trained part gives."""

    logits: torch.Tensor     # (B, C, 4h, 4w)
    score_map: torch.Tensor  # (B, C, h, w), cosines of patches and words
    images: torch.Tensor     # (B, 3, H, W), as they came


class PromptedPyramid(nn.Module):
    """The trained part: prompts, co-attention, pyramid, head; and the adapters, which are not trained unless told.

    forward  SeenWeakCLIP -> PredictionWeakCLIP. The prompts are read here, and not in `look`: DistributedDataParallel counts
             the gradients of what takes part in forward
    """

    def __init__(self, ids: torch.Tensor, cfg: WeakCLIPConfig, width: int, text_width: int, embed: int):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)  # the checkpoint has the names
        self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, cfg.prompt_tokens, text_width)))
        self.gamma, self.beta = (nn.Parameter(torch.full((embed,), 0.1)) for _ in range(2))
        self.context_decoder = CoAttention(embed, cfg.attention_width, cfg.attention_heads, cfg.dropout)
        self.backbone = Adapters(width).requires_grad_(cfg.train_adapters)
        self.neck = Pyramid(width + len(ids), cfg.pyramid_width)
        self.decode_head = PyramidHead(len(ids), cfg.pyramid_width, cfg.dropout)

    def texts(self, clip: nn.Module) -> torch.Tensor:
        return prompted_texts(clip, self.ids, self.contexts)

    def forward(self, seen: SeenWeakCLIP) -> PredictionWeakCLIP:
        texts = (self.texts(seen.clip) if seen.texts is None else seen.texts).expand(len(seen.images), -1, -1)
        text_diff, visual_diff = self.context_decoder(texts, seen.projected)
        texts = F.normalize(texts + self.gamma * text_diff, dim=-1)                        # (B, C, E)
        patches = F.normalize((seen.projected + self.beta * visual_diff)[:, 1:], dim=-1)   # (B, N, E)
        score_map = (texts @ patches.mT).unflatten(2, seen.grid)
        levels = self.backbone([x[:, 1:].mT.unflatten(2, seen.grid).contiguous() for x in seen.tokens])
        beside = [torch.cat([x, F.interpolate(score_map, x.shape[-2:], mode="bilinear", align_corners=True)], dim=1)
                  for x in levels]
        return PredictionWeakCLIP(self.decode_head(self.neck(beside)), score_map, seen.images)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> softmax + 1e-7, summing to 1 again."""
    probs = logits.softmax(dim=1) + 1e-7
    return probs / probs.sum(dim=1, keepdim=True)


def nearest(labels: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W) -> (B, size, size): pixel i is that at floor(i H / size), in whole numbers."""
    rows, columns = (torch.arange(size, device=labels.device) * side // size for side in labels.shape[-2:])
    return labels[:, rows[:, None], columns]


def seeding_loss(probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Does each pixel believe its mask? -log p, averaged over an image's background pixels plus that over its others.

    probs (B, C, H, W) of `probabilities`, labels (B, H, W) -> scalar, the mean over images; 255 counts nowhere, and an image
    without one of the two kinds has 0 for it
    """
    known = labels != data.IGNORE_INDEX
    pixelwise = -probs.gather(1, labels.where(known, 0)[:, None])[:, 0].log()
    kinds = [labels == 0, known & (labels > 0)]
    return sum((pixelwise * kind).sum(dim=(1, 2)) / kind.sum(dim=(1, 2)).clamp(min=1) for kind in kinds).mean()


def boundary_loss(probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Does it end where the picture's edges are? How far from `crf_target` is probs (B, C, H, W)? KL divergence, averaged.

    Each ratio is clipped to [0.05, 20]; beyond that there is no gradient.
    """
    return (targets * (targets / probs).clamp(0.05, 20).log()).sum(dim=1).mean()


def identity_loss(score_map: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Is the nearest word of each patch the right one? Cross-entropy of cosines (B, C, h, w) / 0.07 at the size of (B, H, W).

    255 costs nothing but counts in the mean, as released.
    """
    logits = cam.enlarge(score_map / TAU, labels.shape[-2:])
    return F.cross_entropy(logits, labels, ignore_index=data.IGNORE_INDEX, reduction="sum") / labels.numel()


def crf_image(images: torch.Tensor, size: int) -> np.ndarray:
    """(B, 3, H, W) normalised -> (B, size, size, 3) uint8 RGB, corners aligned, truncated; 1e-3 lets whole numbers stay."""
    small = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    grey = small.cpu().numpy() * np.float32(data.IMAGE_STD) + np.float32(data.IMAGE_MEAN)
    return (grey + 1e-3).clip(0, 255).astype(np.uint8)


def crf_targets(images: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """`crf_target` of each image: (B, 3, H, W) normalised, (B, C, h, h) -> (B, C, h, h).

    Images are independent, so processes change no number. Each trainer has half of the cores that it need not share.
    """
    jobs = crf_image(images, probs.shape[-1]), probs.cpu().numpy()
    workers = min(len(images), (os.cpu_count() or 1) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        targets = list((crf_pool(workers).map if workers > 1 else map)(crf_target, *jobs))
    except BrokenProcessPool as error:
        raise data.DataError(f"a CRF process died ({error}); if memory ran out, take a smaller -b") from error
    return torch.from_numpy(np.stack(targets)).to(probs.device)


@cache
def crf_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that take job after job, as long as the training lives."""
    return ProcessPoolExecutor(workers, get_context("spawn"), cam.live_as_long_as_the_training)


def crf_target(image: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """A job for a worker process: where would the edges have the classes? (H, W, 3) uint8, (C, H, W) -> q (C, H, W)."""
    q = cam.crf(image, probs.clip(min=1e-4), *LOSS_CRF).clip(min=1e-4)
    return q / q.sum(axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# Windows
# ----------------------------------------------------------------------------------------------------------------------


def network_size(size: tuple[int, int], scale: float, long_side: int, short_side: int, shortest: int = 1) -> tuple[int, int]:
    """(H, W) as large as both sides times `scale` allow, its own shape kept; rounded, no side below `shortest`."""
    factor = min(int(long_side * scale) / max(size), int(short_side * scale) / min(size))
    return tuple(max(int(length * factor + 0.5), shortest) for length in size)


def windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[slice, slice]]:
    """Where does the network look, in which order? Rows and columns; the last ones are pushed back into the picture."""
    def along(length: int) -> list[slice]:
        ends = [min(number * stride + window, length) for number in range(1 + ceil(max(length - window, 0) / stride))]
        return [slice(max(end - window, 0), end) for end in ends]
    return [(rows, columns) for rows in along(size[0]) for columns in along(size[1])]


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


class WeakCLIP(decoder.WeCLIP):
    """Masks in, better masks out. Replaces everything but the loop: it has no CAM, no affinity, no label of its own."""

    rows = {"voc": WeakCLIPConfig(),
            "coco": WeakCLIPConfig(max_iters=40_000, batch_size=24, eval_every=10_000, scale_range=(0.5, 2.1),
                                   crf_gaussian=(1, 3), crf_bilateral=(67, 3, 4)),
            "shapes": WeakCLIPConfig(clip="shapes", max_iters=300, batch_size=8, lr=1e-3, warmup=20, crop_size=112,
                                     scale_range=(1.0, 1.4), eval_every=60, eval_images=40, native=112, attention_width=64,
                                     pyramid_width=64, loss_size=28, long_side=448, short_side=112, window=112, stride=75,
                                     scales=(1.0, 0.86))}
    rungs = ()  # 05 wants --masks, 06 --cams has nothing to show

    @classmethod
    def suited(cls, cfg, frozen):
        """The levels lie at a third, a half, two thirds and the end of any CLIP, as blocks 3, 5, 7, 11 of 12 do."""
        blocks = len(frozen["clip"].visual.transformer.resblocks)
        return replace(cfg, levels=tuple(ceil((level + 1) * blocks / 12) - 1 for level in cfg.levels))

    def build(self, state=None):
        clip, cfg = self.clip, self.cfg
        if max(cfg.levels) >= (blocks := len(clip.visual.transformer.resblocks)):
            raise data.DataError(f"--levels {cfg.levels}: {cfg.clip} has {blocks} blocks, counted from 0")
        ids = prompt_ids(self.info.classes, len(clip.positional_embedding), cfg.prompt_tokens)
        model = PromptedPyramid(ids, cfg, *clip.visual.proj.shape[:1], *clip.text_projection.shape)
        several = torch.distributed.is_initialized() and self.device.type == "cuda"
        return nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model

    def texts(self):
        return None, None  # read in the graph, behind the prompts of the moment

    def ready(self, samples=()):
        try:
            if self.cfg.boundary_weight:
                cam.crf_package()
        except data.DataError as error:
            raise data.DataError("the boundary loss needs the package pydensecrf2 (`pip install pydensecrf2`, with a C++ "
                                 "compiler; Python 3.13: see README); --boundary-weight 0 leaves that loss out") from error

    def look(self, images, for_labels, step=None, amp=None):
        drop_path = self.cfg.drop_path if self.model.training else 0
        tokens, grid, projected = see(self.clip, images, self.cfg.native // backbone.patch_size(self.clip), drop_path, amp)
        return SeenWeakCLIP([tokens[level] for level in self.cfg.levels], grid, projected, images, self.clip)

    def losses(self, prediction, labels, step):
        """seeding + boundary + identity: each is the mean of its images, so the mean over processes is that of the batch."""
        size = self.cfg.loss_size
        probs, parts = probabilities(cam.enlarge(prediction.logits, (size, size))), {}
        parts["seeding"] = seeding_loss(probs, nearest(labels, size))
        if self.cfg.boundary_weight:
            targets = crf_targets(prediction.images, probs.detach())
            parts["boundary"] = self.cfg.boundary_weight * boundary_loss(probs, targets)
        parts["identity"] = IDENTITY_WEIGHT * identity_loss(prediction.score_map, labels)
        return parts | {"total": sum(parts.values())}

    def network_image(self, image, scale=1):
        size = network_size(image.shape[-2:], scale, self.cfg.long_side, self.cfg.short_side, backbone.patch_size(self.clip))
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def logits(self, image, scales=None, flip=True, amp=None):
        """Logarithms of the mean probabilities of scales and mirrors, (C, H, W) at the picture's size, at most 1024 long."""
        size = backbone.at_long_side(image, min(AVERAGED_AT, max(image.shape[-2:])), 1).shape[-2:]
        sums, texts = 0, self.model.texts(self.clip)
        for scale in scales or self.cfg.scales:
            x = self.network_image(image, scale)
            found = cam.enlarge(self.slide(torch.cat([x, x.flip(-1)]) if flip else x, texts, amp), size).softmax(dim=1)
            sums = sums + ((found[0] + found[1].flip(-1)) / 2 if flip else found[0])
        return (sums / len(scales or self.cfg.scales)).clamp(min=torch.finfo(sums.dtype).tiny).log()

    def slide(self, images: torch.Tensor, texts: torch.Tensor, amp: torch.dtype | None = None) -> torch.Tensor:
        """Window by window, averaged where they overlap: (B, 3, H, W) -> logits (B, C, H, W)."""
        sums, counts = images.new_zeros(len(images), len(texts), *images.shape[-2:]), images.new_zeros(images.shape[-2:])
        for rows, columns in windows(images.shape[-2:], self.cfg.window, self.cfg.stride):
            part = images[..., rows, columns]
            logits = self.model(self.look(part, False, amp=amp)._replace(texts=texts)).logits
            sums[..., rows, columns] += cam.enlarge(logits, part.shape[-2:])
            counts[rows, columns] += 1
        return sums / counts

    @torch.no_grad()
    def ladder(self, image, labels, amp=None):
        """One rung: what is predicted at one scale, window by window, without any label."""
        logits = self.logits(image, (1,), False, amp)
        return decoder.Ladder({"segmentation": cam.enlarged_labels(logits, image.shape[-2:])}, {})


METHOD = WeakCLIP


def main(argv: list[str] | None = None) -> int:
    """The sizes of what is trained on VOC with ViT-B/16, part by part."""
    data.CommandLine(__doc__, "").parse_args(argv)
    info, cfg = data.DATASETS["voc"], WeakCLIP.rows["voc"]
    model = PromptedPyramid(prompt_ids(info.classes, 77, cfg.prompt_tokens), cfg, width=768, text_width=512, embed=512)
    for part, parameters in (("contexts", [model.contexts]), ("gamma, beta", [model.gamma, model.beta]),
                             *((name, list(module.parameters())) for name, module in model.named_children())):
        fixed = "" if parameters[0].requires_grad else "   fixed"
        print(f"{part:20} {sum(p.numel() for p in parameters):>10,} parameters{fixed}")
    return 0


if __name__ == "__main__":
    data.run(main)
