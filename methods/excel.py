"""ExCEL - Words and patches compared directly: what is different from WeCLIP is that no gradient is needed for a map.

In     images (01_data), CLIP's blocks and words (02_backbone), sentences that describe each class: excel_texts.json, or
       FOLDER/descriptions.json ({class: [sentences]}) for a folder of one's own; without any, plain words
Out    METHOD, for 05_train.py and 06_infer.py; run alone: training-free maps of pictures, training-free scores of a split
Paper  "Exploring CLIP's Dense Knowledge for Weakly Supervised Semantic Segmentation", CVPR 2025. Texts enriched by clustered
       descriptions (TSE); a second path through CLIP's last blocks, without parameters (static visual calibration, SVC); late
       in training what the decoder's features hold for alike is added to that path (learnable visual calibration, LVC).

    python methods/excel.py                                     # a picture of `shapes`, beside CLIP-ES's Grad-CAM
    python methods/excel.py cat.jpg --classes cat sofa          # yours
    python methods/excel.py voc --split train                   # what the maps are worth before any training
    python 05_train.py voc --method excel
    python methods/excel.py shapes --clusters 0                 # without TSE; --surgery-blocks 0 without SVC, --no-lvc in 05

Deviations of the released code from what one would write, and ours from it. In brackets what the other choice does on
networks of random weights, VOC; COCO, in percent: relative change of maps or logits, share of label pixels that change before
and (late) after the switch.
As released:
- A block's new attention is one matrix for all heads, their sum (their mean: maps 19; 20, labels 18; 14, late 14; 89).
- Features are normalised over the tokens and not over the channels (maps 11; 16, labels 24; 46, late 13; 37).
- CLS takes part in a map's minimum and maximum (maps 11; 13, labels 5; 0.4, late 33; 10).
- Attention maps are sums over heads in blocks of two paths, means in the others, all in one average (--no-summed-maps: labels
  3; 5, late 4; 19).
- In-place updates change what the decoder reads: it gets the end of the new path, and tokens between attention and MLP
  (--no-aliased: logits 32; 30, and 86 with twelve heads, labels late 0.5; 7).
- The mean of the cosines is that of the batch: labels depend on a picture's neighbours (maps late 2; 4, labels late 4; 19).
- Boxes begin at 0.79 (COCO 0.88) of the maximum in training, 0.75 in scoring (that in training: labels 21; 33, late 8; 15).
- A tenth of the clusters is left out (none: labels 5; 1, late 2; 3). VOC's scale 1 has no mirror. COCO's logits are averaged
  at 0.2 of the picture's size.
Ours:
- Crops of VOC are drawn blindly. There the true mask chooses them, which is pixel supervision; its weight was not measured.
- The mean of the cosines runs over all processes, there over one; in scoring it runs over one picture in both.
- PAR sees the picture, there one whose values have been cut off (labels 0; 0.01).
- Positions are always stretched from CLIP's own grid, there twice where the name of a split has "train" in it.
- Own sentences, and the bank keeps a fingerprint of them; there a file of the right name is taken for any descriptions.
- Ten clusters or fewer are refused, a map without any difference is 0: there both become NaN.
- Sides of squares go to whole patches. Photographs are averaged at a long side of 1024, at most. COCO's 5 000 pictures that
  are scored along the way come from all over val, there they are its first.

Letters: B images, P (image, class) pairs, C classes with background, N = h * w patches, T = 1 + N tokens, W words (classes,
then background), D width, d of a head, E joint embedding width, M maps, n sentences, k clusters.
"""
import argparse
import hashlib
import json
import math
import sys
import textwrap
import time
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
clip_es = import_module("methods.clip_es")  # to be drawn beside it

TEXTS = Path(__file__).with_name("excel_texts.json")
IN_TEXTS = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant",
            "dining table": "diningtable", "tv": "tvmonitor"}  # COCO's names for what the sentences call as VOC does
FEWEST_CLUSTERS = 11   # of ten or fewer the released code leaves all out, and divides by nothing
SHARPNESS = 3          # of the cosines between fused features
SIDE = 512             # pixels: pictures of one's own are looked at by both methods at this long side, at most
LARGEST = 1024         # pixels: long side at which the logits of a photograph are averaged


