"""Does each stage of 02 to 04 do what its docstring says? Every one is held against something that we did not write the same way.

The oracles are closed forms, slow loops, torch's own modules and the clip package. No file outside this folder is read;
the numbers of the authors' code are in test_parity.py.
"""
import math
from importlib import import_module

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import golden

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")

TINY = dict(width=128, layers=4, patch=8, resolution=32, text_width=64, text_layers=1, embed=32)  # 2 heads, 4 x 4 grid


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def tower():
    """A small CLIP of OpenAI's own class with lively random weights: 4 blocks, patch 8, native size 32 x 32."""
    return clip.model.build_model(golden.clip_state_dict(TINY, seed=3)).float().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------- 02: frozen backbones

def record_blocks(tower, images):
    """Inputs of all blocks and of the attention inside, (B, T, D) each, as the clip package computes them."""
    inputs, attention_inputs, hooks = [], [], []
    for block in tower.visual.transformer.resblocks:
        hooks.append(block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].transpose(0, 1))))
        hooks.append(block.ln_1.register_forward_hook(lambda _, args, out: attention_inputs.append(out.transpose(0, 1))))
    tower.encode_image(images)
    for hook in hooks:
        hook.remove()
    return inputs, attention_inputs


def test_tokens_are_those_of_the_clip_package(tower, images):
    """At the native size nothing is resized, so what enters block l+1 of OpenAI's encoder is our token list's entry l."""
    inputs, _ = record_blocks(tower, images)
    tokens, _ = backbone.clip_features(tower, images)
    assert len(tokens) == 3  # all blocks but the last
    for got, expected in zip(tokens, inputs[1:], strict=True):
        close(got, expected)


def test_attention_maps_are_those_of_torchs_own_attention(tower, images):
    """nn.MultiheadAttention can return its weights, averaged over heads; rows are queries."""
    _, attention_inputs = record_blocks(tower, images)
    _, maps = backbone.clip_features(tower, images, num_maps=4)
    assert maps.shape == (2, 3, 17, 17)  # the last block's own map is made in 03
    for i, x in enumerate(attention_inputs[:-1]):
        _, expected = tower.visual.transformer.resblocks[i].attn(x.mT.transpose(0, 2).mT, x.transpose(0, 1), x.transpose(0, 1))
        close(maps[:, i], expected)


def test_fewer_maps_are_the_last_ones_and_change_no_token(tower, images):
    tokens, maps = backbone.clip_features(tower, images, num_maps=4)
    fewer_tokens, fewer = backbone.clip_features(tower, images, num_maps=2)
    close(fewer, maps[:, -1:])
    close(fewer_tokens[-1], tokens[-1])
    assert backbone.clip_features(tower, images)[1].shape[1] == 0


def test_pixels_beyond_the_last_whole_patch_do_not_matter(tower):
    """Sizes need not be multiples of the patch: the convolution drops the rest, the grid is floor(H/p) x floor(W/p)."""
    images = torch.randn(1, 3, 35, 47, generator=torch.Generator().manual_seed(1))
    tokens, _ = backbone.clip_features(tower, images)
    assert tokens[0].shape == (1, 1 + 4 * 5, 128)
    close(tokens[-1], backbone.clip_features(tower, images[:, :, :32, :40])[0][-1])


def resize_slowly(values, size, factor, kernel, support, antialias=False):
    """One axis of a resize with half-pixel centres: `size` samples of the 1-d tensor `values`, `factor` samples per value."""
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


def resize_grid_slowly(grid, size, factors, **how):
    rows = torch.stack([resize_slowly(row, size[1], factors[1], **how) for row in grid])
    return torch.stack([resize_slowly(column, size[0], factors[0], **how) for column in rows.T]).T


def cubic(a):
    """Keys' kernel. torch uses a = -0.75 for bicubic, and -0.5 for bicubic with antialiasing."""
    def kernel(x):
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0
    return kernel


def test_clip_positions_are_resized_bilinearly_without_the_class_entry():
    embedding = torch.randn(1 + 4 * 4, 1, generator=torch.Generator().manual_seed(2))
    resized = backbone.clip_position_embedding(embedding, (3, 7))
    expected = resize_grid_slowly(embedding[1:, 0].reshape(4, 4), (3, 7), (3 / 4, 7 / 4),
                                  kernel=lambda x: max(1 - abs(x), 0.0), support=1)
    close(resized[0], embedding[0])
    close(resized[1:, 0].reshape(3, 7), expected)
    close(backbone.clip_position_embedding(embedding, (4, 4)), embedding)


