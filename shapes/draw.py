"""The toy world `shapes`: origami figures on textured grounds, drawn from a seed.

In     a seed and a number
Out    `scene`, a picture with its mask; `make_shapes`, the data set; FIGURES and GROUNDS, whose keys are the classes and the
       background words. train.py draws from the same parts what the toy encoders learn from

Nothing of the project is imported here: 01_data imports this file.
"""
import colorsys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm


def _arc(x: float, y: float, rx: float, ry: float, corners: int = 20, start: float = 0, stop: float = 360) -> list:
    """The corners of an ellipse, or of its piece from `start` to `stop` degrees (clockwise, 0 = right)."""
    turns = np.deg2rad(np.linspace(start, stop, corners, endpoint=stop - start < 360))
    return list(zip(x + rx * np.cos(turns), y + ry * np.sin(turns)))


def _mirror(points: list) -> list:
    return [(-x, y) for x, y in points]


_WING = [(0, -.1), (-.3, -.8), (-.95, -.9), (-1, -.2), (-.5, .1)]
_UNDERWING = [(0, 0), (-.6, .12), (-.85, .6), (-.4, .9)]

# Facets of each figure in the order of painting: (brightness of the paper, corners in [-1, 1], y downwards). All of them bear
# the print of the class: there is no part of a figure that does not tell it.
FIGURES = {
    "boat": [(.70, [(-1, .3), (1, .3), (.55, .9), (-.55, .9)]), (.60, [(-.3, -1), (-.18, -1), (-.18, .35), (-.3, .35)]),
             (.85, [(-.18, -1), (-.18, .3), (.95, .3)]), (1.0, [(-.3, -.75), (-.3, .3), (-.85, .3)])],
    "butterfly": [(1.0, _WING), (.85, _mirror(_WING)), (.75, _UNDERWING), (.65, _mirror(_UNDERWING)),
                  (.45, [(-.08, -.6), (.08, -.6), (.08, .65), (-.08, .65)])],
    "cat": [(.75, [(.3, .95), (.8, .6), (.75, .0), (.98, .05), (1, .75), (.6, 1)]),
            (1.0, [(-.5, .95), (-.35, .0), (.0, -.2), (.0, .95)]), (.7, [(.55, .95), (.35, .0), (.0, -.2), (.0, .95)]),
            (.92, [(-.7, -1), (-.3, -.75), (.3, -.75), (.7, -1), (.65, -.2), (.3, .1), (-.3, .1), (-.65, -.2)])],
    "fish": [(1.0, [(-1, 0), (-.5, -.55), (.1, -.5), (.5, 0)]), (.85, [(-1, 0), (-.5, .55), (.1, .5), (.5, 0)]),
             (.78, [(.4, 0), (1, -.6), (.8, 0)]), (.68, [(.4, 0), (1, .6), (.8, 0)]), (.7, [(-.35, -.5), (.15, -.85), (.1, -.45)])],
    "house": [(1.0, [(-.75, -.1), (.1, -.1), (.1, .9), (-.75, .9)]), (.88, [(.1, -.1), (.75, -.1), (.75, .9), (.1, .9)]),
              (.55, [(.4, -.9), (.6, -.9), (.6, -.3), (.4, -.3)]), (.68, [(-.95, -.05), (0, -.95), (.95, -.05)])],
    "mushroom": [(.78, [(-.28, -.1), (.28, -.1), (.4, .95), (-.4, .95)]), (.65, [(.05, -.1), (.28, -.1), (.4, .95), (.15, .95)]),
                 (1.0, _arc(0, .05, .95, .95, 20, 180, 360))],
    "rabbit": [(.72, _arc(.2, .5, .65, .45)), (.9, _arc(.0, .55, .4, .4)), (.75, [(-.6, -.1), (-.98, -1), (-.55, -1), (-.3, -.15)]),
               (.7, [(-.35, -.1), (-.3, -1), (.12, -.95), (-.05, -.05)]), (1.0, _arc(-.45, .05, .42, .38)),
               (.6, _arc(.85, .35, .15, .15))],
    "turtle": [(.75, [(-.55, .2), (-.25, .2), (-.35, .7), (-.65, .7)]), (.75, [(.25, .2), (.55, .2), (.65, .7), (.35, .7)]),
               (.7, _arc(-.8, .1, .22, .2)), (.6, [(.6, .2), (1, .4), (.6, .4)]), (1.0, _arc(0, .4, .8, .95, 20, 180, 360))],
}