# ----------------------------------------------------------------------------------------------------------------------
# Texts (TSE): sentences -> clusters -> enriched words
# ----------------------------------------------------------------------------------------------------------------------


def sentences(info) -> list[str]:
    """What do the classes look like? All sentences, class after class; [] where nobody has described them: plain words.

    Raises  data.DataError  for a file that is no {class: [sentences]}, or lacks a class
    """
    path = Path(info.folder) / "descriptions.json" if info.folder else TEXTS
    if info.folder and not path.exists():
        return []
    try:
        texts = json.loads(data.read_text(path))
        found = {name: texts.get(name, texts.get(IN_TEXTS.get(name), [])) for name in info.classes}
        for name, lines in found.items():
            if not isinstance(lines, list) or not all(isinstance(text, str) for text in lines):
                raise ValueError(f"those of {name} are no list of texts")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise data.DataError(f"{path}: not {{class: [sentences]}} in JSON ({error}); write it so, or take it away: plain "
                             "words will do") from error
    missing = [name for name, lines in found.items() if not lines]
    if missing and info.name not in data.SPLITS:  # any words
        return []
    if missing:
        raise data.DataError(f"{path}: no sentences for {', '.join(missing[:10])}; it has those of "
                             f"{', '.join(list(texts)[:10])}. Write some for each, or take it away: plain words will do")
    return [text for lines in found.values() for text in lines]


