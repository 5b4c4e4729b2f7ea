"""03 - Class activation maps: where in the image does a word light up?

In     the tokens that enter CLIP's last block (02_backbone), text features of the classes and of the background
Out    `grad_cam`, `normalize_cams`, `box_masks`: one map per (image, class) pair, batched, nothing leaves the device
Paper  WeCLIP, CVPR 2024, the initial CAM; the method is CLIP-ES (CVPR 2023): Grad-CAM (Selvaraju et al. 2017) on the
       softmax over the classes of the image and a list of background names, so that words exclude one another.

    python 03_cam.py cat.jpg --classes cat sofa --clip ViT-B/16        # no training, no labels on disk
    python 03_cam.py                                                   # the toy CLIP on a picture of `shapes`

Letters: B images, P (image, class) pairs, C-1 foreground classes, N = h * w patches, D width, d width of a head, E joint
embedding width.
"""
import argparse
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")

EPS = 1e-7  # of the min-max normalisation. Refined maps can be as small as 1e-6: the constant is part of the result


def class_pairs(labels: torch.Tensor) -> torch.Tensor:
    """Which maps have to be made? One per image and class present in it.

    labels  (B, C-1) multi-hot image-level labels
    ->      (P, 2) long: image, class; images in order and classes ascending. P may be 0
    """
    return labels.nonzero()


