"""Where do the reference numbers come from, and with which weights were they made?

The authors' published code was run once, on the CPU in fp32, and its tensors were kept: the "golden" files. Their
weights are not stored, they follow from a recipe: each tensor is standard normal noise, seeded by the tensor's own
name, times a factor that keeps a random network lively. This file is the recipe and the reader of those files, and of
the small part of them that comes with the project; it imports nothing of the project.

    arrays, info = golden.load_case("p1_tiny_160")         # skips the test when the golden folder is not there
    clip.model.build_model(golden.clip_state_dict(golden.CLIP_LAYOUTS["tiny"], seed=1))
    python tests/golden.py                                 # writes figures.json and its images from the golden folder
"""
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(os.environ.get("SHARED_FOLDER", Path(__file__).resolve().parents[2] / "shared")) / "golden"

CLIP_LAYOUTS = {  # vision width, layers, patch, resolution; text width, layers; common embedding, context, vocabulary
    "tiny": dict(width=128, layers=12, patch=16, resolution=224, text_width=64, text_layers=2, embed=64),
    "ViT-B/16": dict(width=768, layers=12, patch=16, resolution=224, text_width=512, text_layers=12, embed=512),
    "ViT-L/14": dict(width=1024, layers=24, patch=14, resolution=224, text_width=768, text_layers=12, embed=768),
}
DINO_LAYOUTS = {  # width, layers; patch 14 and a 37 x 37 grid (518 pixels) in all of them
    "tiny": dict(width=96, layers=4),
    "dinov2_vits14": dict(width=384, layers=12),
    "dinov2_vitb14": dict(width=768, layers=12),
    "dinov2_vitl14": dict(width=1024, layers=24),
}


def load_case(name: str) -> tuple[dict, dict]:
    """The arrays of one golden file by name, and the json beside it: seeds, sizes, labels, and what every array is.

    Skips the calling test, with the reason, where the folder is not there: it is too large to come with the project.
    """
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there; SHARED_FOLDER=... names the folder around `golden` "
                    "(tests/figures.json holds a small part of these numbers and is always compared)")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(path.with_suffix(".json").read_text())


def picked_entries(info: dict, key: str) -> list[int]:
    """Which entries of the first axis an array `X__pick` holds; the json says so in words."""
    return json.loads(re.search(r"entries (\[[0-9, ]*\])", info["arrays"][key]["what"])[1])


def noise(group: str, name: str, shape, seed: int) -> np.ndarray:
    """Standard normal float64 numbers that depend on nothing but the tensor's group, name, shape and the seed."""
    key = zlib.crc32(f"{group}/{name}".encode()) ^ seed
    return np.random.RandomState(key).standard_normal(tuple(shape))


def check_vector(name: str, shape) -> np.ndarray:
    """A fixed direction per parameter: of a gradient or a change, its length and its dot product with this are kept."""
    return noise("check", name, shape, 0)


def is_layer_norm(name: str) -> bool:
    """Is this the weight or bias of a layer norm (CLIP: ln_*, DINOv2: norm*), not of a linear layer?"""
    return name.split(".")[-2].startswith(("ln_", "norm"))


def affine(name: str, n: np.ndarray) -> np.ndarray:
    """The part of the recipe that all three groups share: layer norms, biases, and weights scaled by their fan-in."""
    if name.endswith("bias"):
        return 0.02 * n
    if is_layer_norm(name):
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(n.shape[1:]))