@pytest.mark.parametrize("registers", [0, 4])
def test_dino_positions_follow_the_two_conventions_of_the_official_models(registers):
    """Plain models stretch by (n + 0.1) / G, register models by n / G with antialiasing; both are bicubic."""
    model = backbone.DINOv2(width=1, depth=0, heads=1, grid=9, registers=registers)
    nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(3))
    grid = model.pos_embed.detach()[0, 1:, 0].reshape(9, 9)
    if registers:
        expected = resize_grid_slowly(grid, (4, 6), (4 / 9, 6 / 9), kernel=cubic(-0.5), support=2, antialias=True)
    else:
        expected = resize_grid_slowly(grid, (4, 6), (4.1 / 9, 6.1 / 9), kernel=cubic(-0.75), support=2)
    resized = model.position_embedding(4, 6).detach()
    close(resized[0, 1:, 0].reshape(4, 6), expected)
    close(resized[:, 0], model.pos_embed.detach()[:, 0])
    assert model.position_embedding(9, 9) is model.pos_embed


def test_text_features_are_unit_vectors_of_the_filled_in_template(tower):
    features = backbone.text_features(tower, ("cat", "chair seat"))
    expected = tower.encode_text(clip.tokenize(["a clean origami cat.", "a clean origami chair seat."]))
    close(features, expected / expected.norm(dim=1, keepdim=True))


def small_dino(registers=0, seed=5):
    return golden.dino_state_dict(dict(width=32, layers=2), seed, registers)