def grad_cam(model: nn.Module, tokens: torch.Tensor, text_fg: torch.Tensor, text_bg: torch.Tensor, pairs: torch.Tensor,
             grid: tuple[int, int], logit_scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where is the evidence for a class? Softmax Grad-CAM at the last block's ln_1 (CLIP-ES; WeCLIP's CAM).

    The last block runs once per image. The patches of its output are averaged (CLS left out) into the image embedding;
    p = softmax(s cos(embedding, text)) over the classes of this image and all background names. The target is the
    probability and not the logit: that is what makes classes exclusive. Channel weights are the mean over the patches of
    dp / dA, A the output of ln_1; the map is their weighted sum of A. The gradient reaches A through attention only,
    since the shortcut goes around ln_1.

    Autograd would walk back through the whole block for every class. Written out, the way back is shorter: all patches
    receive the same gradient from the average, and of their gradients at A only the mean is asked for. The next two
    functions say what each of the two saves.

    model             CLIP (02_backbone.load_clip)
    tokens            (B, 1+N, D) that enter the last block
    text_fg, text_bg  (C-1, E) and (n_bg, E), unit norm
    pairs             (P, 2) of class_pairs
    grid              (h, w), with N = h * w
    logit_scale       s; the model's own exp(logit_scale) when None
    ->                cams (P, h, w) before relu and normalisation,
                      probs (B, C-1 + n_bg), 0 for classes that the image does not show,
                      last_map (B, 1+N, 1+N), attention of the last block averaged over its heads
    """
    visual, block = model.visual, model.visual.transformer.resblocks[-1]
    scale = model.logit_scale.exp() if logit_scale is None else logit_scale
    image_of, class_of = pairs.to(tokens.device).unbind(1)
    present = torch.zeros(len(tokens), len(text_fg), dtype=torch.bool, device=tokens.device)
    present[image_of, class_of] = True
    shown = torch.cat([present, present.new_ones(len(tokens), len(text_bg))], dim=1)

    def probabilities(pooled: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        logits = scale * F.normalize(pooled @ visual.proj, dim=-1) @ torch.cat([text_fg, text_bg]).T
        return logits.masked_fill(~shown, -torch.inf).softmax(dim=-1)

    with torch.no_grad():
        activations = block.ln_1(tokens)  # A, (B, 1+N, D)
        q, k, v = backbone.queries_keys_values(block.attn, activations)
        attention = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)  # (B, heads, 1+N, 1+N)
        read = attention @ v                                            # (B, heads, 1+N, d)
        x = (tokens + block.attn.out_proj(read.transpose(1, 2).flatten(2)))[:, 1:]  # (B, N, D), CLS has done its part
        hidden = block.mlp.c_fc(block.ln_2(x))  # (B, N, 4 D)
        out = x + block.mlp.c_proj(block.mlp.gelu(hidden))
        pooled = visual.ln_post(out).mean(dim=1)  # (B, D)

    # Row p is pair p, image_of[p] its image. A copy of the pooled vector for each pair: the gradient of the sum has that of
    # one probability in each row.
    copies = pooled[image_of].requires_grad_()
    with torch.enable_grad():
        wanted = probabilities(copies, shown[image_of]).gather(1, class_of[:, None])
        (grad,) = torch.autograd.grad(wanted.sum(), copies)  # (P, D)

    with torch.no_grad():
        grad = back_through_mlp(visual, x, hidden, out, grad, image_of) @ block.attn.out_proj.weight  # (P, N, D), at `read`
        # The maps of attention are large: the classes of an image, in slots 0, 1, ..., share its own without a copy.
        slot_of = present.cumsum(dim=1)[image_of, class_of] - 1  # (P,) 0, 1, ... within its image
        slots = int(torch.bincount(pairs[:, 0]).max()) if len(pairs) else 0  # `pairs` is on the CPU: no wait for a GPU
        by_slot = grad.new_zeros(len(tokens), q.shape[1], x.shape[1], slots, q.shape[-1])  # (B, heads, N, slots, d)
        by_slot.permute(0, 3, 2, 1, 4)[image_of, slot_of] = grad.unflatten(-1, (q.shape[1], -1))
        sums = back_through_attention(block.attn, q, k, v, attention, read, by_slot)[image_of, slot_of]  # (P, D)
        weights = sums / x.shape[1] ** 2  # twice a mean over patches: of the embedding, and of the gradients
        cams = torch.einsum("pd,pnd->pn", weights, activations[image_of, 1:])
        return cams.unflatten(1, tuple(grid)), probabilities(pooled, shown), attention.mean(dim=1)


def back_through_mlp(visual: nn.Module, x: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, grad: torch.Tensor,
                     image_of: torch.Tensor) -> torch.Tensor:
    """From the sum over the patches back to before the last block's MLP: out = x + MLP(ln_2(x)), then ln_post, then the sum.

    With y = (out - mean) / std of a patch, ln_post's gradient is (c - y mean(c y)) / std, where c (ln_post.weight * grad
    minus its mean) is the same for all patches: one vector per class goes through the second layer instead of N.
    From there on the way is linear, so that y goes it once per image, for all of its classes.

    x, out    (B, N, D) before and after the MLP; hidden (B, N, 4 D), the MLP's inside before its activation
    grad      (P, D) at the sum over the patches
    image_of  (P,) image of each pair
    ->        (P, N, D), gradient at x
    """
    block, norm = visual.transformer.resblocks[-1], visual.ln_post
    with torch.enable_grad():  # the activation acts on each number by itself: the gradient of the sum is its slope
        before = hidden.detach().requires_grad_()
        (slope,) = torch.autograd.grad(block.mlp.gelu(before).sum(), before)

    def back(grad: torch.Tensor, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        inside = slope.mul_(grad @ block.mlp.c_proj.weight)  # in place: (P, N, 4 D) is the largest tensor here
        _, back_through_norm = torch.func.vjp(block.ln_2, x)
        return back_through_norm(inside @ block.mlp.c_fc.weight)[0].add_(grad)

    y = F.layer_norm(out, norm.normalized_shape, eps=norm.eps)
    std = (out.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    c = grad * norm.weight
    c = (c - c.mean(dim=-1, keepdim=True))[:, None]  # (P, 1, D)
    along = (y[image_of] @ c.mT) / y.shape[-1]       # (P, N, 1)
    of_c = back(c, x[image_of], slope[image_of])     # (P, N, D)
    of_y = back(y, x, slope)                         # (B, N, D)
    return of_c.addcmul_(along, of_y[image_of], value=-1).div_(std[image_of])


def back_through_attention(mha: nn.MultiheadAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           attention: torch.Tensor, read: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From `read` = W v back to A, summed over the patches of A; W = softmax(S), S = q k^T / sqrt(d).

    With g = grad: dv = W^T g and dS = W * (g v^T - r), where r_i = g_i . read_i. Of dq = dS k / sqrt(d) and
    dk = dS^T q / sqrt(d) only the sums over patches are wanted. That of dq needs no more of dS than its column sums, which
    are dv_j . v_j - (W^T r)_j. That of dk needs its row sums without CLS; a whole row sums to zero, so these are minus the
    column of CLS. No (1+N, 1+N) map is formed for a class, and one vector goes back through the projection to q, k, v.

    q, k, v, read  (B, heads, 1+N, d); attention (B, heads, 1+N, 1+N) [query, key]
    grad           (B, heads, N, K, d) at the patches of `read`, for K classes of each image; CLS has none
    ->             (B, K, D), sum over the patches of the gradient at A
    """
    attention, read, scale = attention[:, :, 1:], read[:, :, 1:], q.shape[-1] ** -0.5
    grad_v = (attention.mT @ grad.flatten(3)).unflatten(-1, grad.shape[3:])    # (B, heads, 1+N, K, d)
    r = (grad @ read[..., None])[..., 0]                                       # (B, heads, N, K)
    columns = (grad_v @ v[..., None])[..., 0] - attention.mT @ r               # (B, heads, 1+N, K)
    to_cls = attention[..., :1] * ((grad @ v[:, :, :1, :, None])[..., 0] - r)  # (B, heads, N, K)
    sums = (scale * columns.mT @ k, -scale * to_cls.mT @ q[:, :, 1:], grad_v[:, :, 1:].sum(dim=2))  # (B, heads, K, d)
    return torch.cat([part.transpose(1, 2).flatten(2) for part in sums], dim=-1) @ mha.in_proj_weight


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """(map - min) / (1e-7 + max(map - min)), each map by itself: (P, h, w) -> (P, h, w). A constant map becomes zero."""
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return maps / (EPS + maps.amax(dim=(1, 2), keepdim=True))