def sharpen(weight: np.ndarray, factor: float) -> np.ndarray:
    """Queries and keys (the first two thirds of the rows) times `factor`: random attention is flat otherwise."""
    weight[: 2 * len(weight) // 3] *= factor
    return weight


# ---------------------------------------------------------------------------------------------------- CLIP

def clip_layout(name_or_json) -> dict:
    """A row of CLIP_LAYOUTS, by its name or from the `clip` entry of a golden json."""
    if isinstance(name_or_json, str):
        return CLIP_LAYOUTS[name_or_json]
    j = name_or_json
    return dict(width=j["vwidth"], layers=j["vlayers"], patch=j["patch"], resolution=j["res"], text_width=j["twidth"],
                text_layers=j["tlayers"], embed=j["embed_dim"])


def block_shapes(prefix: str, width: int) -> dict:
    """Shapes of one residual attention block under OpenAI's names; the decoder of WeCLIP uses the same ones."""
    return {f"{prefix}.attn.in_proj_weight": (3 * width, width), f"{prefix}.attn.in_proj_bias": (3 * width,),
            f"{prefix}.attn.out_proj.weight": (width, width), f"{prefix}.attn.out_proj.bias": (width,),
            f"{prefix}.ln_1.weight": (width,), f"{prefix}.ln_1.bias": (width,),
            f"{prefix}.mlp.c_fc.weight": (4 * width, width), f"{prefix}.mlp.c_fc.bias": (4 * width,),
            f"{prefix}.mlp.c_proj.weight": (width, 4 * width), f"{prefix}.mlp.c_proj.bias": (width,),
            f"{prefix}.ln_2.weight": (width,), f"{prefix}.ln_2.bias": (width,)}


def clip_shapes(layout: dict) -> dict:
    """Names and shapes of OpenAI's CLIP state dict, without the three plain integers that sit beside the weights."""
    width, text = layout["width"], layout["text_width"]
    patch, grid = layout["patch"], layout["resolution"] // layout["patch"]
    shapes = {"positional_embedding": (77, text), "text_projection": (text, layout["embed"]), "logit_scale": (),
              "visual.class_embedding": (width,), "visual.positional_embedding": (grid * grid + 1, width),
              "visual.proj": (width, layout["embed"]), "visual.conv1.weight": (width, 3, patch, patch),
              "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,)}
    for i in range(layout["layers"]):
        shapes |= block_shapes(f"visual.transformer.resblocks.{i}", width)
    shapes |= {"visual.ln_post.weight": (width,), "visual.ln_post.bias": (width,)}
    for i in range(layout["text_layers"]):
        shapes |= block_shapes(f"transformer.resblocks.{i}", text)
    return shapes | {"token_embedding.weight": (49408, text), "ln_final.weight": (text,), "ln_final.bias": (text,)}


def clip_tensor(name: str, n: np.ndarray) -> np.ndarray:
    if name == "logit_scale":
        return np.full((), math.log(100))
    if name in ("visual.class_embedding", "visual.positional_embedding"):
        return 0.5 * n
    if name == "positional_embedding":
        return 0.01 * n
    if name == "token_embedding.weight":
        return 0.02 * n
    if name in ("visual.proj", "text_projection"):
        return n / math.sqrt(n.shape[0])
    value = affine(name, n)
    if name.startswith("visual."):
        if name.endswith("in_proj_weight"):
            return sharpen(value, 2.5)
        if name.endswith(("out_proj.weight", "c_proj.weight")):
            return 0.5 * value
    return value


def clip_state_dict(layout: dict, seed: int) -> dict:
    """A CLIP with random weights under OpenAI's names, float32 holding fp16 values, for `clip.model.build_model`."""
    return {name: torch.from_numpy(np.asarray(clip_tensor(name, noise("clip", name, shape, seed)), np.float16)
                                   .astype(np.float32)) for name, shape in clip_shapes(layout).items()}


# -------------------------------------------------------------------------------------------------- DINOv2

def dino_shapes(width: int, layers: int, registers: int = 0) -> dict:
    """Names and shapes of Meta's DINOv2 state dict for patch 14, 518 pixels and an MLP of four times the width."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 37 * 37 + 1, width)}
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    shapes |= {"mask_token": (1, width),
               "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    for i in range(layers):
        b = f"blocks.{i}"
        shapes |= {f"{b}.norm1.weight": (width,), f"{b}.norm1.bias": (width,),
                   f"{b}.attn.qkv.weight": (3 * width, width), f"{b}.attn.qkv.bias": (3 * width,),
                   f"{b}.attn.proj.weight": (width, width), f"{b}.attn.proj.bias": (width,), f"{b}.ls1.gamma": (width,),
                   f"{b}.norm2.weight": (width,), f"{b}.norm2.bias": (width,),
                   f"{b}.mlp.fc1.weight": (4 * width, width), f"{b}.mlp.fc1.bias": (4 * width,),
                   f"{b}.mlp.fc2.weight": (width, 4 * width), f"{b}.mlp.fc2.bias": (width,), f"{b}.ls2.gamma": (width,)}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def dino_tensor(name: str, n: np.ndarray) -> np.ndarray:
    if name in ("cls_token", "register_tokens", "mask_token", "pos_embed"):
        return 0.5 * n
    if name.endswith("gamma"):
        return 0.5 + 0.1 * n
    value = affine(name, n)
    return sharpen(value, 2) if name.endswith("attn.qkv.weight") else value


def dino_state_dict(layout: dict, seed: int, registers: int = 0) -> dict:
    """A DINOv2 with random weights under Meta's names, float32."""
    shapes = dino_shapes(layout["width"], layout["layers"], registers)
    return {name: torch.from_numpy(dino_tensor(name, noise("dino", name, shape, seed)).astype(np.float32))
            for name, shape in shapes.items()}


# ------------------------------------------------------------------------------------------- trained part

def head_shapes(clip_width: int, num_classes: int, clip_layers: int, dino_width: int | None = None,
                depth: int = 3) -> dict:
    """Names and shapes of everything that is trained: one fuse head per encoder, one decoder."""
    def fuse(prefix, width, layers):
        shapes = {}
        for i in range(layers):
            p = f"{prefix}.linears_modulelist.{i}"
            shapes |= {f"{p}.proj.weight": (256, width), f"{p}.proj.bias": (256,),
                       f"{p}.proj_2.weight": (256, 256), f"{p}.proj_2.bias": (256,)}
        return shapes | {f"{prefix}.linear_fuse.weight": (256, 256 * layers, 1, 1),
                         f"{prefix}.linear_fuse.bias": (256,)}

    shapes = fuse("decoder_fts_fuse", clip_width, clip_layers)
    if dino_width:
        shapes |= fuse("dino_decoder_fts_fuse", dino_width, 1)
    for i in range(depth):
        shapes |= block_shapes(f"decoder.transformer.resblocks.{i}", 256)
    return shapes | {"decoder.linear_pred.weight": (num_classes, 256, 1, 1), "decoder.linear_pred.bias": (num_classes,)}


def head_tensor(name: str, n: np.ndarray, pred_gain: float, bias_offsets: dict) -> np.ndarray:
    value = affine(name, n)
    if name == "decoder.linear_pred.bias":
        for channel, offset in bias_offsets.items():
            value[int(channel)] += offset
    if name.endswith("bias") or is_layer_norm(name):
        return value
    if name.endswith("in_proj_weight"):
        return sharpen(value, 2)
    factors = {"proj_2": 0.2, "linear_fuse": 0.4, "out_proj": 0.5, "c_proj": 0.3, "linear_pred": pred_gain}
    return value * factors.get(name.split(".")[-2], 1)


def head_state_dict(seed: int, clip_width: int, num_classes: int, clip_layers: int, dino_width: int | None = None,
                    depth: int = 3, pred_gain: float = 1.0, pred_bias_offsets: dict | None = None) -> dict:
    """The trained part with random weights, float32, under the released names.

    clip_layers        fused CLIP blocks: 11 for WeCLIP, 1 for WeCLIP+
    dino_width         width of DINOv2, None for WeCLIP
    depth              decoder blocks
    pred_gain          scale of the classifier's weights
    pred_bias_offsets  {channel: offset}, so that several classes win somewhere
    """
    shapes, offsets = head_shapes(clip_width, num_classes, clip_layers, dino_width, depth), pred_bias_offsets or {}
    values = {name: head_tensor(name, noise("head", name, shape, seed), pred_gain, offsets)
              for name, shape in shapes.items()}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


# ------------------------------------------------------------------------------------- weights of one golden case

def case_clip(info: dict) -> dict:
    return clip_state_dict(clip_layout(info["clip"]), info["clip"]["seed"])


def case_dino(info: dict) -> dict:
    dino = info["dino"]
    return dino_state_dict(dino, dino["seed"], dino["registers"])


def case_head(info: dict, num_classes: int) -> dict:
    heads, clip, dino = info["heads"], info["clip"], info.get("dino")
    return head_state_dict(heads["seed"], clip["vwidth"], num_classes, clip_layers=1 if dino else clip["vlayers"] - 1,
                           dino_width=dino["width"] if dino else None, depth=heads["layers"],
                           pred_gain=heads["pred_gain"], pred_bias_offsets=heads["pred_bias_offsets"])


# ------------------------------------------------------------------------- the small part that comes with the project

FIGURES = Path(__file__).with_name("figures.json")
FIGURE_CASES = ("p4_tiny_coco", "p4_tinyplus_coco")  # both methods, on the same two images
FIGURE_IMAGES = [Path(__file__).with_name(f"figures_image{i}.png") for i in range(2)]
ENTRIES = 12  # of each array


def comparable(arrays: dict) -> list[str]:
    """Keys of a golden file that say something about our code: not the inputs, not the half-precision runs."""
    return [k for k in arrays if k != "images_u8" and not k.startswith("half_") and not k.endswith("__index")]


def figure_input(name: str) -> tuple[dict, np.ndarray]:
    """The json part (seeds, labels, settings) and the images (2, H, W, 3) uint8 of a case of figures.json."""
    return json.loads(FIGURES.read_text())[name]["info"], np.stack([np.asarray(Image.open(p)) for p in FIGURE_IMAGES])


def digest(array: np.ndarray, seed: int) -> dict:
    """Shape, norm and some entries of an array; numbers rounded to 9 digits. Labels and names have no norm."""
    places = np.sort(np.random.RandomState(seed).permutation(array.size)[:ENTRIES])
    entries = array.ravel()[places].tolist()
    if array.dtype.kind != "f":
        return {"shape": array.shape, "at": places.tolist(), "entries": entries}
    return {"shape": array.shape, "l2": float(f"{np.linalg.norm(array):.9g}"), "at": places.tolist(),
            "entries": [float(f"{x:.9g}") for x in entries]}


def write_figures() -> None:
    """Copy a few entries of every array of FIGURE_CASES, and their images, from the golden folder into tests/."""
    figures = {}
    for name in FIGURE_CASES:
        arrays, info = load_case(name)
        described = info.pop("arrays")
        info["arrays"] = {k: {"what": v["what"]} for k, v in described.items() if k.endswith("__pick")}
        kept = [k for k in comparable(arrays) if not re.match(r"boxes_|.*_names", k)]
        figures[name] = {"info": info, "arrays": {k: digest(arrays[k], seed) for seed, k in enumerate(kept)}}
        for key, value in figures[name]["arrays"].items():
            if key.endswith("__values"):  # entries of the whole array instead of entries of entries
                value["at"] = arrays[key.replace("__values", "__index")][value["at"]].tolist()
    voc, info = load_case("p1_tiny_160")  # no images needed: what CLIP makes of the prompts of VOC
    figures["voc"] = {"info": {"clip": info["clip"]}, "arrays": {k: digest(voc[k], seed) for seed, k in enumerate(
        ("text_fg", "text_bg", "tokens_fg", "tokens_bg"))}}
    for path, image in zip(FIGURE_IMAGES, arrays["images_u8"], strict=True):
        Image.fromarray(image).save(path, optimize=True)
    FIGURES.write_text(json.dumps(figures, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    write_figures()
