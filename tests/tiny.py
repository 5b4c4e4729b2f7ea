"""A world small enough for a training in a second: pictures, labels and weights of random networks, and how to run it."""
import csv
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import golden

data = import_module("01_data")
decoder = import_module("04_decoder")

CLIP = dict(width=64, layers=3, patch=16, resolution=64, text_width=64, text_layers=1, embed=32)
CLASSES = ("cat", "sofa", "tree house")


def mutated(content: bytes, seed: int) -> bytes:
    """A few bytes changed; of every five files one is cut off as well, and one has a piece twice or lacks one."""
    rng, changed = np.random.default_rng(seed), bytearray(content)
    for place in rng.integers(0, len(changed), rng.integers(1, 5)):
        changed[place] = rng.integers(256)
    start, stop = sorted(rng.integers(0, len(changed), 2))
    return bytes((changed, changed[:start], changed[:stop] + changed[start:])[rng.choice(3, p=(0.6, 0.2, 0.2))])


def make_world(root: Path) -> Path:
    """Twelve pictures (four of them for validation), masks, labels.csv, and two files of weights in official formats."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    lines = []
    for i in range(12):
        coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((70, 84)).save(root / "images" / f"{i}.png")
        mask = np.zeros((84, 70), np.uint8)
        mask[10:60, 10:40] = 1 + i % 3
        data.save_mask(root / "masks" / f"{i}.png", mask)
        lines.append(f"{i}.png,{CLASSES[i % 3]},{'val' if i >= 8 else 'train'}")
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    torch.save(golden.clip_state_dict(CLIP, seed=3), root / "clip.pt")
    torch.save(golden.dino_state_dict(golden.DINO_LAYOUTS["tiny"], seed=4), root / "dino.pth")
    return root


def small(world: Path) -> dict[str, str]:
    """Fields of a row that name what is too large for a test, or is made of more pictures than there are; what stands in."""
    return {"clip": str(world / "clip.pt"), "dino": str(world / "dino.pth"), "attention": "dino", "cache": "none"}


def arguments(world: Path, output: Path, *more) -> list[str]:
    """The command line of a tiny run; the last of two equal options counts."""
    method = more[more.index("--method") + 1] if "--method" in more else "weclip+"
    row = decoder.method_class(method).rows["voc"]
    frozen = [x for what, value in small(world).items() if hasattr(row, what) for x in (f"--{what}", value)]
    return [*map(str, (world, *frozen, "--output-dir", output)),
            "--crop-size", "64", "--long-side", "64", "-b", "2", "-j", "0", "--device", "cpu", "--print-freq", "1",
            "--lr", "0.002", *map(str, more)]


def read(output: Path, name: str = "last.pt") -> dict:
    """A checkpoint."""
    return torch.load(output / name, weights_only=True)


def logged(output: Path) -> list[dict]:
    """The rows of log.csv, without the speed."""
    with open(output / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]
