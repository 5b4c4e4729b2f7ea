"""The slow, obvious forms: what the fast ones of 02 to 04 are held against (test_*.py) and timed against (bench.py).

One image, one class, one region, one sample after the other. Nothing of the project is imported here.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a small part of the largest value: float32 sums of other orders differ by a few millionths of it."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.detach().abs().max().item())


def resize_grid(grid: torch.Tensor, size: tuple[int, int], factors: tuple[float, float], **how) -> torch.Tensor:
    """Any separable resize, one axis after the other; `how` as in `resize_line`. (h, w) -> (*size)."""
    rows = torch.stack([resize_line(row, size[1], factors[1], **how) for row in grid])
    return torch.stack([resize_line(column, size[0], factors[0], **how) for column in rows.T]).T


def resize_line(values: torch.Tensor, size: int, factor: float, kernel, support: int, antialias: bool = False):
    """One axis of a resize with half-pixel centres: `size` samples of the 1-d `values`, `factor` samples per value."""
    stretch = max(1 / factor, 1) if antialias else 1
    out = []
    for i in range(size):
        centre = (i + 0.5) / factor - 0.5
        taps = range(math.ceil(centre - support * stretch), math.floor(centre + support * stretch) + 1)
        if antialias:  # taps outside are dropped and the others fill up to one; otherwise the edge value is repeated
            taps = [j for j in taps if 0 <= j < len(values)]
        weights = [kernel((j - centre) / stretch) for j in taps]
        out.append(sum(w * values[min(max(j, 0), len(values) - 1)] for w, j in zip(weights, taps)) / sum(weights))
    return torch.stack(out)


def linear(x: float) -> float:
    """The kernel of a bilinear resize; its support is 1."""
    return max(1 - abs(x), 0.0)


def cubic(a: float):
    """Keys' kernel; its support is 2. torch uses a = -0.75 for bicubic, and -0.5 for bicubic with antialiasing."""
    def kernel(x):
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
    return kernel


def one_cam_at_a_time(tower: nn.Module, tokens: torch.Tensor, text_fg: torch.Tensor, text_bg: torch.Tensor,
                      classes: list[int], target: int, grid: tuple[int, int], scale: float):
    """Grad-CAM the plain way: one image, one class, clip's own block with a hook on ln_1, one backward pass.

    tokens (1+N, D) that enter the last block; classes: those of the image, `target` one of them
    ->     the map (h, w) before relu, and the probabilities of `classes` and all background words
    """
    visual, kept = tower.visual, {}

    def keep(module, args, out):
        kept["activations"] = out.requires_grad_()
    block = visual.transformer.resblocks[-1]
    hook = block.ln_1.register_forward_hook(keep)
    out = block(tokens[:, None])[:, 0]  # clip's blocks want (T, B, D)
    hook.remove()
    embedding = visual.ln_post(out)[1:].mean(0) @ visual.proj
    words = torch.cat([text_fg[classes], text_bg])
    probs = (scale * F.cosine_similarity(embedding[None], words)).softmax(0)
    (gradient,) = torch.autograd.grad(probs[classes.index(target)], kept["activations"])
    weights = gradient[1:, 0].mean(0)
    return (kept["activations"][1:, 0] @ weights).reshape(grid).detach(), probs.detach()


def boxes_by_flood_fill(cams: torch.Tensor, fraction: float) -> torch.Tensor:
    """Flood fill from every patch above the threshold; numpy and Python lists only. (P, h, w) -> (P, h, w) bool."""
    masks = np.zeros(cams.shape, bool)
    for scores, mask in zip(cams.cpu().numpy(), masks):
        grey = (scores * 255).astype(np.uint8)
        above = grey > int(fraction * int(grey.max()))
        height, width = grey.shape
        while above.any():
            region, todo = [], [tuple(np.argwhere(above)[0])]
            while todo:
                y, x = todo.pop()
                if 0 <= y < height and 0 <= x < width and above[y, x]:
                    above[y, x] = False
                    region.append((y, x))
                    todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            (top, left), (bottom, right) = np.min(region, 0), np.max(region, 0)
            mask[top:min(bottom + 1, height - 1), left:min(right + 1, width - 1)] = True
    return torch.from_numpy(masks)


def par_with_48_copies(images: torch.Tensor, masks: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """PAR the memory-hungry way: all neighbours of all pixels side by side. (B, 3, H, W), (B, X, H, W) -> (B, X, H, W)."""
    dilations = (1, 2, 4, 8, 12, 24)
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    pick = torch.zeros(8, 1, 3, 3, dtype=images.dtype, device=images.device)  # kernel n sees one of the eight neighbours
    for n, (dy, dx) in enumerate(around):
        pick[n, 0, 1 + dy, 1 + dx] = 1

    def copies(x):  # (B, X, H, W) -> (B, X, 48, H, W), the border repeated
        flat = x.flatten(0, 1)[:, None]
        parts = [F.conv2d(F.pad(flat, (d,) * 4, mode="replicate"), pick, dilation=d) for d in dilations]
        return torch.cat(parts, dim=1).unflatten(0, x.shape[:2])
    neighbours = copies(images)
    spread = neighbours.std(dim=2, keepdim=True) + 1e-8
    colour = -(((neighbours - images[:, :, None]).abs() / spread / 0.3) ** 2).mean(dim=1, keepdim=True)
    distances = torch.tensor([d * math.hypot(*shift) for d in dilations for shift in around]).to(images)
    position = -((distances / (distances.std() + 1e-8) / 0.3) ** 2)
    weights = colour.softmax(dim=2) + 0.01 * position.softmax(0)[:, None, None]
    for _ in range(iterations):
        masks = (copies(masks) * weights).sum(dim=2)
    return masks