def normalize_cams(cams: torch.Tensor) -> torch.Tensor:
    """Raw Grad-CAMs -> CAMs in [0, 1): relu, then min-max twice, as the released code does (so the peak is 1 - 1e-7)."""
    return min_max(min_max(cams.relu()))


def box_masks(cams: torch.Tensor, fraction: float) -> torch.Tensor:
    """Which patches may send activation? The bounding boxes of all connected regions above a threshold (CLIP-ES).

    cams      (P, h, w) in [0, 1)
    fraction  of the maximum: lambda, 0.4 for VOC, 0.7 for COCO
    ->        (P, h, w) bool, the union of the boxes; all False for a map without activation

    Maps are truncated to 0..255, the threshold is int(fraction * maximum), regions are 8-connected. A box is half open
    and its open ends are clamped to w-1 and h-1, so that the last row and column never lie in one (released code).
    """
    height, width = cams.shape[-2:]
    grey = (cams * 255).trunc()
    thresholds = torch.tensor([int(fraction * peak) for peak in range(256)], device=cams.device, dtype=cams.dtype)
    active = (grey > thresholds[grey.amax(dim=(1, 2)).long()][:, None, None])[:, None]  # (P, 1, h, w); a table: float32 rounds
    ys, xs = torch.meshgrid(*(torch.arange(n, device=cams.device, dtype=cams.dtype) for n in (height, width)), indexing="ij")
    nowhere = -float(height * width)
    boxes = torch.stack([-xs, -ys, xs, ys]).where(active, nowhere)  # (P, 4, h, w): of each active patch, itself so far
    # In each round a patch's box grows by those of its eight neighbours, so that after r rounds it is that of all patches
    # within r steps. A region whose centre needs r holds a path without short cuts of 2 r - 1 patches (Erdos, Saks and Sos
    # 1986), and a square of 2 x 2 at most two of them: after this many rounds the centre has the box of the whole region.
    for _ in range(math.ceil(height / 2) * math.ceil(width / 2)):
        boxes = F.max_pool2d(boxes, kernel_size=3, stride=1, padding=1).where(active, nowhere)
    left, top, right, bottom = boxes.flatten(2).unbind(1)  # (P, N)
    right, bottom = (right + 1).clamp(max=width - 1), (bottom + 1).clamp(max=height - 1)
    in_columns = (xs[0] >= -left[..., None]) & (xs[0] < right[..., None])      # (P, N, w)
    in_rows = (ys[:, 0] >= -top[..., None]) & (ys[:, 0] < bottom[..., None])   # (P, N, h)
    return torch.einsum("pnh,pnw->phw", in_rows.to(cams.dtype), in_columns.to(cams.dtype)) > 0


# ----------------------------------------------------------------------------------------------------------------------
# Pictures for people
# ----------------------------------------------------------------------------------------------------------------------


def paint(image: np.ndarray, maps: np.ndarray, class_ids: list[int]) -> np.ndarray:
    """CAMs over their picture: each class glows in its colour of the palette, the rest is grey and dim.

    image (H, W, 3) uint8, maps (K, H, W) in [0, 1], class_ids: K 0-based foreground classes -> (H, W, 3) uint8
    """
    colours = data.colormap()[np.array(class_ids, int) + 1].astype(np.float32)  # (K, 3)
    strength = maps.max(axis=0, initial=0)[..., None]
    weights = maps / maps.sum(axis=0, keepdims=True).clip(1e-6)
    glow = np.einsum("khw,kc->hwc", weights, colours)
    grey = image.mean(axis=2, keepdims=True)  # so that a colour means a class and nothing else
    return (grey * (1 - strength) * 0.6 + (0.35 * grey + 0.65 * glow) * strength).clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# This file run alone: the CAMs of any picture and any words
