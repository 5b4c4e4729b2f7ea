"""02 - The frozen backbones: what do CLIP and DINO know about an image and a word?

In     normalised images from 01_data, prompts, weight files in OpenAI's and Meta's own formats
Out    `text_features`; `look` (tokens and attention maps of CLIP's blocks), `dino_features`
Paper  WeCLIP (CVPR 2024), frozen CLIP encoder; WeCLIP+ (TPAMI 2025), frozen DINO encoder. Nothing in this file is ever
       trained by the method: it is read once, and every later file asks it for tokens.

    python 02_backbone.py --index 3                 # the toy pair of `shapes` looks at a picture of its world
    python 02_backbone.py cat.jpg --patch 7 9       # the pair of the papers (downloaded, hash checked) looks at yours

Letters: B images, T = 1 + N tokens (CLS first), N = h * w patches, D width, L blocks, E joint embedding width, d width of a
head or of DINO.
"""
import argparse
import hashlib
import itertools
import pickle
import sys
import time
import urllib.error
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # clip still asks it for torch's version
import clip  # noqa: E402
import clip.model  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our folder, wherever we are started from
data = import_module("01_data")  # `import 01_data` is not Python: the name starts with a digit

SHAPES_DIR = Path(__file__).resolve().parent / "shapes"  # the toy pair, shipped

# Meta's files: https://dl.fbaipublicfiles.com/dinov2/<model>/<model>[_reg4]_pretrain.pth and their SHA-256
DINO_SHA256 = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "dinov2_vits14_reg": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "dinov2_vitb14_reg": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "dinov2_vitl14_reg": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
}


