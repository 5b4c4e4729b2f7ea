"""Does each stage of 02 to 05 do what its docstring says? Each is held against something written in another way.

The oracles are closed forms, slow loops (the longer ones in slow.py), torch's own modules and the clip package. No file
outside this folder is read; the numbers of the authors' code are in test_parity.py.
"""
import copy
import math
from importlib import import_module

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import golden
import slow

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")

TINY = dict(width=128, layers=4, patch=8, resolution=32, text_width=64, text_layers=1, embed=32)  # 2 heads, 4 x 4 grid


def close(got, expected, tolerance=1e-5):
    """Equal up to a small part of the largest value: float32 sums of other orders differ by a few millionths of it."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.detach().abs().max().item())


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
        hooks.append(block.ln_1.register_forward_hook(lambda _, args, x: attention_inputs.append(x.transpose(0, 1))))
    tower.encode_image(images)
    for hook in hooks:
        hook.remove()
    return inputs, attention_inputs


def test_tokens_are_those_of_the_clip_package(tower, images):
    """At the native size nothing is resized: what enters block l+1 of OpenAI's encoder is entry l of our tokens."""
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
        x = x.transpose(0, 1)  # (T, B, D)
        close(maps[:, i], tower.visual.transformer.resblocks[i].attn(x, x, x)[1])


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


def resize_grid_slowly(grid, size, factors, **how):
    rows = torch.stack([resize_slowly(row, size[1], factors[1], **how) for row in grid])
    return torch.stack([resize_slowly(column, size[0], factors[0], **how) for column in rows.T]).T