# ----------------------------------------------------------------------------------------------------------------------


def cams_of_picture(encoders, image: np.ndarray, class_ids: list[int], long_side: int) -> tuple[np.ndarray, np.ndarray]:
    """CAMs of one picture without any training: (H, W, 3) uint8 -> CAMs (K, H, W) in [0, 1), probabilities (K,).

    class_ids  K 0-based classes of the encoders' text features, taken to be in the picture; the maps come in this order
    long_side  pixels at which the network sees it
    """
    pixels = data.normalize(image).to(encoders.text_fg.device)[None]
    patch = encoders.clip.visual.conv1.kernel_size[0]
    size = [max(int(length * long_side / max(image.shape[:2])), patch) for length in image.shape[:2]]
    seen = backbone.look(encoders, F.interpolate(pixels, size=size, mode="bilinear", align_corners=False))
    pairs = torch.tensor([(0, c) for c in class_ids])
    raw, probs, _ = grad_cam(encoders.clip, seen.tokens[-1], encoders.text_fg, encoders.text_bg, pairs, seen.grid)
    cams = F.interpolate(normalize_cams(raw)[None], size=image.shape[:2], mode="bilinear", align_corners=False)[0]
    return cams.cpu().numpy(), probs[0, pairs[:, 1].to(probs.device)].cpu().numpy()


def info_of_words(world: data.DatasetInfo, classes: list[str] | None, background: list[str] | None) -> data.DatasetInfo:
    """A data set of any words; None: those of `world`, less what is named as a class. Prompts are the papers' where they have one."""
    names = tuple(classes or world.classes)
    return data.DatasetInfo("words", names, tuple(data.REWRITTEN.get(name, name) for name in names),
                            tuple(background or (word for word in world.background if word not in names)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = data.CommandLine(__doc__, "[images ...]")
    p.add_argument("images", nargs="*", help="pictures or folders of pictures (default: one of `shapes`)")
    p.add_argument("--classes", nargs="+", metavar="NAME", help="what they show (default: what the one of `shapes` shows)")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words (default: VOC's; with the toy, its own)")
    p.add_argument("--clip", metavar="NAME|FILE", help="default: ViT-B/16 for your pictures, the toy for `shapes`")
    p.add_argument("--long-side", type=data.count, metavar="N", help="pixels the network sees (default: 512; with the toy 112)")
    p.add_argument("--output-dir", "--out", metavar="DIR", help="for NAME_cam.png (default: predictions/ beside your picture)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0, or 1 if some pictures could not be read."""
    args = parse_args(argv)
    if args.images and not args.classes:
        raise data.DataError("which words shall light up? Name what the pictures show: --classes cat sofa")
    clip_name = args.clip or ("ViT-B/16" if args.images else "shapes")
    world = data.DATASETS["shapes" if not args.images or clip_name == "shapes" else "voc"]
    info = info_of_words(world, args.classes, args.background)
    encoders = backbone.load_encoders(clip_name, None, info, backbone.choose_device(args.device))
    ids, folder = list(range(len(info.classes))), args.output_dir
    if args.images:
        files = data.picture_files(args.images)
    else:
        sample = data.list_samples(world, data.find_root("shapes"), "val")[0]
        ids = ids if args.classes else list(sample.labels)
        files, folder = [Path(sample.image)], folder or "predictions"  # not into the data set
    failed = 0
    for file, [target] in zip(tqdm(files, disable=None), data.result_files(files, folder, ("_cam.png",))):
        try:
            image = data.load_image(file, as_displayed=True)
        except data.DataError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        cams, probs = cams_of_picture(encoders, image, ids, args.long_side or (112 if clip_name == "shapes" else 512))
        pictures = [image, *(paint(image, one[None], [c]) for one, c in zip(cams, ids))]
        captions = [file.name, *(f"{info.classes[c]} {100 * prob:.0f} %" for c, prob in zip(ids, probs))]
        target.parent.mkdir(parents=True, exist_ok=True)
        data.contact_sheet(pictures, captions, columns=len(pictures)).save(target)
        tqdm.write(f"{target}: " + ", ".join(captions[1:]))
    return int(failed > 0)


if __name__ == "__main__":
    data.run(main)
