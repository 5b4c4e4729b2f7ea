"""Trains the two frozen encoders of `shapes` from scratch on a CPU: a toy CLIP in OpenAI's layout, a toy DINO in DINOv2's.

In     seeds; pictures come from draw.py, tile by tile and scene by scene. No mask is ever seen; scenes come with image-level labels
Out    clip.pt and dino.pth beside this file: float16 state dicts under the official keys

    python shapes/train.py --out DIR       # about 40 minutes on one core

The shipped pair was made by these steps, seeds and numbers, each tower in one piece from the beginning: CLIP in about 30
minutes, DINO in 11 (`--only dino`), one thread each, beside other work.

Both learn from mosaics: a picture is laid out of tiles with at most one figure each. The towers look at the whole mosaic,
but every tile is pooled by itself, as one image with its own caption (CLIP), or as one image that has to be found again
in another mosaic (DINO). So what a patch says must be about its surroundings, and cannot be learned by heart as a scene.
Tiles and scenes are drawn with different seeds: the encoders have seen no picture of the data set.
"""
import argparse
import copy
import math
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the six files
data = import_module("01_data")
backbone = import_module("02_backbone")
draw = import_module("shapes.draw")
clip = backbone.clip

PATCH, GRID, WIDTH, DEPTH = 8, 12, 128, 5  # pixels; patches of a 96-pixel image; both towers; 2 heads of 64 each
SEEDS = {"tiles": 7, "scenes": 31, "clip": 11, "dino": 21}  # the data set has 0
ROUNDS = (600, 1200, 1200, 1200)  # steps on tiles; each round warms up anew
LAST_ROUND = 900                  # steps on tiles that name their ground too, and on scenes
DINO_STEPS = 2400
STOCK = 6000  # scenes, and tiles in each of two sizes
NAMES = (*data.SHAPES_CLASSES, *data.SHAPES_BACKGROUND)  # what a caption can name
FIGURES = len(data.SHAPES_CLASSES)  # these come first
LAYOUTS = ((96, 2, 16), (128, 2, 9), (96, 1, 16), (72, 1, 28), (144, 3, 7), (96, 0, 16), (112, 0, 12))  # pixels, tiles per
# side (0: a whole scene), pictures per step; and how often each comes, first and in the last round
TILES_ONLY, WITH_SCENES = torch.tensor([.5, .15, .25, .1, 0, 0, 0]), torch.tensor([.15, .1, .1, 0, .25, .2, .2])
OFFSETS = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # patches (down, right), head by head
MEAN, STD = (torch.tensor(x)[:, None, None] for x in (data.IMAGE_MEAN, data.IMAGE_STD))


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest; both warm up over 20 steps and fall linearly to 0.

    Muon (Jordan et al. 2024): momentum, then the step of each matrix made orthogonal by five Newton-Schulz rounds.
    torch.optim.Muon does that in bfloat16, which takes seconds a step on a CPU without bfloat16 units.
    """

    def __init__(self, steps: int, *modules: nn.Module, muon_lr: float = 6e-3, adam_lr: float = 2e-3):
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        self.matrices = [p for n, p in named if p.ndim == 2 and "blocks" in n]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        matrix_ids = {id(p) for p in self.matrices}
        self.adam = torch.optim.AdamW([p for _, p in named if id(p) not in matrix_ids], weight_decay=0)
        self.steps, self.muon_lr, self.adam_lr = steps, muon_lr, adam_lr

    @torch.no_grad()
    def step(self, step: int) -> None:
        rate = min(1, (step + 1) / 20) * (1 - step / self.steps)
        for p, momentum in zip(self.matrices, self.momenta, strict=True):
            momentum.mul_(.95).add_(p.grad)
            x = p.grad + .95 * momentum
            x = F.normalize(x.T if x.shape[0] > x.shape[1] else x, dim=(0, 1))
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            p.sub_(x if x.shape == p.shape else x.T, alpha=self.muon_lr * rate * max(1, p.shape[0] / p.shape[1]) ** .5)
            p.grad = None
        self.adam.param_groups[0]["lr"] = self.adam_lr * rate
        self.adam.step()
        self.adam.zero_grad()


def draw_tile(rng: np.random.Generator, size: int, kind: str, figure: str | None) -> np.ndarray:
    """One ground with at most one figure that spans half of the tile to all of it: (size, size, 3) uint8."""
    image = draw.draw_background(rng, size, kind)
    draw.paint_scraps(rng, image, rng.integers(0, 1 + size // 24))
    if figure is not None:
        radius = size * rng.uniform(.26, .52)
        room = size / 2 - .8 * radius
        draw.paint_figure(rng, image, draw.FIGURES[figure], size / 2 + rng.uniform(-room, room, 2), radius, figure)
    return image.round().astype(np.uint8)


def tile_pool(seed: int, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stock of tiles: (count, 3, size, size) uint8, and what the caption of each names, (count, NAMES) shares: one half
    each for the figure and for the ground beside it, all of it for a ground alone."""
    rng = np.random.default_rng(seed)
    tiles, named = torch.empty(count, 3, size, size, dtype=torch.uint8), torch.zeros(count, len(NAMES))
    for i in range(count):
        figure, kind = int(rng.integers(-3, FIGURES)), FIGURES + int(rng.integers(len(NAMES) - FIGURES))  # < 0: none
        tile = draw_tile(rng, size, NAMES[kind], NAMES[figure] if figure >= 0 else None)
        tiles[i] = torch.from_numpy(tile).permute(2, 0, 1)
        named[i, kind] = 1
        if figure >= 0:
            named[i, [figure, kind]] = .5
    return tiles, named