def _print(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where does the print of a class leave ink? x, y in cells of the print, turned with the figure -> bool."""
    u, v = x - np.floor(x) - .5, y - np.floor(y) - .5  # place in the cell, [-.5, .5)
    return {"boat": lambda: np.abs(v) < .25,                                                   # stripes
            "butterfly": lambda: np.abs(np.hypot(u, v) - .3) < .13,                            # rings
            "cat": lambda: np.abs((y + np.abs(u) * 1.6) % 1 - .5) < .22,                       # zigzag
            "fish": lambda: np.abs(u) < .25,                                                   # bars
            "house": lambda: (np.abs(u) > .34) | (np.abs(v) > .34),                            # lattice
            "mushroom": lambda: np.hypot(u, v) < .3,                                           # dots
            "rabbit": lambda: (np.abs(u) < .16) & (np.abs(v) < .42) | (np.abs(v) < .16) & (np.abs(u) < .42),  # crosses
            "turtle": lambda: (u < 0) == (v < 0)}[name]()                                      # chequers


GROUNDS = {  # name -> usual colour; the true one strays from it by up to a third
    "grass": (96, 130, 62), "water": (70, 120, 160), "bricks": (160, 92, 72), "planks": (150, 115, 78),
    "sand": (205, 180, 135), "pebbles": (130, 130, 128)}


def _noise(rng: np.random.Generator, size: int, rows: int, cols: int) -> np.ndarray:
    """Smooth noise (size, size) in about [-1, 1] with rows x cols bumps."""
    grid = rng.uniform(-1, 1, (rows, cols)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def draw_background(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """(size, size, 3) float32 in 0..255: one textured ground. Texture tells the kind; its colour is a hint only."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + rng.integers(0, 64, (2, 1, 1))
    step = rng.uniform(9, 16)  # pixels: course of bricks, width of a plank, length of a wave, a pebble
    bumps = max(2, round(size / step))
    grain = rng.normal(0, 1, (size, size)).astype(np.float32)
    if kind == "bricks":
        row = y // step
        inside = (y % step > 2) & ((x + row % 2 * step) % (2 * step) > 2)
        tint = np.take(rng.uniform(-.18, .18, 997), (row * 31 + (x + row % 2 * step) // (2 * step)).astype(int) % 997)
        light = np.where(inside, tint, .35) + .04 * grain
    elif kind == "planks":
        row = y // step
        tint = np.take(rng.uniform(-.15, .15, 97), row.astype(int) % 97)
        light = np.where(y % step < 1.5, -.45, tint + .13 * _noise(rng, size, size // 2, 4)) + .02 * grain
    elif kind == "water":
        swell = 4 * np.sin(x / step + rng.uniform(0, 6)) + 3 * _noise(rng, size, bumps, bumps)
        light = .22 * np.sin(6.28 / step * (y + swell))
    elif kind == "grass":
        light = .38 * _noise(rng, size, max(2, size // 6), size // 2) + .08 * _noise(rng, size, bumps, bumps)
    elif kind == "sand":
        light = .10 * grain + .08 * _noise(rng, size, bumps, 2)
    else:
        canvas = Image.new("F", (size, size), -.45)
        pen = ImageDraw.Draw(canvas)
        for cy, cx, r, tint in rng.uniform((-4, -4, .3, -.3), (size + 4, size + 4, .6, .35), (2 * bumps ** 2, 4)):
            pen.ellipse([cx - r * step, cy - .8 * r * step, cx + r * step, cy + .8 * r * step], fill=tint, outline=-.4)
        light = np.asarray(canvas) + .04 * grain
    light = light + rng.uniform(.1, .25) * _noise(rng, size, 2, 2)  # lamps and shadows
    colour = np.array(GROUNDS[kind]) * rng.uniform(.8, 1.2) + rng.uniform(-45, 45, 3)
    return (colour.clip(30, 235) * (1 + .65 * light[..., None])).clip(0, 255).astype(np.float32)


def _paper(rng: np.random.Generator) -> np.ndarray:
    """A colour of paper, (3,) in 0..255: any hue."""
    return 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(.3, .9), rng.uniform(.4, 1)))


def paint_figure(rng: np.random.Generator, image: np.ndarray, facets: list, centre: np.ndarray, radius: float,
                 name: str | None = None) -> np.ndarray:
    """Put one figure of folded paper on the image, in place, with its shadow. -> its mask, (H, W) bool.

    facets  as in FIGURES; turned by up to 20 degrees, stretched by up to 15 %, half of them mirrored
    centre  (x, y) pixels, inside the image; radius  pixels that 1 stands for; name  whose print the paper bears
    """
    reach = int(1.8 * radius) + 8  # pixels: the figure, its shadow and the blur of it fit into a window of twice that
    left, top = (int(c) - reach for c in centre)
    window = np.s_[max(0, top):top + 2 * reach, max(0, left):left + 2 * reach]
    part = image[window]
    inside = np.s_[max(0, -top):max(0, -top) + part.shape[0], max(0, -left):max(0, -left) + part.shape[1]]
    paper = _paper(rng)
    while np.abs(paper - part.mean((0, 1))).max() < 60:  # to be told from the ground by eye
        paper = _paper(rng)
    ink = .5 if paper @ (.3, .59, .11) > 110 else 2.  # darker or lighter than the paper, the same hue
    turn = np.deg2rad(rng.uniform(-20, 20))
    matrix = radius * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix * rng.uniform(.85, 1.15, 2) * (rng.choice([-1, 1]), 1)
    canvas = Image.new("RGBA", (4 * reach, 4 * reach), (*paper.astype(int), 0))  # twice the size: smooth edges
    pen = ImageDraw.Draw(canvas)
    for shade, corners in facets:
        points = [tuple(p) for p in 2 * (np.array(corners) @ matrix.T + centre - (left, top))]
        pen.polygon(points, fill=(*(paper * shade).astype(int), 255))
    layer = np.asarray(canvas.resize((2 * reach, 2 * reach), Image.Resampling.BOX), dtype=np.float32)
    light = 1 + rng.normal(0, .03, layer.shape[:2])
    if name is not None:
        pixels = np.moveaxis(np.mgrid[top:top + 2 * reach, left:left + 2 * reach], 0, -1)[..., ::-1]  # (y, x) -> (x, y)
        cells = (pixels - centre) @ np.linalg.inv(matrix / radius).T / rng.uniform(8, 11) + rng.uniform(0, 1, 2)
        light = light * np.where(_print(name, cells[..., 0], cells[..., 1]), ink, 1)
    shadow = Image.fromarray(layer[..., 3].astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    shadow = np.roll(np.asarray(shadow, dtype=np.float32), (2, 2), (0, 1))
    part *= 1 - .45 * shadow[inside][..., None] / 255
    part += layer[inside][..., 3:] / 255 * ((layer[..., :3] * light[..., None]).clip(0, 255)[inside] - part)
    mask = np.zeros(image.shape[:2], bool)
    mask[window] = layer[inside][..., 3] > 127
    return mask


def paint_scraps(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    """Clutter: `count` torn pieces of paper, three to five corners, no class."""
    for _ in range(count):
        corners = _arc(0, 0, 1, 1, int(rng.integers(3, 6)))
        paint_figure(rng, image, [(1., corners), (.8, corners[:3])], rng.uniform(0, len(image), 2), rng.uniform(2.5, 6))


def draw_scene(rng: np.random.Generator, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """One picture of the data set: -> image (size, size, 3) uint8, mask (size, size) uint8 (0 ground, 1 + class id).

    One ground or two that meet at a slanted line, scraps, and 1 to 3 figures. A figure may hide up to half
    of another one and may leave the picture by a third of its radius; the last one painted is in front.
    """
    kinds = rng.choice(list(GROUNDS), 2, replace=False)
    image = draw_background(rng, size, kinds[0])
    if rng.uniform() < .5:
        y, x = np.mgrid[:size, :size] / size - .5
        turn = rng.uniform(0, 2 * np.pi)
        below = x * np.cos(turn) + y * np.sin(turn) > rng.uniform(-.2, .2)
        image[below] = draw_background(rng, size, kinds[1])[below]
    paint_scraps(rng, image, rng.integers(2, 6))
    owner = np.zeros((size, size), int)  # which figure is seen at a pixel, 0 = none
    values, areas = [0], [0]             # of each figure: its value in the mask, its pixels when nothing hides it
    for _ in range(rng.integers(1, 4)):
        for _ in range(10):              # places to try
            class_id, radius, trial = rng.integers(len(FIGURES)), size * rng.uniform(.2, .38), image.copy()
            centre = rng.uniform(.7 * radius, size - .7 * radius, 2)
            name = list(FIGURES)[class_id]
            figure = paint_figure(rng, trial, FIGURES[name], centre, radius, name)
            covered = np.where(figure, len(areas), owner)
            seen = np.bincount(covered.ravel(), minlength=len(areas) + 1)
            if (seen[1:] >= .5 * np.array([*areas[1:], figure.sum()])).all():
                image, owner = trial, covered
                values.append(1 + class_id)
                areas.append(figure.sum())
                break
    return image.round().astype(np.uint8), np.array(values, np.uint8)[owner]


def scene(seed: int, index: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Picture `index` of the endless list `seed`: the same in every process and worker. See `draw_scene`."""
    return draw_scene(np.random.default_rng((seed, index)), size)


def make_shapes(root: Path, save_mask, seed: int = 0, n_train: int = 1000, n_val: int = 200) -> None:
    """Draw the data set to a folder: images/, masks/ (by save_mask(path, mask)) and labels.csv, like any folder of one's own.

    It is drawn beside its place and then renamed: whole or not there, also when several processes start at once.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        draft, lines = Path(folder) / root.name, ["file,classes,split"]
        (draft / "images").mkdir(parents=True)
        for number in tqdm(range(n_train + n_val), desc="drawing shapes", disable=None):
            image, mask = scene(seed, number)
            Image.fromarray(image).save(draft / "images" / f"{number:05d}.png")
            save_mask(draft / "masks" / f"{number:05d}.png", mask)
            names = ";".join(list(FIGURES)[value - 1] for value in np.unique(mask) if value)
            lines.append(f"{number:05d}.png,{names},{'train' if number < n_train else 'val'}")
        (draft / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            draft.rename(root)
        except OSError:
            if not (root / "labels.csv").exists():  # otherwise another process was first, with the same pictures
                raise