def read_plain(path: Path):
    """What torch.save has written, of tensors and plain values: nothing in the file is executed. Raises ValueError for more."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to load it all the same
        raise ValueError("it holds more than tensors and plain values, which is not read since it could run code") from None


def expect_names(state: dict, *names: str) -> None:
    """Raises ValueError, which says what was found, if a state dict has not these names."""
    if not isinstance(state, dict) or not set(names) <= state.keys():
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"found {found}, ...; wanted a state dict with {', '.join(names)}, ... (a training's checkpoint has it "
                         "inside; Hugging Face's has other names: take the original file)")


# ----------------------------------------------------------------------------------------------------------------------
# CLIP: OpenAI's own modules and files; we only walk through its blocks ourselves, to keep what happens between them
# ----------------------------------------------------------------------------------------------------------------------


def load_clip(name_or_path: str, device: str | torch.device = "cpu") -> nn.Module:
    """Which CLIP? One of OpenAI's names, OpenAI's TorchScript file, a plain state dict, or `shapes` (the toy).

    name_or_path  "ViT-B/16" (downloaded to ~/.cache/clip, SHA-256 checked by the clip package), or a file
    ->            clip.model.CLIP in eval mode, no parameter trainable; in float32, but rounded to float16 once, as OpenAI's
                  package does with any weights (those of its own files are float16)
    Raises        data.DataError for a missing or foreign file, or a tower that is no vision transformer
    """
    if name_or_path in clip.available_models():
        try:
            model, _ = clip.load(name_or_path, device="cpu", jit=False)
        except (urllib.error.URLError, RuntimeError, OSError) as error:
            url = clip.clip._MODELS[name_or_path]
            raise data.DataError(f"CLIP {name_or_path} could not be downloaded ({error}); fetch {url} elsewhere, "
                                  f"put it into ~/.cache/clip or give it as --clip FILE") from error
    else:
        model = _clip_from_file(SHAPES_DIR / "clip.pt" if name_or_path == "shapes" else Path(name_or_path))
    if not isinstance(model.visual, clip.model.VisionTransformer):
        raise data.DataError(f"{name_or_path}: a ResNet CLIP; WeCLIP needs a vision transformer such as ViT-B/16")
    return model.float().eval().requires_grad_(False).to(device)


def _clip_from_file(path: Path) -> nn.Module:
    if not path.is_file():
        raise data.DataError(f"{path}: no such CLIP file; give --clip a file or one of {clip.available_models()}")
    try:
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            if hashlib.sha256(path.read_bytes()).hexdigest() not in openai_sha256():  # such an archive can run code of its own
                raise ValueError("a TorchScript archive that is not OpenAI's by its SHA-256. If you trust it, make a state dict "
                                 "of it: torch.save(torch.jit.load(FILE).state_dict(), NEW)")
            return clip.model.build_model(torch.jit.load(path, map_location="cpu").state_dict())
        state = read_plain(path)
        if isinstance(state, dict) and "token_embedding.words" in state:  # the toy file keeps only the rows that its world has words for
            words, rows = state.pop("token_embedding.words"), state.pop("token_embedding.rows")
            state["token_embedding.weight"] = rows.new_zeros(49_408, rows.shape[1]).index_copy(0, words, rows)
        expect_names(state, "visual.conv1.weight", "transformer.resblocks.0.ln_1.weight", "token_embedding.weight")
        if path.resolve().parent != SHAPES_DIR:
            data.remark(f"{path}: not one of OpenAI's files by its hash; taken to be built like them (QuickGELU, heads of 64)")
        return clip.model.build_model(state)
    except Exception as error:  # whatever a foreign file makes torch or clip raise: say which file it was
        raise data.DataError(f"{path}: not a CLIP of OpenAI's (TorchScript archive or state dict): {error}") from error


def openai_sha256() -> set[str]:
    """Of all files that OpenAI publishes: they stand in the addresses that the clip package has."""
    return {url.split("/")[-2] for url in clip.clip._MODELS.values()}


@torch.no_grad()
def text_features(model: nn.Module, names: tuple[str, ...], template: str = data.TEMPLATE) -> torch.Tensor:
    """What does CLIP think of when it reads these names? One unit vector per name (CLIP-ES, "a clean origami {}.").

    names  n prompts as they stand in DatasetInfo.prompts or .background
    ->     (n, E) float32, L2 norm 1
    """
    try:
        tokens, alone = (clip.tokenize([form.format(name) for name in names]) for form in (template, "{}"))
    except RuntimeError as error:  # the text tower reads 77 tokens
        raise data.DataError(f"a class name or a description is too long for CLIP, make it shorter: {error}") from error
    weight = model.token_embedding.weight
    unread = (weight == 0).all(dim=1).cpu()  # the toy has read few words
    if wrong := [name for name, row in zip(names, alone) if unread[row[1:row.argmax()]].all()]:
        data.remark(f"words that this CLIP has never read, what it shows for them means nothing: {', '.join(wrong[:10])}")
    return F.normalize(model.encode_text(tokens.to(weight.device)), dim=-1)


def patch_size(model: nn.Module) -> int:
    """The side of CLIP's patches, pixels."""
    return model.visual.conv1.kernel_size[0]


def at_long_side(image: torch.Tensor, long_side: int, shortest: int) -> torch.Tensor:
    """(3, H, W) -> (1, 3, H', W') with that long side, the other truncated to int, no side below `shortest`; bilinear."""
    size = [max(int(length * long_side / max(image.shape[-2:])), shortest) for length in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)


class Seen(NamedTuple):
    """What CLIP saw in a batch of images."""

    tokens: list[torch.Tensor]  # of all blocks but the last, L-1 of (B, 1+N, D)
    maps: torch.Tensor          # (B, M, 1+N, 1+N), attention of the last M of these blocks, mean over heads, oldest first
    grid: tuple[int, int]       # (h, w) patches