@pytest.mark.parametrize("registers", [0, 4])
def test_dino_is_torchs_own_transformer_with_layer_scale_folded_in(registers):
    """gamma * (W x + b) = (gamma W) x + gamma b, so a pre-norm nn.TransformerEncoderLayer computes the same block."""
    state = small_dino(registers)
    model = backbone.dino_from_state_dict(state, heads=2)
    images = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(4))
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(2, 1, 32), x], dim=1) + model.position_embedding(2, 3)
    x = torch.cat([x[:, :1], *([state["register_tokens"].expand(2, -1, 32)] if registers else []), x[:, 1:]], dim=1)
    for i in range(2):
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items()}
        layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
                                           norm_first=True)
        layer.load_state_dict({
            "self_attn.in_proj_weight": s["attn.qkv.weight"], "self_attn.in_proj_bias": s["attn.qkv.bias"],
            "self_attn.out_proj.weight": s["ls1.gamma"][:, None] * s["attn.proj.weight"],
            "self_attn.out_proj.bias": s["ls1.gamma"] * s["attn.proj.bias"],
            "linear1.weight": s["mlp.fc1.weight"], "linear1.bias": s["mlp.fc1.bias"],
            "linear2.weight": s["ls2.gamma"][:, None] * s["mlp.fc2.weight"], "linear2.bias": s["ls2.gamma"] * s["mlp.fc2.bias"],
            "norm1.weight": s["norm1.weight"], "norm1.bias": s["norm1.bias"],
            "norm2.weight": s["norm2.weight"], "norm2.bias": s["norm2.bias"]})
        x = layer(x)
    x = F.layer_norm(x, (32,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    close(backbone.dino_features(model, images), x[:, 1 + registers:].mT.unflatten(2, (2, 3)).detach())


def test_dino_sees_the_image_at_the_next_multiples_of_its_patch_below():
    model = backbone.dino_from_state_dict(small_dino(), heads=2)
    images = torch.randn(1, 3, 40, 57, generator=torch.Generator().manual_seed(4))
    shrunk = F.interpolate(images, size=(28, 56), mode="bilinear", align_corners=False)
    close(backbone.dino_features(model, images), model(shrunk).detach())
    assert backbone.dino_features(model, images[:, :, :5, :9]).shape == (1, 32, 1, 1)  # never less than one patch


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("name, heads", [("dinov2_vits14", 6), ("dinov2_vitb14", 12), ("dinov2_vitl14", 16)])
def test_dino_reads_the_official_keys_of_every_size(name, heads, registers):
    """Strict loading: a missing, surplus or misshapen tensor is an error. On the meta device nothing is allocated."""
    layout = golden.DINO_LAYOUTS[name]
    with torch.device("meta"):
        state = {k: torch.empty(s) for k, s in golden.dino_shapes(layout["width"], layout["layers"], registers).items()}
        model = backbone.dino_from_state_dict(state)
        assert model.state_dict().keys() == state.keys()
        assert model.blocks[0].attn.heads == heads and len(model.blocks) == layout["layers"]
        state.pop("blocks.0.ls1.gamma")
        with pytest.raises(RuntimeError, match="ls1.gamma"):
            backbone.dino_from_state_dict(state)


def test_backbones_survive_a_file_under_their_official_names(tmp_path):
    state = golden.dino_state_dict(dict(width=64, layers=1), seed=5, registers=4)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    model = backbone.load_dino(str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    torch.save(golden.clip_state_dict(TINY, seed=3), tmp_path / "plain.pt")
    plain = backbone.load_clip(str(tmp_path / "plain.pt"))
    trace_inputs = torch.zeros(1, 3, 32, 32), clip.tokenize(["a cat"])
    torch.jit.save(torch.jit.trace(plain, trace_inputs, check_trace=False), tmp_path / "ViT-B-16.pt")  # OpenAI's form
    archive = backbone.load_clip(str(tmp_path / "ViT-B-16.pt"))
    for model in (plain, archive):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        for key, value in golden.clip_state_dict(TINY, seed=3).items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("load", [backbone.load_clip, backbone.load_dino])
def test_a_foreign_or_missing_weight_file_is_named(load, tmp_path):
    for name, content in {"absent.pt": None, "noise.pt": b"not a model", "other.pt": {"weight": torch.zeros(3)}}.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content:
            torch.save(content, tmp_path / name)
        with pytest.raises(data.DataError, match=name):
            load(str(tmp_path / name))


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    """A half-written file in the cache would otherwise pass as Meta's weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(small_dino(), tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth")
    with pytest.raises(data.DataError, match="dinov2_vits14_pretrain.pth.*SHA-256"):
        backbone.load_dino("dinov2_vits14")


def test_the_fingerprint_tells_two_backbones_apart():
    first, same, other = (backbone.dino_from_state_dict(small_dino(seed=s), heads=2) for s in (5, 5, 6))
    assert backbone.fingerprint(first) == backbone.fingerprint(same) != backbone.fingerprint(other)


# ------------------------------------------------------------------------------------------------------- 03: CAMs

@pytest.fixture(scope="module")
def words():
    """Text features of 5 foreground classes and 3 background names, unit vectors that nobody had to encode."""
    vectors = F.normalize(torch.randn(8, TINY["embed"], generator=torch.Generator().manual_seed(6)), dim=1)
    return vectors[:5], vectors[5:]


LABELS = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def last_tokens(tower):
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(7))  # 4 x 5 patches
    return backbone.clip_features(tower, images)[0][-1]


def test_every_image_gets_one_pair_per_class_it_shows():
    assert cam.class_pairs(LABELS).tolist() == [[0, 1], [0, 3], [0, 4], [1, 0]]
    assert cam.class_pairs(torch.zeros(2, 5)).shape == (0, 2)


def one_cam_at_a_time(tower, tokens, text_fg, text_bg, classes, target, grid, scale):
    """Grad-CAM the plain way: one image, one class, clip's own block with a hook on ln_1, one backward pass."""
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


@pytest.mark.parametrize("scale", [None, 25.0])
def test_batched_cams_equal_one_backward_pass_per_class(tower, last_tokens, words, scale):
    pairs = cam.class_pairs(LABELS)
    cams, probs, _ = cam.grad_cam(tower, last_tokens, *words, pairs, (4, 5), logit_scale=scale)
    for i, (image, target) in enumerate(pairs.tolist()):
        classes = LABELS[image].nonzero()[:, 0].tolist()
        expected, expected_probs = one_cam_at_a_time(tower, last_tokens[image], *words, classes, target, (4, 5),
                                                     scale or tower.logit_scale.exp())
        close(cams[i] / expected.abs().max(), expected / expected.abs().max())
        close(probs[image][classes + [5, 6, 7]], expected_probs)
    assert (probs[1, 1:5] == 0).all()  # a class that the image does not show is not in its softmax


def test_the_last_attention_map_is_that_of_torchs_own_attention(tower, last_tokens, words):
    _, _, last_map = cam.grad_cam(tower, last_tokens, *words, cam.class_pairs(LABELS), (4, 5))
    block = tower.visual.transformer.resblocks[-1]
    x = block.ln_1(last_tokens).transpose(0, 1)
    close(last_map, block.attn(x, x, x)[1])


def test_an_images_cams_do_not_depend_on_its_neighbours_in_the_batch(tower, last_tokens, words):
    together, _, _ = cam.grad_cam(tower, last_tokens, *words, cam.class_pairs(LABELS), (4, 5))
    alone, _, _ = cam.grad_cam(tower, last_tokens[1:], *words, cam.class_pairs(LABELS[1:]), (4, 5))
    close(together[3:] / alone.abs().max(), alone / alone.abs().max())


def test_no_class_gives_no_cam(tower, last_tokens, words):
    cams, probs, _ = cam.grad_cam(tower, last_tokens, *words, torch.zeros(0, 2, dtype=torch.long), (4, 5))
    assert cams.shape == (0, 4, 5) and cam.normalize_cams(cams).shape == (0, 4, 5)
    close(probs.sum(1), torch.ones(2))


def test_nothing_of_clip_collects_a_gradient(tower, last_tokens, words):
    """Frozen means frozen: the CAM's backward pass stops at ln_1's output."""
    cams, probs, last_map = cam.grad_cam(tower, last_tokens, *words, cam.class_pairs(LABELS), (4, 5))
    assert not any(t.requires_grad for t in (cams, probs, last_map))
    assert all(p.grad is None for p in tower.parameters())


def test_min_max_keeps_the_released_constant():
    """(x - min) / (1e-7 + max): a map with peak 1e-6 ends at 10/11, not at 1."""
    maps = torch.tensor([[[2e-6, 1e-6]], [[3.0, 1.0]], [[0.0, 0.0]]])
    close(cam.min_max(maps), torch.tensor([[[10 / 11, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]]))


def test_cams_are_clipped_first_and_peak_just_below_one():
    """The released code normalises twice; the maximum stays below 1, so that times 255 it truncates to 254."""
    cams = cam.normalize_cams(torch.tensor([[[-5.0, 1.0], [0.5, 2.0]], [[-1.0, -2.0], [-3.0, -4.0]]]))
    close(cams, torch.tensor([[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert int(255 * cams[0].max()) == 254


def boxes_slowly(cams, fraction):
    """Flood fill from every patch above the threshold; numpy and Python lists only."""
    masks = np.zeros(cams.shape, bool)
    for scores, mask in zip(cams.numpy(), masks):
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


@pytest.mark.parametrize("grid", [(10, 12), (5, 5), (3, 15), (2, 9), (1, 12), (9, 1)])
@pytest.mark.parametrize("fraction", [0.4, 0.7])
def test_box_masks_equal_a_flood_fill(grid, fraction):
    cams = cam.normalize_cams(torch.randn(40, *grid, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(cam.box_masks(cams, fraction), boxes_slowly(cams, fraction))


SERPENTINE = """
#######
......#
.#####.
#......
.#####.
......#
#######
"""
STAIRS = """
#..##..##..##
.#.#.#.#.#.#.
..#...#...#..
"""


@pytest.mark.parametrize("drawing", [SERPENTINE, STAIRS])
def test_a_winding_region_is_one_box_however_long_its_way(drawing):
    """Regions are found by spreading along paths; the number of rounds must suffice for the longest one."""
    cams = torch.tensor([[[0.9 if c == "#" else 0.0 for c in row] for row in drawing.split()]])
    for turned in (cams, cams.flip(1), cams.mT, cams.flip(2).mT):
        assert torch.equal(cam.box_masks(turned, 0.4), boxes_slowly(turned, 0.4))


def test_boxes_never_reach_the_last_row_and_column():
    """The released code clamps the open ends to h-1 and w-1; a region that lies only there gives no box at all."""
    everything, corner = torch.full((1, 4, 5), 0.9), torch.zeros(1, 4, 5)
    corner[0, 3, 2] = corner[0, 0, 4] = 0.9
    mask = cam.box_masks(everything, 0.4)[0]
    assert mask[:3, :4].all() and not mask[3].any() and not mask[:, 4].any()
    assert not cam.box_masks(corner, 0.4).any()
    assert not cam.box_masks(torch.zeros(1, 4, 5), 0.4).any()