def scene_pool(seed: int, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stock of whole pictures as in the data set, of another seed: (count, 3, size, size) uint8, and which figures each
    shows, (count, FIGURES) bool. The masks are thrown away, and which grounds a picture has is not told."""
    scenes, shown = torch.empty(count, 3, size, size, dtype=torch.uint8), torch.zeros(count, FIGURES, dtype=torch.bool)
    for i in range(count):
        image, mask = draw.scene(seed, i, size)
        scenes[i] = torch.from_numpy(image).permute(2, 0, 1)
        shown[i, list(data.mask_labels(mask))] = True
    return scenes, shown


def recolour(tiles: torch.Tensor, gen: torch.Generator, low: float, span: float, noise: float = 0) -> torch.Tensor:
    """Other paper, other light: (n, 3, s, s) in 0..255 with the channels shuffled and scaled -> normalised."""
    order = torch.stack([torch.randperm(3, generator=gen) for _ in range(len(tiles))])
    x = tiles.gather(1, order[:, :, None, None].expand_as(tiles))
    x = x * (low + span * torch.rand(len(x), 3, 1, 1, generator=gen))
    if noise:
        x = x + noise * torch.randn(x.shape, generator=gen)
    return (x.clamp(0, 255) - MEAN) / STD


def resize(tiles: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(tiles, size=size, mode="bilinear", align_corners=False, antialias=True)


def mosaics(tiles: torch.Tensor) -> torch.Tensor:
    """(B, g*g, 3, s, s) tiles, row by row -> (B, 3, g*s, g*s)."""
    batch, count, _, s, _ = tiles.shape
    g = math.isqrt(count)
    return tiles.view(batch, g, g, 3, s, s).permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, g * s, g * s)


def take_apart(maps: torch.Tensor, g: int) -> torch.Tensor:
    """(B, D, h, w) features of mosaics -> (B, g*g, D, h/g, w/g), tile by tile."""
    return maps.unflatten(3, (g, -1)).unflatten(2, (g, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# How a tower starts: attention looks at the neighbours, filters at form
# ----------------------------------------------------------------------------------------------------------------------

def start_positions(frequencies: torch.Tensor) -> torch.Tensor:
    """(1 + GRID*GRID, WIDTH): random Fourier features of the place; p_i . p_j falls with the distance as a Gaussian."""
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = torch.stack([y, x], -1).flatten(0, 1).float() @ frequencies
    places = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    return torch.cat([torch.zeros(1, WIDTH), places])  # CLS is nowhere


def shift(frequencies: torch.Tensor, offset: tuple[int, int]) -> torch.Tensor:
    """(WIDTH, WIDTH): turns the features of a place into those of the place `offset` patches away."""
    angles, i = torch.tensor(offset, dtype=torch.float) @ frequencies, torch.arange(0, WIDTH, 2)
    matrix = torch.zeros(WIDTH, WIDTH)
    matrix[i, i], matrix[i + 1, i + 1], matrix[i, i + 1], matrix[i + 1, i] = (angles.cos(), angles.cos(),
                                                                              -angles.sin(), angles.sin())
    return matrix


def start_block(index: int, frequencies: torch.Tensor, qkv: torch.Tensor, out: nn.Linear, up: nn.Linear,
                down: nn.Linear) -> None:
    """Random, but a head of the first blocks attends to one neighbour, in the last two to near patches that look alike.

    qkv  (3 * WIDTH, WIDTH) weight of the block at `index`, changed in place, as are its three linear layers
    """
    nn.init.normal_(qkv, std=WIDTH ** -.5)
    qkv[:2 * WIDTH] *= .3
    local = index < DEPTH - 2
    qkv[WIDTH:2 * WIDTH] += torch.eye(WIDTH) * (1 if local else .7)
    for head in range(WIDTH // 64):
        rows = slice(64 * head, 64 * head + 64)
        offset = OFFSETS[(index * WIDTH // 64 + head) % len(OFFSETS)]
        qkv[rows] += shift(frequencies, offset)[rows] if local else .7 * torch.eye(WIDTH)[rows]
    nn.init.normal_(out.weight, std=WIDTH ** -.5 * (2 * DEPTH) ** -.5)
    nn.init.normal_(up.weight, std=(2 * WIDTH) ** -.5)
    nn.init.normal_(down.weight, std=WIDTH ** -.5 * (2 * DEPTH) ** -.5)
    for layer in (out, up, down):
        nn.init.zeros_(layer.bias)


def start_filters(weight: torch.Tensor) -> None:
    """Smooth, grey, blind to the mean: form before colour. From white noise nothing is learned for hundreds of steps."""
    filters = F.interpolate(torch.randn(WIDTH, 1, 4, 4), size=PATCH, mode="bicubic")
    filters = filters - filters.mean((2, 3), keepdim=True)
    weight.copy_(1.2 * (filters / filters.norm(dim=(2, 3), keepdim=True)).expand(-1, 3, -1, -1) / 3)


# ----------------------------------------------------------------------------------------------------------------------
# CLIP
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def new_clip(seed: int, text_width: int = 64, embed: int = 64) -> nn.Module:
    """OpenAI's module, 1.2 million parameters in the image tower; two blocks and one head read the text."""
    torch.manual_seed(seed)
    model = clip.model.CLIP(embed, GRID * PATCH, DEPTH, WIDTH, PATCH, 77, 49408, text_width, text_width // 64, 2)
    nn.init.normal_(model.token_embedding.weight, std=.2)  # OpenAI's 0.02 makes all captions one at the start
    model.token_embedding.requires_grad_(False)
    visual, gen = model.visual, torch.Generator().manual_seed(seed)
    frequencies = torch.randn(2, WIDTH // 2, generator=gen) / 1.5  # a Gaussian of 1.5 patches
    visual.positional_embedding.copy_(start_positions(frequencies))
    for i, block in enumerate(visual.transformer.resblocks):
        start_block(i, frequencies, block.attn.in_proj_weight, block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
        nn.init.zeros_(block.attn.in_proj_bias)
    start_filters(visual.conv1.weight)
    model.logit_scale.fill_(math.log(10))
    return model


def clip_patches(model: nn.Module, images: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Patch tokens after ln_post as a map, (B, D, h, w).

    dropped  (B,) bool: the last block works without its shortcut. Grad-CAM sees that block through its attention only,
             so what the classes differ in has to pass there
    """
    visual = model.visual
    x = visual.conv1(images)
    grid = x.shape[-2:]
    position = backbone.clip_position_embedding(visual.positional_embedding, grid)
    x = visual.ln_pre(torch.cat([visual.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], dim=1) + position)
    *blocks, last = visual.transformer.resblocks
    for block in (*blocks, last):
        attended, _ = backbone.attend(block.attn, block.ln_1(x), with_map=False)
        x = attended + (x * ~dropped[:, None, None] if block is last else x)
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x)[:, 1:].mT.unflatten(2, grid)


def clip_step(model: nn.Module, captions: torch.Tensor, pools: dict, last_round: bool,
              gen: torch.Generator) -> tuple[torch.Tensor, float]:
    """One batch of mosaics or of scenes -> its loss, and the share of tiles or scenes of which a name is found."""
    size, g, batch = LAYOUTS[int(torch.multinomial(WITH_SCENES if last_round else TILES_ONLY, 1, generator=gen))]
    stock, named = pools[min(g, 2)]
    side = max(g, 1)
    pick = torch.randint(len(stock), (batch, side * side), generator=gen)
    x, wanted = stock[pick.flatten()].float(), named[pick]
    x = torch.where(torch.rand(len(x), generator=gen)[:, None, None, None] < .5, x.flip(-1), x)
    x = recolour(resize(x, size // side), gen, .8, .4).unflatten(0, (batch, side * side))
    patches = clip_patches(model, mosaics(x), dropped=torch.rand(batch, generator=gen) < .5)
    embedded = take_apart(patches, side).mean((3, 4)) @ model.visual.proj  # (B, g*g, E)
    text = model.logit_scale.exp() * F.normalize(model.encode_text(captions), dim=-1)
    logits = F.normalize(embedded, dim=-1) @ text.T
    found = logits[..., :wanted.shape[-1]].argmax(dim=-1, keepdim=True)
    if g == 0:  # half for the figures, alike, half for some ground, whichever
        logs = logits[:, 0].log_softmax(dim=-1)
        shares = wanted[:, 0] / wanted[:, 0].sum(dim=1, keepdim=True)
        loss = -((shares * logs[:, :FIGURES]).sum(dim=1) + logs[:, FIGURES:].logsumexp(dim=1)).mean() / 2
    else:
        if not last_round:  # the figure alone, where there is one
            figure = 2 * wanted[..., :FIGURES]
            wanted = torch.cat([figure, wanted[..., FIGURES:] * (figure.sum(dim=-1, keepdim=True) == 0)], dim=-1)
        whole = F.normalize(embedded.mean(dim=1), dim=-1) @ text.T
        loss = (F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
                + .5 * F.cross_entropy(whole, wanted.mean(dim=1)))
    return loss, (wanted.gather(-1, found) > 0).float().mean().item()


def train_clip(seed: int, rounds: tuple[int, ...], pools: dict) -> nn.Module:
    """Contrast of pictures with all captions of the world. Pooling is the patch mean, which is what the CAM explains.

    At first a tile's caption names its figure, or its ground if there is none: that is what makes a patch speak for itself.
    (Trained from the beginning as in the last round, for 5200 steps, all names are found and patches tell the scene: raw CAM 44.) A whole
    mosaic has the captions of all its tiles: that makes an image with several figures believe in all of them; otherwise the
    CAM of the weaker one lights up the ground. In the last round a tile names its ground too, one half each: a ground that
    is never named beside a figure is read as that figure, and the CAM lights up there. Scenes then teach how figures lie in
    the pictures of the data set. Theirs are the labels that the method is given, and no more.
    """
    model = new_clip(seed).train()
    captions = clip.tokenize([data.TEMPLATE.format(name) for name in NAMES])
    for number, steps in enumerate(rounds, 1):
        clip_round(model, captions, pools, steps, number == len(rounds), torch.Generator().manual_seed(seed + number))
    return model.eval().requires_grad_(False)


def clip_round(model: nn.Module, captions: torch.Tensor, pools: dict, steps: int, last_round: bool, gen: torch.Generator) -> None:
    optimizer, start, right = Optimizer(steps, model), time.time(), 0.
    for step in range(steps):
        loss, hits = clip_step(model, captions, pools, last_round, gen)
        loss.backward()
        optimizer.step(step)
        right = .95 * right + .05 * hits
        if step % 50 == 49:
            print(f"CLIP {'last ' * last_round}round, step {step + 1}/{steps}  loss {loss.item():.2f}  right names {right:.0%}  "
                  f"{time.time() - start:.0f} s", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# DINO
# ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def new_dino(seed: int) -> nn.Module:
    """DINOv2's module, 1 million parameters."""
    torch.manual_seed(seed)
    model, gen = backbone.DINOv2(WIDTH, DEPTH, WIDTH // 64, PATCH, GRID), torch.Generator().manual_seed(seed)
    frequencies = torch.randn(2, WIDTH // 2, generator=gen) / 1.5
    model.pos_embed.copy_(start_positions(frequencies)[None])
    model.mask_token.normal_(std=.5)
    start_filters(model.patch_embed["proj"].weight)
    nn.init.zeros_(model.patch_embed["proj"].bias)
    for i, block in enumerate(model.blocks):
        start_block(i, frequencies, block.attn.qkv.weight, block.attn.proj, block.mlp["fc1"], block.mlp["fc2"])
        nn.init.zeros_(block.attn.qkv.bias)
    return model


def train_dino(seed: int, steps: int, pools: dict, batch: int = 12, temperature: float = .15, memory: int = 2048) -> nn.Module:
    """Momentum contrast (MoCo, He et al. 2020): a student finds each tile again among all that its own moving average has
    seen in another view, those of this batch and `memory` earlier ones.

    Views are two mosaics of the same tiles: in other places and other colours, one of them mirrored, each tile rolled round
    by a shift of its own. What stays is form and texture. A tile is the mean of its patches, as in CLIP.
    DINO's own tasks (codes of tiles and of hidden patches) were tried for 1500 steps: the patches then told where they are
    and at which phase of a stripe, and hardly what they show.
    """
    student, gen = new_dino(seed), torch.Generator().manual_seed(seed + 1)
    head = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
    teacher, teacher_head = copy.deepcopy((student, head))
    teacher.requires_grad_(False), teacher_head.requires_grad_(False)
    optimizer, start, found = Optimizer(steps, student, head), time.time(), 0.
    g = 2
    tiles, size, count = pools[g][0], GRID * PATCH // g, batch * g * g
    queue = F.normalize(torch.randn(memory, 64, generator=gen), dim=-1)

    def embed(tower: nn.Module, head: nn.Module, view: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """-> (count, 64) unit norm, the tiles in the order before they were laid out."""
        pooled = take_apart(tower(view), g).mean((3, 4))  # (batch, g*g, WIDTH)
        return F.normalize(head(pooled[torch.arange(batch)[:, None], order.argsort(dim=1)].flatten(0, 1)), dim=-1)

    for step in range(steps):
        raw = tiles[torch.randint(len(tiles), (count,), generator=gen)].float()
        views = []
        for x in (raw, raw.flip(-1)):
            order = torch.rand(batch, g * g, generator=gen).argsort(dim=1)
            shifts = torch.randint(size, (count, 2), generator=gen).tolist()
            x = torch.stack([tile.roll(shift, (1, 2)) for tile, shift in zip(x, shifts, strict=True)])
            x = recolour(x, gen, .6, .7, noise=8).unflatten(0, (batch, g * g))
            views.append((mosaics(x[torch.arange(batch)[:, None], order]), order))
        with torch.no_grad():
            keys = embed(teacher, teacher_head, *views[1])
        logits = embed(student, head, *views[0]) @ torch.cat([keys, queue]).T / temperature
        wanted = torch.arange(count)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        optimizer.step(step)
        with torch.no_grad():
            for slow, fast in zip((*teacher.parameters(), *teacher_head.parameters()),
                                  (*student.parameters(), *head.parameters()), strict=True):
                slow.lerp_(fast, max(.01, 1 / (step + 2)))
        queue = torch.cat([keys, queue])[:memory]
        found = .95 * found + .05 * (logits.argmax(dim=1) == wanted).float().mean().item()
        if step % 50 == 49:
            print(f"DINO step {step + 1}/{steps}  loss {loss.item():.2f}  tiles found again {found:.0%}  "
                  f"{time.time() - start:.0f} s", flush=True)
    return teacher.eval()


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------

def save_clip(model: nn.Module, path: Path) -> None:
    """float16. Of the token embedding's 49408 rows only those of this world's words are kept; 02_backbone puts them back."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    words = clip.tokenize([data.TEMPLATE.format(name) for name in NAMES]).unique().long()
    state["token_embedding.words"] = words
    state["token_embedding.rows"] = state.pop("token_embedding.weight")[words].clone()
    torch.save(state, path)


def save_dino(model: nn.Module, path: Path) -> None:
    torch.save({key: value.half() for key, value in model.state_dict().items()}, path)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE, help="folder for clip.pt and dino.pth (default: beside this file)")
    p.add_argument("--only", choices=("clip", "dino"), help="one of the two; it comes out the same")
    args = p.parse_args(argv)
    torch.set_num_threads(1)  # the order of sums, and with it the weights, depends on the number of threads
    pools = {g: tile_pool(SEEDS["tiles"] + g, STOCK, GRID * PATCH // g) for g in (1, 2)}  # tiles per side -> stock
    pools[0] = scene_pool(SEEDS["scenes"], STOCK, GRID * PATCH)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "dino":
        save_clip(train_clip(SEEDS["clip"], (*ROUNDS, LAST_ROUND), pools), args.out / "clip.pt")
    if args.only != "clip":
        save_dino(train_dino(SEEDS["dino"], DINO_STEPS, pools), args.out / "dino.pth")


if __name__ == "__main__":
    main()