@torch.no_grad()
def look(model: nn.Module, images: torch.Tensor, num_maps: int = 0, amp: torch.dtype | None = None, positions=None) -> Seen:
    """What does the frozen CLIP see in an image, block by block? The last block is left to 03_cam.grad_cam.

    images     (B, 3, H, W) normalised with ImageNet statistics; a remainder of H or W over the patch size is cut off
    num_maps   of how many of the blocks, counted from the last of these, the attention map is wanted
    amp        torch.bfloat16 or torch.float16 inside; what comes out is float32 all the same
    positions  how the trained grid of positions becomes that of the image; None: clip_position_embedding
    """
    visual = model.visual
    with in_precision(amp, images.device):
        x, grid = first_tokens(visual, images, positions)
        blocks, tokens, maps = visual.transformer.resblocks[:-1], [], []
        for i, block in enumerate(blocks):
            attended, attn = attend(block.attn, block.ln_1(x), with_map=i >= len(blocks) - num_maps)
            x = x + attended
            x = x + block.mlp(block.ln_2(x))
            tokens.append(x.float())
            if attn is not None:
                maps.append(attn.float())
    no_maps = tokens[0].new_zeros(len(x), 0, x.shape[1], x.shape[1])
    return Seen(tokens, torch.stack(maps, dim=1) if maps else no_maps, grid)


def first_tokens(visual: nn.Module, images: torch.Tensor, positions=None) -> tuple[torch.Tensor, tuple[int, int]]:
    """What enters CLIP's first block? (B, 3, H, W) -> (B, 1+N, D), the grid (h, w); `positions` as in `look`."""
    patches = visual.conv1(images)  # (B, D, h, w)
    grid = tuple(patches.shape[-2:])
    cls = visual.class_embedding.expand(len(images), 1, -1)
    position = (positions or clip_position_embedding)(visual.positional_embedding, grid)
    return visual.ln_pre(torch.cat([cls, patches.flatten(2).mT], dim=1) + position), grid


def attend(mha: nn.MultiheadAttention, x: torch.Tensor, with_map: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Self-attention of one block; the attention map is formed only when somebody reads it.

    x  (B, T, D)  ->  (B, T, D) and the mean over heads of softmax(q k^T / sqrt(d)), (B, T, T) [query, key], or None
    """
    return answer(mha, *queries_keys_values(mha, x), with_map)


def answer(mha: nn.MultiheadAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           with_map: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` for those who have the queries, keys and values (B, heads, T, d) already."""
    if with_map:
        weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)
        out, mean_map = weights @ v, weights.mean(dim=1)
    else:
        out, mean_map = F.scaled_dot_product_attention(q, k, v), None
    return mha.out_proj(out.transpose(1, 2).flatten(2)), mean_map


def queries_keys_values(mha: nn.MultiheadAttention, x: torch.Tensor) -> list[torch.Tensor]:
    """What each token asks, offers and says, per head: (B, T, D) -> three of (B, heads, T, d), D = heads * d."""
    return [part.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2)
            for part in F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=-1)]