def new_bank(model: nn.Module, texts: list[str], clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What do the descriptions have in common? The centres of their features (E, k), and a fingerprint of the sentences.

    texts  sentences with their prompt, as CLIP is to read them; none, or no clusters: k = 0
    Where fewer sentences differ than there are clusters, each is its own.
    Raises  data.DataError  for a sentence too long for CLIP, or too few of them
    """
    if not texts or not clusters:
        return torch.zeros(model.text_projection.shape[1], 0), torch.zeros(8, dtype=torch.uint8)
    features = torch.cat([backbone.text_features(model, texts[i:i + 100], "{}") for i in range(0, len(texts), 100)]).cpu()
    differ = len(features.mul(1e5).round().unique(dim=0))
    if differ < FEWEST_CLUSTERS:
        raise data.DataError(f"{differ} sentences that CLIP can tell apart, wanted at least {FEWEST_CLUSTERS}; describe the "
                             "classes at greater length, or take --clusters 0: plain words")
    fingerprint = hashlib.sha256("\n".join(texts).encode()).digest()[:8]
    return k_means(features, min(clusters, differ)).T.contiguous(), torch.tensor(list(fingerprint), dtype=torch.uint8)


def k_means(points: torch.Tensor, clusters: int, starts: int = 10, seed: int = 0) -> torch.Tensor:
    """Which few stand for all? The best of some runs from greedy k-means++ (Arthur and Vassilvitskii 2007): (n, E) -> (k, E).

    Centres are means, not unit vectors. The same on any device: in float64 on the CPU, from a seed.
    """
    x, generator = points.double().cpu(), torch.Generator().manual_seed(seed)
    runs = [lloyd(x, spread_out(x, clusters, generator)) for _ in range(starts)]
    return min(runs, key=lambda run: float(run[2]))[0].to(points)


def spread_out(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` points far from one another: of a few, drawn by their squared distance to the nearest one so far, the one that
    brings all points closest. (n, E) -> (count, E)"""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    closest = torch.cdist(points[chosen], points).square()[0]  # (n,)
    while len(chosen) < count:
        tried = torch.multinomial(closest, 2 + int(math.log(count)), replacement=True, generator=generator)
        then = torch.minimum(torch.cdist(points[tried], points).square(), closest)
        best = int(then.sum(dim=1).argmin())
        chosen.append(int(tried[best]))
        closest = then[best]
    return points[chosen]


def lloyd(points: torch.Tensor, centres: torch.Tensor, rounds: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points go to the nearest centre, centres to the mean of their points, until nothing moves: (n, E), (k, E) -> centres
    (k, E), labels (n,), the sum of squared distances. A centre that has lost all of its points takes the farthest one."""
    labels = None
    for _ in range(rounds):
        distance, nearest = torch.cdist(points, centres).square().min(dim=1)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels, counts = nearest, torch.bincount(nearest, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = points[distance.topk(len(empty)).indices]
    return centres, labels, distance.sum()


def enrich(words: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """A word and the descriptions that suit it (TSE): unit(words + their mean over the clusters, weighted by a softmax).

    words  (C-1, E), unit norm; bank (E, k): k = 0 leaves them plain
    ->     (C-1, E), unit norm
    """
    return F.normalize(words + cluster_weights(words, bank) @ bank.T, dim=1) if bank.shape[1] else words


def cluster_weights(words: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Which clusters suit a word? (C-1, k): a softmax over all but the tenth of them that suits it least.

    The tenth is int((1 - 0.9) k) in double precision, as released: 11 of 112, but 1 of 20.
    """
    if bank.shape[1] < FEWEST_CLUSTERS:
        raise ValueError(f"a bank of {bank.shape[1]} clusters; wanted at least {FEWEST_CLUSTERS}")
    logits = words @ bank
    least = logits.topk(int((1 - 0.9) * bank.shape[1]), dim=1, largest=False).indices
    return logits.scatter(1, least, -torch.inf).softmax(dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Patches (SVC): two paths through CLIP's last blocks
# ----------------------------------------------------------------------------------------------------------------------


class SeenTwice(NamedTuple):
    """What CLIP saw in a batch of images on its own path and on the new one."""

    tokens: list[torch.Tensor]      # L of (B, T, D), what the decoder reads; the last is CLIP's own last block
    maps: torch.Tensor              # (B, M, T, T) attention of CLIP's own last M blocks, oldest first
    grid: tuple[int, int]           # (h, w) patches
    new: torch.Tensor | None        # (B, T, D) the new path at its end, before ln_post
    values: torch.Tensor | None     # (B, T, D) what a token says in its blocks, all heads together, for any further bias


@torch.no_grad()
def two_paths(model: nn.Module, images: torch.Tensor, surgery: int, num_maps: int = 0,
              terms: tuple[float, ...] = (1 / 3,) * 3, bias: torch.Tensor | None = None, with_new: bool = True,
              aliased: bool = True, summed: bool = True, amp: torch.dtype | None = None) -> SeenTwice:
    """What does the frozen CLIP see if, in its last blocks, patches look at those that are like them?

    The new path starts from the output of the last ordinary block. Each of the last `surgery` blocks adds proj(A v) to it,
    with A of `likeness`, q, k, v of CLIP's own path; no MLP. One matrix multiplies the values of all heads, so proj moves
    into them: z = start + sum of A_l (W_l v_l) + b_l, and a bias in every A costs a single product more (see `biased`).

    images    (B, 3, H, W) normalised; a remainder over the patch size is cut off
    num_maps  of how many last blocks the attention is wanted
    terms     weights of q q^T, k k^T, v v^T in A
    bias      (B, N, N) added between patches to A of every head, in all of these blocks
    with_new  False: CLIP's own path only
    aliased   tokens as the released code's in-place updates leave them. With L blocks, S with two paths: entry L-S-1 is the
              end of the new path, entries L-S to L-2 lie between attention and MLP of the next block. False: block outputs
    summed    attention of the last `surgery` blocks as the sum over the heads (released) and not as their mean
    amp       as in 02_backbone.look
    """
    blocks = model.visual.transformer.resblocks
    first, tokens, between, maps = len(blocks) - surgery, [], [], []
    with backbone.in_precision(amp, images.device):
        x, grid = backbone.first_tokens(model.visual, images)
        new, values = x.float(), torch.zeros_like(x, dtype=torch.float32)
        for i, block in enumerate(blocks):
            mha = block.attn
            q, k, v = backbone.queries_keys_values(mha, block.ln_1(x))
            attended, attention = backbone.answer(mha, q, k, v, with_map=i >= len(blocks) - num_maps)
            if i >= first and with_new:
                said = F.linear(v.transpose(1, 2).flatten(2), mha.out_proj.weight)  # (B, T, D)
                new = new + likeness(q, k, v, terms) @ said + mha.out_proj.bias
                values = values + mha.num_heads * said
            x = x + attended
            if i > first:
                between.append(x.float())
            x = x + block.mlp(block.ln_2(x))
            tokens.append(x.float())
            if i < first:
                new = tokens[-1]
            if attention is not None:
                maps.append(attention.float() * (mha.num_heads if summed and i >= first else 1))
    no_maps = values.new_zeros(len(x), 0, x.shape[1], x.shape[1])
    maps = torch.stack(maps, dim=1) if maps else no_maps
    if not with_new:
        return SeenTwice(tokens, maps, grid, None, None)
    new = biased(new, values, bias)
    if aliased and surgery:
        tokens = [*tokens[:first - 1], with_cls(new, tokens[-1]), *between, tokens[-1]]
    return SeenTwice(tokens, maps, grid, new, values)


def likeness(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: tuple[float, ...]) -> torch.Tensor:
    """Which tokens are alike? Softmax of q q^T, k k^T, v v^T, weighted, over all heads: 3 (B, heads, T, d) -> (B, T, T)."""
    scale = q.shape[-1] ** -0.5
    return sum(weight * ((x * scale) @ x.mT).softmax(dim=-1).sum(dim=1) for weight, x in zip(terms, (q, k, v)) if weight)


def biased(new: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The end of the new path (B, T, D), had (B, N, N) been added to A of every head in all of its blocks; CLS as it was."""
    return new if bias is None else new + F.pad(bias @ values[:, 1:], (0, 0, 1, 0))


def with_cls(new: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The patches of the new path after the CLS token of CLIP's own: twice (B, T, D) -> (B, T, D)."""
    return torch.cat([own[:, :1], new[:, 1:]], dim=1)


def patch_features(model: nn.Module, seen: SeenTwice, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Patches of the new path and CLS of CLIP's own, projected to where the words are: (B, T, E).

    Normalised over the tokens and not over the channels: each channel has norm 1 over an image (released code).
    """
    x = with_cls(biased(seen.new, seen.values, bias), seen.tokens[-1])
    return F.normalize(model.visual.ln_post(x) @ model.visual.proj, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Maps, and what the decoder adds to them (LVC)
# ----------------------------------------------------------------------------------------------------------------------


def word_weights(cls: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Which words suit the whole image? (B, E), (W, E) -> (B, W), 1 on average: softmax of 2 cls . word, times W."""
    return (2 * cls @ words.T).softmax(dim=1) * len(words)


def similarity(features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """How near is each token to each word, less what all words share? (B, T, E), (W, E) -> (B, T, W).

    The words are weighted by how they suit the image first. No product of tokens, words and channels is formed.
    """
    weighted = word_weights(features[:, 0], words)[..., None] * words  # (B, W, E)
    return features @ (weighted - weighted.mean(dim=1, keepdim=True)).mT


def patch_word_maps(features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`similarity` in [0, 1]: minimum and maximum of each word over all tokens, CLS included. A constant column becomes 0."""
    near = similarity(features, words)
    near = near - near.amin(dim=1, keepdim=True)
    height = near.amax(dim=1, keepdim=True)
    return near / height.masked_fill(height == 0, 1)


def sharpened_cosines(fused: torch.Tensor, together: bool) -> torch.Tensor:
    """Which patches does the trained part hold for alike? 3 (cosine - mean of all cosines), (B, width, h, w) -> (B, N, N).

    together  the mean is that of the whole batch, over all processes, with its gradient; else that of `fused`. Only what all
              processes do at once may be together: a training step, no evaluation
    """
    flat = F.normalize(fused.flatten(2), dim=1)
    cosines = flat.mT @ flat
    mean = cosines.mean()
    if together:
        mean = decoder.batch_sum(mean) / decoder.batch_sum(torch.ones_like(mean))  # all have equally many
    return SHARPNESS * (cosines - mean)


@torch.no_grad()
def learned_bias(fused: torch.Tensor, together: bool) -> torch.Tensor:
    """Where does a patch look, by the trained part (LVC)? A softmax over the patches more alike than the mean: (B, N, N)."""
    cosines = sharpened_cosines(fused, together)
    return cosines.masked_fill(cosines < 0, -torch.inf).softmax(dim=2)


# ----------------------------------------------------------------------------------------------------------------------
# ExCEL
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExCELConfig(decoder.Config):
    """ExCEL's numbers; defaults as in the released code for VOC."""

    max_iters: int = 30_000
    lr: float = 1e-3                # the released config says 1e-4, its script multiplies by 10
    long_side: int = 320            # pixels: the side of the square that a picture is squeezed into, at scale 1
    scales: tuple[float, ...] = (0.7, 1.0, 1.2, 1.5)
    logits_scale: float = 1         # of the picture's size, at which the logits of all scales are averaged
    mirror_at_1: bool = False       # is the mirror averaged in at scale 1, too?
    crf_gaussian: tuple[float, float] = (1, 3)
    crf_bilateral: tuple[float, float, float] = (67, 3, 4)
    # Texts
    clusters: int = 112             # of the description bank; 0: plain words (no TSE)
    # Patches
    surgery_blocks: int = 5         # of CLIP's last blocks have a second path; 0: none (no SVC)
    lvc: bool = True                # from `dynamic_from` on
    # Affinity
    box_fraction: float | None = 0.79          # of the map's maximum, in training; None: no boxes
    box_fraction_scoring: float | None = 0.75  # when what has been learned is scored
    box_fraction_free: float | None = 0.79     # before anything has been learned
    static_maps: int = 6
    dynamic_maps: int = 6
    summed_maps: bool = True        # attention of the blocks with two paths: sums over heads, beside means of the others
    dynamic_from: int = 14_000      # step
    # Decoder and losses
    aliased: bool = True            # the decoder reads what the released code's in-place updates leave; False: block outputs
    fuse_blocks: int | None = None  # how many of the last inputs are fused; None: all (12 of ViT-B)
    depth: int = 3                  # transformer blocks of the decoder
    affinity_radius: int = 8        # patches, in rows and in columns
    own_affinity_from: int | None = 24_000  # step; from it on the affinity loss learns from the decoder's own prediction

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.clusters < FEWEST_CLUSTERS:
            raise data.DataError(f"--clusters {self.clusters}: wanted at least {FEWEST_CLUSTERS}, or 0: plain words")
        if self.logits_scale == 0:
            raise data.DataError("--logits-scale 0: wanted a number above 0")


SHAPES = {name: value for name, value in decoder.SHAPES.items() if name in {field.name for field in fields(ExCELConfig)}}


class HeadWithBank(decoder.Head):
    """WeCLIP's trained part, and the description bank, which is made once and then belongs to the checkpoint.

    bank     (E, k) centres of the sentences' features; k = 0: plain words
    made_of  (8,) uint8 fingerprint of the sentences
    """

    def __init__(self, num_classes: int, clip_width: int, blocks: int, depth: int, bank: torch.Tensor, made_of: torch.Tensor):
        super().__init__(num_classes, clip_width, blocks, depth)
        self.register_buffer("bank", bank)
        self.register_buffer("made_of", made_of)
        self.register_load_state_dict_pre_hook(same_bank)


def same_bank(head: HeadWithBank, state: dict, prefix: str, *_) -> None:
    """May the head go on from this state? Raises ValueError where the bank is damaged, or made of other sentences."""
    _, theirs = stored_bank({name.removeprefix(prefix): value for name, value in state.items()}, len(head.bank))
    if not torch.equal(theirs.to(head.made_of.device), head.made_of):
        raise ValueError(f"its description bank is made of other sentences (fingerprint {bytes(theirs.tolist()).hex()}) than "
                         f"are there now ({bytes(head.made_of.tolist()).hex()}); put those back, or start a new run")


def stored_bank(state: dict, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bank (E = width, k) and the fingerprint in a checkpoint's weights. Raises ValueError if they are damaged."""
    bank, made_of = state.get("bank"), state.get("made_of")
    whole = (all(isinstance(x, torch.Tensor) for x in (bank, made_of)) and bank.ndim == 2 and len(bank) == width
             and not 0 < bank.shape[1] < FEWEST_CLUSTERS and bank.is_floating_point() and bank.isfinite().all()
             and made_of.shape == (8,) and made_of.dtype == torch.uint8)
    if not whole:
        raise ValueError("its description bank is missing or damaged; take another checkpoint of the run, or train again")
    return bank, made_of


class ExCEL(decoder.WeCLIP):
    """Patches are compared with words directly (CVPR 2025). Replaces: suited, build, look, cams, learned, sources,
    affinity_loss, network_image, logits."""

    rows = {"voc": ExCELConfig(),
            "coco": ExCELConfig(max_iters=100_000, warmup=200, eval_every=10_000, eval_images=5_000, clusters=224,
                                box_fraction=0.88, dynamic_from=30_000, own_affinity_from=None, logits_scale=0.2,
                                mirror_at_1=True),
            "shapes": ExCELConfig(**SHAPES | dict(box_fraction=0.79, scales=(0.7, 1.0, 1.2, 1.5)), clusters=45,
                                  surgery_blocks=1, dynamic_from=150, own_affinity_from=240)}
    with_masks = {"own_affinity_from": None}  # nothing is surer than a mask

    @classmethod
    def suited(cls, cfg, frozen):
        """A CLIP of fewer blocks: at least the first is ordinary."""
        fewest = min(cfg.surgery_blocks, len(frozen["clip"].visual.transformer.resblocks) - 1)
        return super().suited(replace(cfg, surgery_blocks=fewest), frozen)

    def build(self, state=None):
        """The bank of a checkpoint is taken as it is: no sentence is read for it."""
        blocks, width = len(self.clip.visual.transformer.resblocks), self.clip.text_projection.shape[1]
        if max(self.cfg.surgery_blocks + 1, self.cfg.fuse_blocks or 1) > blocks:
            raise data.DataError(f"--surgery-blocks {self.cfg.surgery_blocks}: CLIP has {blocks}, and the first is ordinary; "
                                 f"--fuse-blocks {self.cfg.fuse_blocks} cannot be more")
        bank = new_bank(self.clip, sentences(self.info), self.cfg.clusters) if state is None else stored_bank(state, width)
        return HeadWithBank(self.info.num_classes, self.clip.visual.conv1.out_channels, self.cfg.fuse_blocks or blocks,
                            self.cfg.depth, *bank)

    def look(self, images, for_labels, step=None, amp=None, **new_path):
        """All blocks. With `aliased`, the decoder needs the new path without any labels, too. new_path: as in `two_paths`"""
        patch, (height, width) = backbone.patch_size(self.clip), images.shape[-2:]
        if min(height, width) < patch:
            raise data.DataError(f"an image of {height} x {width} pixels is smaller than CLIP's patch of {patch}; enlarge it")
        num_maps = max(self.cfg.static_maps, self.cfg.dynamic_maps) if for_labels else 0
        return two_paths(self.clip, images, self.cfg.surgery_blocks, num_maps, with_new=for_labels or self.cfg.aliased,
                         aliased=self.cfg.aliased, summed=self.cfg.summed_maps, amp=amp, **new_path)

    def words(self) -> torch.Tensor:
        """TSE, by the bank as it is now: that of a checkpoint, once one is loaded. Background words stay plain. -> (W, E)"""
        return torch.cat([enrich(self.text_fg, self.model.bank), self.text_bg])

    def cams(self, seen, prediction, pairs, step=None):
        """LVC in training only; a second look at the images is one product of matrices."""
        learned = self.cfg.lvc and step is not None and self.dynamic(prediction, step)
        bias = learned_bias(prediction.fused, together=True) if learned else None
        maps = patch_word_maps(patch_features(self.clip, seen, bias), self.words())
        image_of, class_of = pairs.to(maps.device).unbind(1)
        return maps[image_of, 1:, class_of].unflatten(1, seen.grid), seen.maps

    def learned(self, prediction, step=None):
        return sharpened_cosines(prediction.fused, together=step is not None).sigmoid()

    def sources(self, cams, prediction, pairs, step=None):
        fraction = self.cfg.box_fraction_free if prediction is None else self.cfg.box_fraction_scoring
        fraction = fraction if step is None else self.cfg.box_fraction
        return cams if fraction is None else cams * cam.box_masks(cams, fraction)

    def affinity_loss(self, prediction, labels, step):
        """Late, the label is the decoder's own prediction."""
        if self.cfg.own_affinity_from is not None and step >= self.cfg.own_affinity_from:
            labels = cam.enlarge(prediction.logits.detach(), labels.shape[-2:]).argmax(dim=1)
        return super().affinity_loss(prediction, labels, step)

    def network_image(self, image, scale=1):
        """(3, H, W) at its own size -> a square, (1, 3, S, S): cfg.long_side times `scale`, to whole patches."""
        patch = backbone.patch_size(self.clip)
        side = patch * max(1, round(int(self.cfg.long_side * scale) / patch))
        return F.interpolate(image[None], size=(side, side), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def logits(self, image, scales=None, flip=True, amp=None):
        """(C, H', W') at the picture's size, times cfg.logits_scale; a photograph at a long side of LARGEST, at most."""
        factor = min(self.cfg.logits_scale, LARGEST / max(image.shape[-2:]))
        size, sums = [max(1, int(factor * length)) for length in image.shape[-2:]], 0
        for scale in scales or self.cfg.scales:
            x, mirror = self.network_image(image, scale), flip and (scale != 1 or self.cfg.mirror_at_1)
            found = self.model(self.look(torch.cat([x, x.flip(-1)]) if mirror else x, for_labels=False, amp=amp)).logits
            sums = sums + cam.enlarge((found[:1] + found[1:].flip(-1)) / 2 if mirror else found, size)[0]
        return sums / len(scales or self.cfg.scales)


METHOD = ExCEL


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: maps without any training
# ----------------------------------------------------------------------------------------------------------------------


def untrained(info, options: dict, device: torch.device) -> ExCEL:
    """The method before its first step. (By this file's name 04_decoder.new_method would find a second copy of the class.)"""
    row = ExCEL.rows.get("shapes" if options.get("clip") == "shapes" else info.name, ExCEL.rows["voc"])
    frozen = ExCEL.load(replace(row, **options), device)
    method = ExCEL(replace(ExCEL.suited(row, frozen), **options), info, frozen)
    method.model.eval()
    print(f"{info.name}: {method.model.bank.shape[1] or 'no'} clusters of descriptions"
          + ("" if method.model.bank.shape[1] else ": plain words"))
    return method


def by_clip_es(method: ExCEL, image: np.ndarray, labels: tuple[int, ...], fraction: float) -> decoder.Ladder:
    """The same words by Grad-CAM, with PAR in place of the CRF, as CLIP-ES sees the picture (H, W, 3)."""
    size, pairs = image.shape[:2], torch.tensor([(0, label) for label in labels])
    whole = clip_es.network_image(image, backbone.patch_size(method.clip))
    images = data.normalize(whole, clip_es.CLIP_MEAN, clip_es.CLIP_STD)[None].to(method.device)
    cams, _, flow = clip_es.refined_cams(method.clip, images, method.text_fg, method.text_bg, pairs, fraction)
    maps = {"CAM": cam.enlarge(cams, size), "refined": cam.enlarge(cam.min_max(flow), size)}
    scores = {rung: cam.stack_scores(x, pairs, 1) for rung, x in maps.items()}
    before, ids = scores["refined"]
    scores["pseudo label"] = cam.par(data.normalize(image)[None].to(method.device), before), ids
    return decoder.Ladder({rung: cam.best_label(*pair)[0] for rung, pair in scores.items()}, maps)


def beside_clip_es(args: argparse.Namespace, options: dict) -> int:
    """A picture of two rows for each picture: ExCEL's map, refined, pseudo label; CLIP-ES's. -> how many cannot be read."""
    (info, samples), device = backbone.demo_pictures(args), backbone.choose_device(args.device)
    method = untrained(info, options | {"clip": args.clip}, device)
    blank = torch.zeros(3, SIDE, SIDE, device=device)
    method.ladder(blank, torch.ones(len(info.classes)), trained=False)  # the first look is slow, which would be unfair
    fraction = clip_es.BOX_FRACTION.get(info.name, 0.4)

    def show(sample, targets: list[Path]) -> None:
        image, truth = backbone.demo_image(sample, info.num_classes, SIDE)
        item, pictures, ids = data.as_item(sample, image, None, info.num_classes), {}, sorted(sample.labels)
        for name, look in (("ExCEL", lambda: method.ladder(item["image"].to(device), item["labels"], trained=False)),
                           ("CLIP-ES", lambda: by_clip_es(method, image, tuple(ids), fraction))):
            start = time.perf_counter()
            found = look()
            name = f"{name}, {time.perf_counter() - start:.2f} s"
            scores = [f"{rung}{cam.score(label, truth, info.num_classes)}" for rung, label in found.labels.items()]
            tqdm.write(f"{sample.image}, {name}: {'; '.join(scores)}")
            pictures[name] = image
            pictures |= {f"{name}: {rung}": cam.paint(image, maps, ids, info.classes) for rung, maps in found.maps.items()}
            label = found.labels["pseudo label"].cpu().numpy()
            pictures[f"{name}: label"] = data.overlay(image, label, info.classes)
        data.save_picture(targets[0], data.contact_sheet(list(pictures.values()), list(pictures), columns=4))
        tqdm.write(str(targets[0]))

    return backbone.attempt(show, samples, backbone.result_files(samples, args.output_dir, ("_excel.png",)))


def score_split(args: argparse.Namespace, options: dict) -> int:
    """What are the maps of a split worth, before any training? -> how many pictures cannot be used."""
    [name] = args.images
    info, root = data.dataset_info(name, args.background), data.find_root(name, args.data_path)
    samples = data.list_samples(info, root, args.split)
    scored = [sample for sample in samples if sample.mask]
    if not scored:
        raise data.DataError(f"{root}: none of {len(samples)} pictures of {args.split} has a mask to be scored with")
    method, failed = untrained(info, options, backbone.choose_device(args.device)), 0
    matrices = dict.fromkeys(method.rungs, 0)
    for sample in tqdm(scored, desc="maps", disable=None):
        try:
            image, truth = data.load_pair(sample, info.num_classes, True)
        except data.DataError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        item = data.as_item(sample, image, truth, info.num_classes)
        for rung, label in method.ladder(item["image"].to(method.device), item["labels"], trained=False).labels.items():
            matrices[rung] = matrices[rung] + cam.confusion_matrix(item["mask"], label.cpu(), info.num_classes)
    if failed == len(scored):
        raise data.DataError(f"{root}: none of {failed} pictures of {args.split} could be used, see above")
    cam.print_scores({rung: cam.scores(matrix) for rung, matrix in matrices.items()}, info,
                      f"{args.split} of {info.name}, {len(scored) - failed} images, nothing trained")
    return failed


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be used."""
    p = backbone.demo_options(__doc__)
    p.usage = "%(prog)s [pictures ... --classes NAME ...] [options], or %(prog)s dataset [options]"
    p.add_argument("--split", default="train", help="of a data set, to be scored (default: %(default)s)")
    p.add_argument("--data-path", metavar="DIR", help="where the data set lies (default: data/NAME)")
    names = decoder.add_row_options(p, ExCELConfig, leave_out=tuple(field.name for field in fields(decoder.Config)))
    numbers = " --".join(names).replace("_", "-")
    p.epilog = textwrap.fill("--long-side is that of ExCEL's squares, 320 unless told (the toy: 112); --dino has no part. "
                             f"And the numbers of its stages: --{numbers}", 125, break_on_hyphens=False)
    args = p.parse_args(argv)
    options = decoder.chosen_options(args, names) | {x: getattr(args, x) for x in ("clip", "long_side") if getattr(args, x)}
    if not args.images or args.classes:
        return int(beside_clip_es(args, options) > 0)
    if len(args.images) > 1 or Path(args.images[0]).is_file():
        raise data.DataError("which words shall light up? Name what the pictures show: --classes cat sofa")
    return int(score_split(args, options) > 0)


if __name__ == "__main__":
    data.run(main)