def linear(x):
    return max(1 - abs(x), 0.0)


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
                                  kernel=linear, support=1)
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
    """gamma * (W x + b) = (gamma W) x + gamma b, so a pre-norm nn.TransformerEncoderLayer computes the same block.

    All tokens are made as small as 1e-3, so that the 1e-6 in DINOv2's layer norms (torch's default is 1e-5) is seen.
    """
    tiny = ("token", "embed", "gamma")
    state = {k: v * 1e-3 if any(word in k for word in tiny) else v for k, v in small_dino(registers).items()}
    model = backbone.dino_from_state_dict(state, heads=2)
    images = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(4))
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(2, 1, 32), x], dim=1) + model.position_embedding(2, 3)
    x = torch.cat([x[:, :1], *([state["register_tokens"].expand(2, -1, 32)] if registers else []), x[:, 1:]], dim=1)
    for i in range(2):
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items()}
        layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6,
                                           batch_first=True, norm_first=True)
        layer.load_state_dict({
            "self_attn.in_proj_weight": s["attn.qkv.weight"], "self_attn.in_proj_bias": s["attn.qkv.bias"],
            "self_attn.out_proj.weight": s["ls1.gamma"][:, None] * s["attn.proj.weight"],
            "self_attn.out_proj.bias": s["ls1.gamma"] * s["attn.proj.bias"],
            "linear1.weight": s["mlp.fc1.weight"], "linear1.bias": s["mlp.fc1.bias"],
            "linear2.weight": s["ls2.gamma"][:, None] * s["mlp.fc2.weight"],
            "linear2.bias": s["ls2.gamma"] * s["mlp.fc2.bias"],
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")  # OpenAI's form is an old one
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
    (tmp_path / "noise.pt").write_bytes(b"not a model")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("absent.pt", "noise.pt", "other.pt"):
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


@pytest.mark.parametrize("scale", [None, 25.0])
def test_batched_cams_equal_one_backward_pass_per_class(tower, last_tokens, words, scale):
    pairs = cam.class_pairs(LABELS)
    cams, probs, _ = cam.grad_cam(tower, last_tokens, *words, pairs, (4, 5), logit_scale=scale)
    for i, (image, target) in enumerate(pairs.tolist()):
        classes = LABELS[image].nonzero()[:, 0].tolist()
        expected, expected_probs = slow.one_cam_at_a_time(tower, last_tokens[image], *words, classes, target, (4, 5),
                                                          scale or tower.logit_scale.exp())
        close(cams[i], expected)
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
    close(together[3:], alone)


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


@pytest.mark.parametrize("grid", [(10, 12), (5, 5), (3, 15), (2, 9), (1, 12), (9, 1)])
@pytest.mark.parametrize("fraction", [0.4, 0.7])
def test_box_masks_equal_a_flood_fill(grid, fraction):
    cams = cam.normalize_cams(torch.randn(40, *grid, generator=torch.Generator().manual_seed(8)))
    assert torch.equal(cam.box_masks(cams, fraction), slow.boxes_by_flood_fill(cams, fraction))


ANGLE = ["#" * 14] + 9 * ["#............."]
SERPENTINE = ["#######", "......#", ".#####.", "#......", ".#####.", "......#", "#######"]
RIGHT, LEFT, ROW = f"{'.' * 18}#......", f"#{'.' * 24}", "#" * 19 + "." * 6
LABYRINTH = ["#" * 25, LEFT] + 4 * [ROW, RIGHT, ROW, LEFT] + [ROW] + 6 * [RIGHT]  # its middle is 95 steps from both ends


@pytest.mark.parametrize("drawing", [ANGLE, SERPENTINE, LABYRINTH])
def test_a_long_region_is_one_box_however_far_its_ends_are(drawing):
    """Regions are found by spreading over neighbours; the rounds must suffice until both ends have met."""
    cams = torch.tensor([[[0.9 if c == "#" else 0.0 for c in row] for row in drawing]])
    for turned in (cams, cams.flip(1), cams.mT, cams.flip(2).mT):
        assert torch.equal(cam.box_masks(turned, 0.4), slow.boxes_by_flood_fill(turned, 0.4))


def test_boxes_never_reach_the_last_row_and_column():
    """The released code clamps the open ends to h-1 and w-1; a region that lies only there gives no box at all."""
    everything, corner = torch.full((1, 4, 5), 0.9), torch.zeros(1, 4, 5)
    corner[0, 3, 2] = corner[0, 0, 4] = 0.9
    mask = cam.box_masks(everything, 0.4)[0]
    assert mask[:3, :4].all() and not mask[3].any() and not mask[:, 4].any()
    assert not cam.box_masks(corner, 0.4).any()
    assert not cam.box_masks(torch.zeros(1, 4, 5), 0.4).any()


# --------------------------------------------------------------------------- 04: the table of numbers, the trained part

@pytest.mark.parametrize("row, expected", [
    # steps, images per step, lr, dynamic from, candidate maps, box fraction, self-labels after, input of the last block
    (("weclip", "voc"), (30_000, 4, 2e-3, 9_145, 6, 0.4, None, -1)),
    (("weclip", "coco"), (80_000, 4, 2e-3, 40_000, 10, 0.7, None, -1)),
    (("weclip+", "voc"), (30_000, 4, 2e-4, 0, 6, None, 18_000, -2)),
    (("weclip+", "coco"), (80_000, 8, 2e-4, 0, 8, 0.7, 40_000, -1)),
])
def test_the_rows_are_the_released_numbers(row, expected):
    """A number that slips here spoils a run of hours without any error. Effective values of the released scripts."""
    cfg = decoder.CONFIGS[row]
    assert expected == (cfg.max_iters, cfg.batch_size, cfg.lr, cfg.dynamic_from, cfg.dynamic_maps, cfg.box_fraction,
                        cfg.self_label_after, cfg.cam_input)
    assert (cfg.static_maps, cfg.affinity_radius, cfg.self_label_above) == (8, 8, 0.75)
    assert (cfg.crop_size, cfg.long_side) == (320, 512)
    assert cfg.scales == ((1, 0.75) if cfg.method == "weclip" else (1, 1.5))
    assert cfg.weigh_by_prob == (cfg.method == "weclip+")


@pytest.mark.parametrize("build, count", [
    (lambda: decoder.WeCLIP(21), 5_985_045),
    (lambda: decoder.WeCLIP(81), 6_000_465),
    (lambda: decoder.WeCLIPPlus(21, dino_width=384), 2_933_269),
    (lambda: decoder.WeCLIPPlus(21, dino_width=768), 3_031_573),
    (lambda: decoder.WeCLIPPlus(21, dino_width=1024, depth=5), 4_676_629),
])
def test_the_trained_part_has_the_released_number_of_parameters(build, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def test_the_trained_part_bears_the_released_names():
    """So that the authors' checkpoints of it load with strict=True."""
    with torch.device("meta"):
        plain, plus = decoder.WeCLIP(21), decoder.WeCLIPPlus(21)
    for model, shapes in ((plain, golden.head_shapes(768, 21, 11)), (plus, golden.head_shapes(768, 21, 1, 384))):
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes


def seeded(module):
    """A module with lively random weights, the same in every run."""
    module.load_state_dict({name: torch.from_numpy(golden.affine(name, golden.noise("test", name, value.shape, seed=0)))
                            for name, value in module.state_dict().items()})
    return module.eval()


def test_the_fuse_head_treats_every_patch_alike_and_by_itself():
    """Linear-ReLU-Linear per block, side by side, one more linear map: patch by patch, written out."""
    head = seeded(decoder.FuseHead(in_width=6, blocks=2, width=4))
    tokens = [torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    fused = head(tokens, (2, 3))
    w = {k: v.double() for k, v in head.state_dict().items()}
    for n in range(6):
        parts = []
        for i, x in enumerate(tokens):
            p = f"linears_modulelist.{i}.proj"
            hidden = (w[f"{p}.weight"] @ x[0, n].double() + w[f"{p}.bias"]).clamp(min=0)
            parts.append(w[f"{p}_2.weight"] @ hidden + w[f"{p}_2.bias"])
        expected = w["linear_fuse.weight"][:, :, 0, 0] @ torch.cat(parts) + w["linear_fuse.bias"]
        close(fused[0, :, n // 3, n % 3].double(), expected)


def test_the_decoder_is_torchs_own_transformer_with_quick_gelu():
    model = seeded(decoder.Decoder(num_classes=5, depth=2, width=16, heads=4))
    features = torch.randn(2, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    x = features.flatten(2).mT
    for block in model.transformer.resblocks:
        layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0, activation=lambda h: h * torch.sigmoid(1.702 * h),
                                           batch_first=True, norm_first=True)
        layer.self_attn.load_state_dict(block.attn.state_dict())
        layer.norm1, layer.norm2 = block.ln_1, block.ln_2
        layer.linear1, layer.linear2 = block.mlp.c_fc, block.mlp.c_proj
        x = layer(x)
    close(model(features), torch.einsum("cd,bnd->bcn", model.linear_pred.weight[:, :, 0, 0], x).unflatten(2, (2, 3))
          + model.linear_pred.bias[:, None, None])


@pytest.fixture
def tokens():
    """Outputs of 3 blocks: 2 images, CLS and 2 x 3 patches, width 8."""
    return [torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_weclip_fuses_the_last_blocks_without_cls(tokens):
    model = seeded(decoder.WeCLIP(num_classes=4, clip_width=8, blocks=2, depth=1))
    prediction = model(tokens, (2, 3))
    changed = [torch.full_like(tokens[0], 9.0), *(torch.cat([x[:, :1] + 5, x[:, 1:]], dim=1) for x in tokens[1:])]
    close(model(changed, (2, 3)).logits, prediction.logits)
    assert prediction.logits.shape == (2, 4, 2, 3) and prediction.branches == ()


def test_weclip_plus_reads_both_encoders_with_one_decoder(tokens):
    model = seeded(decoder.WeCLIPPlus(num_classes=4, clip_width=8, dino_width=5, depth=1))
    dino_map = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    logits, fused, (of_clip, of_dino) = model(tokens, (2, 3), dino_map)
    close(model.decoder(fused[:, :256]), of_clip)
    close(model.decoder(fused[:, 256:]), of_dino)
    close(logits, (of_clip + of_dino) / 2)
    on_dinos_grid = model.dino_decoder_fts_fuse([dino_map.flatten(2).mT], (4, 4))
    expected = [resize_grid_slowly(x, (2, 3), (2 / 4, 3 / 4), kernel=linear, support=1)
                for x in on_dinos_grid[0, :3].detach()]
    close(fused[0, 256:259].detach(), torch.stack(expected))


def test_the_affinity_sees_the_features_after_dropout(tokens):
    """Dropout takes out whole channels of the fused features; the learned affinity is made from what is left."""
    torch.manual_seed(0)
    model = decoder.WeCLIP(num_classes=4, clip_width=8, blocks=2, depth=1).train()
    fused = model(tokens, (2, 3)).fused
    silent = (fused == 0).all(dim=(2, 3)).float().mean()
    assert 0.03 < silent < 0.2
    close(fused.eq(0).any(dim=3).any(dim=2).float().mean(), silent)  # never a part of a channel


def test_the_learned_affinity_is_the_sigmoid_of_all_dot_products():
    fused = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(3))
    affinity = decoder.learned_affinity(fused)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                dot = sum(float(fused[b, c, i // 3, i % 3] * fused[b, c, j // 3, j % 3]) for c in range(4))
                assert float(affinity[b, i, j]) == pytest.approx(1 / (1 + math.exp(-dot)), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- 04: refinement

@pytest.fixture
def attention():
    """Attention maps (B=2, M=5, T=7, T=7) whose rows sum to one; the patch-to-patch part sums to less."""
    return torch.randn(2, 5, 7, 7, generator=torch.Generator().manual_seed(4)).mul(2).softmax(dim=-1)


def test_the_static_affinity_is_the_mean_of_the_last_maps_between_patches(attention):
    close(decoder.static_affinity(attention, 3), ((attention[:, 2] + attention[:, 3] + attention[:, 4]) / 3)[:, 1:, 1:])


def test_the_dynamic_affinity_keeps_maps_by_the_released_signed_statistic(attention):
    """Literally: S_l = sum(learned - map_l); keep where S_l <= mean S; sum / (count + 1e-5); times learned; float64."""
    learned = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(5))
    affinity = decoder.dynamic_affinity(attention, 4, learned)
    for b in range(2):
        candidates = attention[b, -4:, 1:, 1:].double()
        statistic = [float((learned[b].double() - m).sum()) for m in candidates]
        kept = [m for m, s in zip(candidates, statistic) if s <= sum(statistic) / 4]
        assert 0 < len(kept) < 4
        close(affinity[b].double(), sum(kept) / (len(kept) + 1e-5) * learned[b])


def test_the_transition_matrix_equals_slow_loops():
    """Columns then rows to sum one, three times; symmetrised; squared."""
    affinity = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(6))
    got = decoder.transition_matrix(affinity)
    for b in range(2):
        m = affinity[b].double().tolist()
        for _ in range(3):
            columns = [sum(m[i][j] for i in range(5)) for j in range(5)]
            m = [[m[i][j] / columns[j] for j in range(5)] for i in range(5)]
            m = [[x / sum(row) for x in row] for row in m]
        m = [[(m[i][j] + m[j][i]) / 2 for j in range(5)] for i in range(5)]
        m = [[sum(m[i][k] * m[k][j] for k in range(5)) for j in range(5)] for i in range(5)]
        close(got[b].double(), torch.tensor(m, dtype=torch.float64))


def test_activation_flows_along_the_rows_of_its_own_images_matrix():
    transition = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(7))
    cams = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(8))
    pairs = torch.tensor([[0, 4], [1, 0], [1, 2]])
    flow = decoder.spread(transition, cams, pairs)
    for p, (image, _) in enumerate(pairs.tolist()):
        for i in range(6):
            expected = sum(float(transition[image, i, j] * cams[p, j // 3, j % 3]) for j in range(6))
            assert float(flow[p, i // 3, i % 3]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(11, 17), (40, 30)])
def test_par_equals_the_form_with_48_copies(size):
    """11 x 17 is smaller than the farthest neighbour, so the replicated border reaches everywhere."""
    generator = torch.Generator().manual_seed(9)
    images, maps = torch.randn(2, 3, *size, generator=generator), torch.rand(2, 4, *size, generator=generator)
    expected = slow.par_with_48_copies(images.double(), maps.double(), iterations=3)
    close(decoder.par(images, maps, iterations=3).double(), expected)


def test_par_stretches_the_image_onto_the_maps_with_corners_aligned():
    """A 2 x 2 picture becomes a bilinear ramp between its corners."""
    corners = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y, x = torch.linspace(0, 1, 9)[:, None], torch.linspace(0, 1, 12)
    (a, b), (c, d) = corners[0].permute(1, 2, 0)[..., None, None]  # each (3, 1, 1)
    ramp = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d)
    maps = torch.rand(1, 2, 9, 12, generator=torch.Generator().manual_seed(2))
    close(decoder.par(corners, maps), decoder.par(ramp[None], maps), 1e-4)


def test_par_adds_one_percent_per_iteration_to_a_constant_map():
    """The 48 weights of a pixel sum to 1.01: 1 from the colours, 0.01 from the positions."""
    images = torch.randn(1, 3, 9, 12, generator=torch.Generator().manual_seed(3))
    close(decoder.par(images, torch.ones(1, 1, 9, 12)), torch.full((1, 1, 9, 12), 1.01 ** 20), 1e-4)


def test_scores_are_stacked_per_image_with_the_background_first():
    """Image 0 shows classes 2 and 4, image 1 none, image 2 class 0; background is what the best class leaves over."""
    refined = torch.tensor([[[0.2, 0.9]], [[0.5, 0.1]], [[0.7, 0.0]]])
    scores, ids = decoder.stack_scores(refined, torch.tensor([[0, 2], [0, 4], [2, 0]]), batch=3)
    close(scores, torch.tensor([[[[0.5, 0.1]], [[0.2, 0.9]], [[0.5, 0.1]]],
                                [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]],
                                [[[0.3, 1.0]], [[0.7, 0.0]], [[0.0, 0.0]]]]))
    assert ids.tolist() == [[0, 3, 5], [0, 0, 0], [0, 1, 0]]
    scores[0, 0] -= 0.01  # away from the tie
    assert decoder.best_label(scores, ids).tolist() == [[[5, 3]], [[0, 0]], [[1, 0]]]


def test_scores_without_any_class_are_background():
    scores, ids = decoder.stack_scores(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.long), batch=2)
    assert scores.shape == (2, 1, 2, 3) and (decoder.best_label(scores, ids) == 0).all()


REFINE = decoder.Config(static_maps=3, dynamic_maps=4)


def test_boxes_cut_columns_and_come_from_the_cam_before_the_probability(attention):
    """Released: R * mask over columns, times (CAM * P_c), the mask made from the plain CAM."""
    generator = torch.Generator().manual_seed(5)
    cams = cam.normalize_cams(torch.randn(3, 2, 3, generator=generator))
    cams[0] = torch.tensor([[0.9, 0.9, 0.2], [0.1, 0.0, 0.0]])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 0]])
    probs = torch.rand(2, 4, 2, 3, generator=generator)
    probs[0, 2] = torch.tensor([[0.01, 0.5, 0.9], [0.9, 0.9, 0.9]])  # boxes of the product would be others
    cfg = decoder.replace(REFINE, box_fraction=0.7, weigh_by_prob=True)
    learned = torch.rand(2, 6, 6, generator=generator)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    got = decoder.refine(cfg, images, cams, attention, learned, probs, pairs, (8, 12), dynamic=True)
    transition = decoder.transition_matrix(decoder.dynamic_affinity(attention, 4, learned))
    masks = slow.boxes_by_flood_fill(cams, 0.7)
    assert masks[0].tolist() == [[True, True, False], [False, False, False]]
    for p, (image, c) in enumerate(pairs.tolist()):
        matrix = transition[image] * masks[p].flatten()[None, :]
        close(got.spread[p].flatten(), matrix @ (cams[p] * probs[image, c + 1]).flatten())


def test_the_pseudo_label_knows_only_the_classes_of_its_image(attention):
    generator = torch.Generator().manual_seed(6)
    cams = cam.normalize_cams(torch.randn(3, 2, 3, generator=generator))
    pairs = torch.tensor([[0, 1], [0, 2], [1, 0]])
    got = decoder.refine(REFINE, torch.randn(2, 3, 16, 24, generator=generator), cams, attention, torch.rand(2, 6, 6),
                         torch.rand(2, 4, 2, 3), pairs, (13, 20), dynamic=False)
    assert got.labels.shape == (2, 13, 20) and got.labels.dtype == torch.long
    assert set(got.labels[0].unique().tolist()) <= {0, 2, 3} and set(got.labels[1].unique().tolist()) <= {0, 1}
    assert got.maps.amax() < 1 and got.maps.amin() >= 0


def test_a_cam_without_activation_gives_background_and_no_nan(attention):
    got = decoder.refine(REFINE, torch.randn(2, 3, 8, 12), torch.zeros(1, 2, 3), attention, torch.rand(2, 6, 6),
                         torch.rand(2, 4, 2, 3), torch.tensor([[1, 0]]), (8, 12), dynamic=True)
    assert (got.labels == 0).all() and got.scores.isfinite().all()


# -------------------------------------------------------------------------------------------------------- 04: losses

VOID = data.IGNORE_INDEX


def cross_entropy_slowly(logits, labels, wanted):
    values = []
    for b, y, x in np.ndindex(labels.shape):
        if wanted(int(labels[b, y, x])):
            z = logits[b, :, y, x].double()
            values.append(float(torch.logsumexp(z, 0) - z[labels[b, y, x]]))
    return sum(values) / len(values)


def test_the_segmentation_loss_weighs_background_and_foreground_alike():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, 4, (2, 3, 5), generator=torch.Generator().manual_seed(8))
    labels[0, 0, :2] = VOID
    expected = 0.5 * cross_entropy_slowly(logits, labels, lambda c: c == 0)
    expected += 0.5 * cross_entropy_slowly(logits, labels, lambda c: 0 < c < VOID)
    assert float(decoder.seg_loss(logits, labels)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("label", [0, 2, VOID])
def test_an_empty_half_counts_nothing_and_spoils_no_gradient(label):
    """In the released code the value is NaN there; a masked mean written carelessly has NaN gradients as well."""
    logits = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(7)).requires_grad_()
    labels = torch.full((1, 3, 5), label)
    loss = decoder.seg_loss(logits, labels)
    loss.backward()
    expected = 0 if label == VOID else F.cross_entropy(logits, labels).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert logits.grad.isfinite().all()


def test_affinity_labels_compare_the_top_left_pixels_of_patches():
    """2 x 3 patches of 4 x 4 pixels: only the corner pixel of each counts; void and far pairs are not asked."""
    labels = torch.full((1, 8, 12), 9)
    labels[0, ::4, ::4] = torch.tensor([[0, 1, 1], [1, VOID, 0]])
    target = decoder.affinity_label(labels, (2, 3), radius=1)[0]
    corner = [0, 1, 1, 1, VOID, 0]
    for i, j in np.ndindex(6, 6):
        near = abs(i // 3 - j // 3) <= 1 and abs(i % 3 - j % 3) <= 1
        asked = near and VOID not in (corner[i], corner[j])
        assert target[i, j] == (int(corner[i] == corner[j]) if asked else VOID), (i, j)


def test_the_affinity_loss_of_a_hand_made_case():
    """Positives 0.9 and 0.7 miss one by 0.1 and 0.3, the only negative is at 0.2; counts have one added."""
    learned = torch.tensor([[[0.9, 0.2], [0.4, 0.7]]])
    target = torch.tensor([[[1, 0], [VOID, 1]]])
    assert float(decoder.affinity_loss(learned, target)) == pytest.approx(0.5 * (0.1 + 0.3) / 3 + 0.5 * 0.2 / 2)
    assert float(decoder.affinity_loss(learned, torch.full_like(target, VOID))) == 0


def test_the_dice_loss_counts_absent_classes_and_void_pixels_in_the_union():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(8))  # class 3 is absent
    labels[1, 2] = VOID
    given = labels.clone()
    probs, total = logits.softmax(1), 0.0
    for c in range(4):
        inter = float(probs[:, c][labels == c].sum())
        union = float(probs[:, c].sum()) + int((labels == c).sum())
        total += 2 * inter / (union + 1e-7)
    assert float(decoder.dice_loss(logits, labels)) == pytest.approx(1 - total / 4, rel=1e-6)
    assert torch.equal(labels, given)


def test_confident_predictions_replace_labels():
    probs = torch.tensor([[0.8, 0.7, 0.1], [0.1, 0.2, 0.1], [0.1, 0.1, 0.8]])  # classes, pixels
    labels = torch.tensor([[[1, 1, 1]]])
    assert decoder.self_labels(labels, probs.log()[None, :, None], above=0.75).tolist() == [[[0, 1, 2]]]


PLUS_CFG = decoder.replace(decoder.CONFIGS["weclip+", "voc"], affinity_radius=2, self_label_after=10)


def plus_prediction():
    generator = torch.Generator().manual_seed(2)
    of_clip, of_dino = (torch.randn(2, 4, 2, 3, generator=generator).mul(4).requires_grad_() for _ in range(2))
    fused = torch.randn(2, 6, 2, 3, generator=generator)
    labels = torch.randint(0, 4, (2, 8, 12), generator=generator)
    prediction = decoder.Prediction((of_clip + of_dino) / 2, fused, (of_clip, of_dino))
    return prediction, decoder.learned_affinity(fused), labels


def to_pixels(x):
    return F.interpolate(x, size=(8, 12), mode="bilinear", align_corners=False)


def test_the_total_of_weclip_plus_is_the_released_sum():
    """seg + 0.1 aff + 0.1 (each branch against the other's argmax) + dice, all at pixels."""
    prediction, learned, labels = plus_prediction()
    logits, of_clip, of_dino = map(to_pixels, (prediction.logits, *prediction.branches))
    parts = decoder.losses(PLUS_CFG, prediction, learned, labels, step=10)
    close(parts["seg"], decoder.seg_loss(logits, labels))
    close(parts["mutual_clip"], decoder.seg_loss(of_clip, of_dino.argmax(1)))
    close(parts["mutual_dino"], decoder.seg_loss(of_dino, of_clip.argmax(1)))
    close(parts["dice"], decoder.dice_loss(logits, labels))
    close(parts["aff"], decoder.affinity_loss(learned, decoder.affinity_label(labels, (2, 3), 2)))
    tenths = parts["aff"] + parts["mutual_clip"] + parts["mutual_dino"]
    close(parts["total"], parts["seg"] + parts["dice"] + 0.1 * tenths)


def test_self_labels_start_after_their_step_and_leave_the_affinity_alone():
    prediction, learned, labels = plus_prediction()
    before, after = (decoder.losses(PLUS_CFG, prediction, learned, labels, step) for step in (10, 11))
    logits = to_pixels(prediction.logits)
    updated = decoder.self_labels(labels, logits, 0.75)
    assert not torch.equal(updated, labels)
    close(after["seg"], decoder.seg_loss(logits, updated))
    close(after["dice"], decoder.dice_loss(logits, updated))
    close(after["aff"], before["aff"])
    close(after["mutual_clip"], before["mutual_clip"])


def test_weclip_has_two_losses():
    prediction, learned, labels = plus_prediction()
    cfg = decoder.CONFIGS["weclip", "voc"]
    parts = decoder.losses(cfg, prediction._replace(branches=()), learned, labels, step=10**6)
    assert parts.keys() == {"seg", "aff", "total"}
    close(parts["total"], parts["seg"] + 0.1 * parts["aff"])


# -------------------------------------------------------------------------------------- 04: inference, 05: the schedule

@pytest.fixture(scope="module")
def world(tower, words):
    """Encoders and a trained part of toy size, for a picture of 40 pixels' long side."""
    dino = backbone.dino_from_state_dict(small_dino(), heads=2).eval().requires_grad_(False)
    encoders = backbone.Encoders(tower, dino, *words)
    cfg = decoder.replace(decoder.CONFIGS["weclip+", "voc"], long_side=40, depth=1, static_maps=3, dynamic_maps=3)
    return cfg, encoders, seeded(decoder.build_model(cfg, 6, encoders.clip, encoders.dino))


@pytest.fixture
def picture():
    return torch.randn(3, 27, 33, generator=torch.Generator().manual_seed(5))


def test_one_scale_without_mirror_is_a_plain_forward(world, picture):
    """The "single scale" of the released scores: long side to 40 here, the other truncated (27 * 40 / 33 is 32.7)."""
    cfg, encoders, model = world
    image = F.interpolate(picture[None], size=(32, 40), mode="bilinear", align_corners=False)
    seen = backbone.look(encoders, image)
    expected = model(seen.tokens, seen.grid, seen.dino_map).logits[0].detach()
    close(decoder.multi_scale_logits(cfg, encoders, model, picture, scales=(1,), flip=False), expected)


def test_scales_are_averaged_on_the_first_scales_grid(world, picture):
    cfg, encoders, model = world
    maps = []
    for size in ((32, 40), (48, 60)):  # 1.5 times 32 x 40 is whole, so that factor and size say the same
        image = F.interpolate(picture[None], size=(32, 40), mode="bilinear", align_corners=False)
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        for x in (image, image.flip(-1)):
            seen = backbone.look(encoders, x)
            logits = model(seen.tokens, seen.grid, seen.dino_map).logits.detach()
            logits = F.interpolate(logits, size=(4, 5), mode="bilinear", align_corners=False)
            maps.append(logits if x is image else logits.flip(-1))
    close(decoder.multi_scale_logits(cfg, encoders, model, picture), (sum(maps) / 4)[0])


def test_a_mirrored_picture_has_mirrored_logits(world, picture):
    cfg, encoders, model = world
    close(decoder.multi_scale_logits(cfg, encoders, model, picture.flip(-1)),
          decoder.multi_scale_logits(cfg, encoders, model, picture).flip(-1), 1e-4)


def test_the_second_scale_is_sampled_by_the_factor_itself(world, picture, monkeypatch):
    """0.77 * 40 = 30.8 pixels, of which 30 are made, each 1 / 0.77 apart: not the whole width stretched onto 30."""
    cfg, encoders, model = world
    inputs, look = [], backbone.look

    def record(encoders, images, *args, **kwargs):
        inputs.append(images)
        return look(encoders, images, *args, **kwargs)
    monkeypatch.setattr(backbone, "look", record)
    decoder.multi_scale_logits(cfg, encoders, model, picture, scales=(1, 0.77), flip=False)
    expected = resize_grid_slowly(inputs[0][0, 0], (24, 30), (0.77, 0.77), kernel=linear, support=1)
    assert inputs[1].shape[-2:] == (24, 30)
    close(inputs[1][0, 0], expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (200, 3)])
def test_pictures_smaller_than_a_patch_are_segmented_at_their_own_size(world, size):
    cfg, encoders, model = world
    logits = decoder.multi_scale_logits(cfg, encoders, model, torch.randn(3, *size), scales=(1, 0.5))
    assert logits.isfinite().all() and decoder.enlarged_labels(logits, size).shape == size


@pytest.mark.parametrize("size", [(37, 50), (4, 5), (2, 3), (1, 90)])
def test_labels_enlarged_class_by_class_are_those_of_all_classes_at_once(size):
    """Bit for bit, ties included: whole numbers leave many pixels with two best classes, and the first one wins."""
    logits = torch.randint(0, 3, (7, 4, 5), generator=torch.Generator().manual_seed(1)).float()
    logits[5] = logits[2]
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    labels = decoder.enlarged_labels(logits, size)
    assert labels.dtype == torch.long and torch.equal(labels, whole.argmax(dim=0))
    assert (whole == whole.amax(dim=0)).sum() > whole[0].numel() and len(labels.unique()) > 2


def test_labelling_images_is_all_stages_in_a_row(world):
    """One call of what 03 and 04 offer singly: the tokens of the row's block, its scale, boxes and probabilities."""
    cfg, encoders, model = world
    cfg = decoder.replace(cfg, box_fraction=0.4, logit_scale_divisor=4)  # cam_input is -2 in this row
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(3))
    seen, pairs = backbone.look(encoders, images, num_maps=3), cam.class_pairs(LABELS)
    prediction = model(seen.tokens, seen.grid, seen.dino_map)
    raw, _, last_map = cam.grad_cam(encoders.clip, seen.tokens[1], *encoders[2:], pairs, (4, 5),
                                    encoders.clip.logit_scale.exp() / 4)
    maps = torch.cat([seen.maps, last_map[:, None]], dim=1)
    expected = decoder.refine(cfg, images, cam.normalize_cams(raw), maps, decoder.learned_affinity(prediction.fused),
                              prediction.logits.softmax(dim=1), pairs, (20, 30), dynamic=True)
    cams, refined = decoder.label_images(cfg, encoders, images, seen, prediction, pairs, (20, 30), dynamic=True)
    close(cams, cam.normalize_cams(raw))
    for got, wanted in zip(refined, expected):
        close(got.float(), wanted.float())


@pytest.fixture
def maps_formed(monkeypatch):
    """One entry for each block of CLIP that 02 runs: was its attention map formed?"""
    formed, attend = [], backbone.attend

    def record(mha, x, with_map):
        formed.append(with_map)
        return attend(mha, x, with_map)
    monkeypatch.setattr(backbone, "attend", record)
    return formed


@pytest.mark.parametrize("step, expected", [(0, [False, True, True]), (5, [False, False, True])])
def test_a_step_forms_only_the_maps_that_it_reads(world, maps_formed, step, expected):
    """Of 4 blocks the last is in 03; before the switch 3 maps are read, afterwards 2, that block's own included."""
    cfg, encoders, model = world
    cfg = decoder.replace(cfg, static_maps=3, dynamic_maps=2, dynamic_from=5)
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(3))
    model = copy.deepcopy(model)
    train.train_step(cfg, encoders, model, train.make_optimizer(model, 0.0), images, LABELS.float(), step)
    assert maps_formed == expected


def test_inference_forms_no_map_and_no_cam_and_sees_image_and_mirror_at_once(world, picture, maps_formed, monkeypatch):
    cfg, encoders, model = world
    sizes, look = [], backbone.look
    monkeypatch.setattr(backbone, "look", lambda e, x, **k: sizes.append(len(x)) or look(e, x, **k))
    monkeypatch.delattr(cam, "grad_cam")
    monkeypatch.delattr(decoder, "par")
    decoder.multi_scale_logits(cfg, encoders, model, picture, scales=(1, 1.5))
    assert sizes == [2, 2] and maps_formed == [False] * 6


def test_the_loss_trains_every_parameter_of_the_trained_part_and_nothing_else(world):
    cfg, encoders, model = world
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(3))
    seen = backbone.look(encoders, images, decoder.maps_needed(cfg, dynamic=True))
    prediction = model(seen.tokens, seen.grid, seen.dino_map)
    cams, refined = decoder.label_images(cfg, encoders, images, seen, prediction, cam.class_pairs(LABELS), (32, 40),
                                         dynamic=True)
    losses = decoder.losses(cfg, prediction, decoder.learned_affinity(prediction.fused), refined.labels, step=0)
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in [*encoders.clip.parameters(), *encoders.dino.parameters()])
    assert cams.shape == (4, 4, 5) and not cams.requires_grad


def test_the_learning_rate_warms_up_for_50_steps_and_falls_to_zero():
    """t < 50: lr (1 - (1 - t / 50)(1 - 1e-6)); then lr (1 - t / T)."""
    rates = [train.learning_rate(t, 2e-3, 30_000) for t in (0, 25, 49, 50, 15_000, 29_999)]
    expected = [2e-9, 1.000001e-3, 1.96000004e-3, 2e-3 * (1 - 50 / 30_000), 1e-3, 2e-3 / 30_000]
    assert rates == pytest.approx(expected, rel=1e-9)