def clip_position_embedding(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """CLIP was trained on a square grid; where are the patches of another one? (1+G*G, D) -> (1+h*w, D), bilinear."""
    return resized_embedding(embedding, size=tuple(grid), mode="bilinear", align_corners=False)


def stretched_position_embedding(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The same, bicubic, by factors of (h + 0.1) / G, a guard against rounding that shifts every sample a little: as Meta's
    plain DINOv2 has it, and label-free methods on CLIP."""
    side = round((len(embedding) - 1) ** 0.5)
    return resized_embedding(embedding, scale_factor=[(length + 0.1) / side for length in grid], mode="bicubic")


def resized_embedding(embedding: torch.Tensor, **how) -> torch.Tensor:
    """Positions of a square grid (1+G*G, D), CLS first, interpolated like an image: (1+h*w, D)."""
    side = round((len(embedding) - 1) ** 0.5)
    square = embedding[1:].mT.unflatten(1, (side, side))[None]  # (1, D, G, G)
    return torch.cat([embedding[:1], F.interpolate(square, **how)[0].flatten(1).mT])


# ----------------------------------------------------------------------------------------------------------------------
# DINOv2: a plain vision transformer that reads Meta's files under their own keys
# ----------------------------------------------------------------------------------------------------------------------


class DinoAttention(nn.Module):
    """Multi-head self-attention with DINOv2's parameter names (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DinoBlock(nn.Module):
    """One pre-norm transformer block (B, T, D) -> (B, T, D). LayerScale: each residual branch times a learned vector."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = DinoAttention(width, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DINOv2(nn.Module):
    """DINOv2 (Oquab et al. 2023) and its version with registers (Darcet et al. 2023), as Meta's state dicts lay it out.

    width, depth, heads   384/12/6 (ViT-S), 768/12/12 (B), 1024/24/16 (L)
    patch, grid           14 and 37 (518 pixels) in all of Meta's files
    registers             0, or 4 in the "_reg" files
    """

    def __init__(self, width: int, depth: int, heads: int, patch: int = 14, grid: int = 37, registers: int = 0):
        super().__init__()
        self.patch, self.grid, self.registers = patch, grid, registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # only DINOv2's own training uses it
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.Sequential(*(DinoBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def position_embedding(self, h: int, w: int) -> torch.Tensor:
        """The trained G x G grid of positions on an h x w one, bicubic: (1, 1+h*w, D).

        The plain models stretch by (size + 0.1) / G; the register models resize to the size itself, with antialiasing. Both
        as in Meta's hub entries.
        """
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        if not self.registers:
            return stretched_position_embedding(self.pos_embed[0], (h, w))[None]
        return resized_embedding(self.pos_embed[0], size=(h, w), mode="bicubic", antialias=True)[None]

    def tokens(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patch embeddings (B, N, D) of an (h, w) grid -> all tokens after the final norm, (B, 1+registers+N, D)."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embedding(*grid)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return self.norm(self.blocks(x))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) with H and W multiples of the patch size -> patch tokens as a map, (B, D, h, w)."""
        patches = self.patch_embed["proj"](images)  # (B, D, h, w)
        x = self.tokens(patches.flatten(2).mT, patches.shape[-2:])
        return x[:, 1 + self.registers:].mT.unflatten(2, patches.shape[-2:])


def load_dino(name_or_path: str, device: str | torch.device = "cpu") -> DINOv2:
    """Which DINO? One of Meta's names (see DINO_SHA256), Meta's .pth file, or `shapes` (the toy).

    ->      DINOv2 in float32, in eval mode, no parameter trainable
    Raises  data.DataError for a missing file, a wrong hash, or a state dict with other keys
    """
    if name_or_path in DINO_SHA256:
        path = _download_dino(name_or_path)
    else:
        path = SHAPES_DIR / "dino.pth" if name_or_path == "shapes" else Path(name_or_path)
    if not path.is_file():
        raise data.DataError(f"{path}: no such DINOv2 file; give --dino a file or one of {list(DINO_SHA256)}")
    try:
        model = dino_from_state_dict(read_plain(path))
        known = name_or_path in DINO_SHA256 or path.resolve().parent == SHAPES_DIR
        if not known and hashlib.sha256(path.read_bytes()).hexdigest() not in DINO_SHA256.values():
            data.remark(f"{path}: not one of Meta's files by its hash; taken to be built like them (heads of 64)")
    except Exception as error:  # whatever a foreign file makes torch raise: say which file it was
        raise data.DataError(f"{path}: not a DINOv2 state dict under Meta's keys: {error}") from error
    return model.float().eval().requires_grad_(False).to(device)


def dino_from_state_dict(state: dict, heads: int | None = None) -> DINOv2:
    """The model that fits a state dict; its sizes are read off the tensors. Heads are width / 64 unless told."""
    expect_names(state, "cls_token", "pos_embed", "patch_embed.proj.weight")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    model = DINOv2(width, depth, heads or width // 64, patch, grid, registers)
    model.load_state_dict(state)
    return model


def _download_dino(name: str) -> Path:
    folder = name.removesuffix("_reg")
    file = f"{folder}_{'reg4_' if name.endswith('_reg') else ''}pretrain.pth"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    url = f"https://dl.fbaipublicfiles.com/dinov2/{folder}/{file}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=DINO_SHA256[name])
        except (urllib.error.URLError, RuntimeError, OSError) as error:
            raise data.DataError(f"{name} could not be downloaded ({error}); fetch {url} elsewhere, put it at {path} "
                                  "or give it as --dino FILE") from error
    elif hashlib.sha256(path.read_bytes()).hexdigest() != DINO_SHA256[name]:
        raise data.DataError(f"{path}: not the file Meta published (SHA-256 differs); delete it and start again")
    return path


@torch.no_grad()
def dino_features(model: DINOv2, images: torch.Tensor, amp: torch.dtype | None = None) -> torch.Tensor:
    """What does the frozen DINO see? Its final-norm patch tokens on its own grid (WeCLIP+; released code).

    images  (B, 3, H, W), normalised as for CLIP; resized bilinearly to the next multiples of the patch size below
            (320 -> 308), at least one patch
    amp     as in `look`
    ->      (B, d, h', w') float32 with h' = H // patch, w' = W // patch
    """
    size = [max(length // model.patch, 1) * model.patch for length in images.shape[-2:]]
    with in_precision(amp, images.device):
        return model(F.interpolate(images, size=size, mode="bilinear", align_corners=False)).float()


def fingerprint(model: nn.Module) -> str:
    """Which frozen weights were these? 16 hex digits over the names and first values of every tensor.

    A checkpoint holds the trained part only; this is how 06_infer knows that it was given the same backbone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Devices and precision
# ----------------------------------------------------------------------------------------------------------------------


def choose_device(wanted: str | None = None) -> torch.device:
    """The device asked for, else the GPU if there is one. Raises data.DataError where it cannot be used."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # of `meta` there is none
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of these
        reason = str(error).splitlines()[0]
        raise data.DataError(f"--device {wanted}: {reason}; wanted cpu, or cuda or mps where there is one") from error


def half_precision(device: torch.device) -> torch.dtype:
    """What --amp means on a device: float16 on CUDA, bfloat16 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def in_precision(amp: torch.dtype | None, device: torch.device) -> torch.autocast:
    """The context in which a frozen encoder runs; None: float32."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: the towers, and a picture of what they see
# ----------------------------------------------------------------------------------------------------------------------


def samples_of(paths: list[str]) -> list[data.Sample]:
    """The files among `paths`, and the pictures in the folders among them. Raises data.DataError if there are none."""
    files = []
    for path in map(Path, paths):
        there = sorted(file for file in path.iterdir() if file.name[0] != ".") if path.is_dir() else []
        files += [file for file in there if data.is_picture(file)] if path.is_dir() else [path]
        if rest := data.left_out(file for file in there if not data.is_picture(file) and file.name != "predictions"):
            print(f"left out of {path}: {rest}", file=sys.stderr)
    if not files:
        raise data.DataError(f"{', '.join(paths)}: no pictures in there; wanted files ending in "
                        + ", ".join(sorted(data.picture_formats())))
    return [data.Sample(file.stem, str(file), None, (), "none", as_displayed=True) for file in files]


def attempt(work, samples: list, *more) -> int:
    """work(sample, its of `more`, ...) for each. A data.DataError is told at once and costs its sample only. -> how many"""
    failed = 0
    for arguments in tqdm(zip(samples, *more), total=len(samples), disable=None):
        try:
            work(*arguments)
        except data.DataError as error:
            complain(error)
            failed += 1
    return failed


def complain(error: Exception | str) -> None:
    tqdm.write(f"error: {error}", file=sys.stderr)


def result_files(samples: list[data.Sample], output_dir: str | None, endings: tuple[str, ...]) -> list[list[Path]]:
    """What is made of each picture: in `output_dir`, else in predictions/ beside it, its name with each of the `endings`.

    No result replaces a picture or another result: where cat.png is taken, cat_2.png is not.
    """
    files, results = [Path(sample.image) for sample in samples], []
    taken = {file.absolute() for file in files}
    for file in files:
        folder = Path(output_dir) if output_dir else file.parent / "predictions"
        stems = itertools.chain([file.stem], (f"{file.stem}_{number}" for number in itertools.count(2)))
        names = ([folder / f"{stem}{ending}" for ending in endings] for stem in stems)
        results.append(next(paths for paths in names if not taken & {path.absolute() for path in paths}))
        taken |= {path.absolute() for path in results[-1]}
    return results


def demo_options(text: str) -> data.CommandLine:
    """The options that the demos of 02, 03 and 04 share."""
    p = data.CommandLine(text, "[images ...]")
    p.add_argument("images", nargs="*", help="pictures or folders of pictures (default: one of `shapes`, seen by the toy pair)")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="what they show (default: what the one of `shapes` shows)")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words (default: VOC's; with the toy, its own)")
    p.add_argument("--index", type=data.natural, metavar="N", default=0, help="which of the validation pictures of `shapes`")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: ViT-B/16 for your pictures, the toy for `shapes`")
    p.add_argument("--dino", metavar="NAME|FILE", help="default: dinov2_vits14 for your pictures, the toy for `shapes`")
    p.add_argument("--long-side", type=partial(data.count, most=8192), metavar="N",
                   help="pixels the network sees (default: 512; with the toy 112)")
    p.add_argument("--output-dir", "--out", metavar="DIR", help="where pictures go (default: predictions/ beside yours)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    return p


def demo_pictures(args: argparse.Namespace, ask: bool = True) -> tuple[data.DatasetInfo, list[data.Sample]]:
    """What do the demos look at, and which words do they ask for? Fills in what was not given of clip, dino, long_side.

    ask  is there anything to see only for words?
    ->   the classes and background words, and the pictures; those of one's own show all of --classes
    """
    if ask and args.images and not args.classes:
        raise data.DataError("which words shall light up? Name what the pictures show: --classes cat sofa")
    if paths := [word for word in args.classes or () if "/" in word or Path(word).suffix.lower() in data.picture_formats()]:
        raise data.DataError(f"--classes {paths[0]}: a path among the words; name pictures first: cat.jpg --classes cat sofa")
    args.clip = args.clip or ("ViT-B/16" if args.images else "shapes")
    args.dino = args.dino or ("dinov2_vits14" if args.images else "shapes")
    info = data.DATASETS["shapes" if args.clip == "shapes" else "voc"]
    args.long_side = args.long_side or (112 if info.name == "shapes" else 512)
    if args.images:
        samples = samples_of(args.images)
    else:
        samples = data.list_samples(data.DATASETS["shapes"], None, "val")
        if args.index >= len(samples):
            raise data.DataError(f"--index {args.index}: the validation split has pictures 0 to {len(samples) - 1}")
        samples = [samples[args.index]]
        args.output_dir = args.output_dir or "predictions"  # not into the data set
    if args.classes:
        info = data.with_prompts("words", args.classes, args.background or [w for w in info.background if w not in args.classes])
        samples = [replace(sample, mask=None, labels=tuple(range(len(info.classes)))) for sample in samples]
    return info, samples


def demo_image(sample: data.Sample, num_classes: int, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W, 3) and the true mask (H, W), if there is one; else no side is longer than `side` pixels."""
    image, truth = data.load_pair(sample, num_classes, sample.mask is not None)
    return data.rescale(image, min(1, side / max(image.shape[:2]))) if truth is None else image, truth


def glow(image: np.ndarray, heat: torch.Tensor) -> np.ndarray:
    """Where is it hot? (H, W, 3) uint8 and (h, w) >= 0 -> (H, W, 3) uint8: the picture dark, the largest value yellow."""
    strength = F.interpolate((heat / heat.max().clamp(min=1e-12))[None, None], size=image.shape[:2], mode="nearest")[0, 0]
    strength = strength.cpu().numpy()[..., None]
    return (image * .35 * (1 - strength) + np.array([255, 220, 60]) * strength).astype(np.uint8)


def principal_colours(features: torch.Tensor) -> np.ndarray:
    """What looks alike to a tower has one colour: (D, h, w) -> (h, w, 3) uint8, the three main axes as red, green, blue."""
    flat = features.flatten(1).mT
    centred = flat - flat.mean(dim=0)
    axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -3:].flip(1)  # (D, 3): the largest first
    places = centred @ axes  # (N, 3)
    low, high = places.quantile(.02, dim=0), places.quantile(.98, dim=0)
    colours = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (255 * colours).byte().view(*features.shape[1:], -1).cpu().numpy()


def draw_look(image: np.ndarray, seen: Seen, dino_map: torch.Tensor, patch: tuple[int, int]) -> Image.Image:
    """One picture, the attention of one of its patches in each block but the last, and PCAs of the last features."""
    row, column = patch
    here = torch.zeros(seen.grid)
    here[row, column] = 1
    attention = seen.maps[0, :, 1 + row * seen.grid[1] + column, 1:].unflatten(1, seen.grid)
    towers = {"CLIP": seen.tokens[-1][0, 1:].mT.unflatten(1, seen.grid), "DINO": dino_map[0]}
    side = (image.shape[1], image.shape[0])
    maps = [np.asarray(Image.fromarray(principal_colours(x)).resize(side, Image.Resampling.NEAREST)) for x in towers.values()]
    pictures = [image, glow(image, here), *maps, *(glow(image, x) for x in attention)]
    captions = ["image", f"patch {row} {column} looks at:", *(f"PCA of {name}" for name in towers),
                *(f"attention, block {number}" for number in range(1, 1 + len(attention)))]
    return data.contact_sheet(pictures, captions, columns=4)


def describe_size(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:.1f} M parameters, {4 * count / 2**20:.0f} MB, fingerprint {fingerprint(model)}"


def main(argv: list[str] | None = None) -> int:
    p = demo_options(__doc__)
    p.add_argument("--patch", type=int, nargs=2, metavar=("ROW", "COL"), help="whose attention is drawn (default: the middle)")
    args = p.parse_args(argv)
    (info, samples), device = demo_pictures(args, ask=False), choose_device(args.device)
    clip_model, dino = load_clip(args.clip, device), load_dino(args.dino, device)
    blocks, side = clip_model.visual.transformer.resblocks, patch_size(clip_model)
    print(f"CLIP {args.clip}: {len(blocks)} blocks, {blocks[0].attn.num_heads} heads, patch {side}; {describe_size(clip_model)}\n"
          f"  text: {len(info.classes)} classes {tuple(text_features(clip_model, info.prompts).shape)}, "
          f"{len(info.background)} background words\n"
          f"DINOv2 {args.dino}: {len(dino.blocks)} blocks, patch {dino.patch}, {dino.registers} registers; {describe_size(dino)}")

    def show(sample: data.Sample, targets: list[Path]) -> None:
        image = data.load_image(sample.image, as_displayed=True)
        images, start = at_long_side(data.normalize(image), args.long_side, side).to(device), time.perf_counter()
        seen, dino_map = look(clip_model, images, len(blocks) - 1), dino_features(dino, images)
        seconds = time.perf_counter() - start
        patch = tuple(args.patch or (length // 2 for length in seen.grid))
        if not all(0 <= place < length for place, length in zip(patch, seen.grid)):
            raise data.DataError(f"--patch {patch[0]} {patch[1]} is outside; the picture has {seen.grid[0]} x {seen.grid[1]} "
                                 "patches")
        print(f"{sample.image}, {tuple(images.shape)}: {len(seen.tokens)} x tokens {tuple(seen.tokens[0].shape)}, maps "
              f"{tuple(seen.maps.shape)}, DINO's map {tuple(dino_map.shape)}; {seconds:.3f} s on {device}")
        data.save_picture(targets[0], draw_look(image, seen, dino_map, patch))
        print(targets[0])

    return int(attempt(show, samples, result_files(samples, args.output_dir, ("_look.png",))) > 0)


if __name__ == "__main__":
    data.run(main)
