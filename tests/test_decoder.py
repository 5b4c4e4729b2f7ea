"""Does each part of 04 do what its docstring says? Each is held against something written in another way.

The oracles are closed forms, slow loops, torch's own modules, the stages of 03 and, for a batch shared by two processes, the
whole batch in one. No file outside this folder is read; the numbers of the authors' code are in test_parity.py.
"""
import copy
import math
from dataclasses import asdict, replace
from importlib import import_module

import clip
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import golden
import slow
from slow import close

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")

VOID = data.IGNORE_INDEX


def seeded(module):
    """A module with lively random weights, the same in every run."""
    module.load_state_dict({name: torch.from_numpy(golden.affine(name, golden.noise("test", name, value.shape, seed=0)))
                            for name, value in module.state_dict().items()})
    return module.eval()


# ------------------------------------------------------------------------------------------------ the rows of numbers

@pytest.mark.parametrize("method, dataset, expected", [
    # steps, images per step, lr, dynamic from, candidate maps, box fraction, blocks left out before the last one
    ("weclip", "voc", (30_000, 4, 2e-3, 9_145, 6, 0.4, 0)),
    ("weclip", "coco", (80_000, 4, 2e-3, 40_000, 10, 0.7, 0)),
    ("weclip+", "voc", (30_000, 4, 2e-4, 0, 6, None, 1)),
    ("weclip+", "coco", (80_000, 8, 2e-4, 0, 8, 0.7, 0)),
])
def test_the_rows_are_the_released_numbers(method, dataset, expected):
    """A number that slips here spoils a run of hours without any error. Effective values of the released scripts."""
    cfg = decoder.HERE_ARE[method].rows[dataset]
    assert expected == (cfg.max_iters, cfg.batch_size, cfg.lr, cfg.dynamic_from, cfg.dynamic_maps, cfg.box_fraction,
                        cfg.cam_skip)
    assert (cfg.static_maps, cfg.affinity_radius, cfg.logit_scale_divisor, cfg.depth) == (8, 8, 1, 3)
    assert (cfg.clip, cfg.crop_size, cfg.long_side, cfg.warmup, cfg.weight_decay) == ("ViT-B/16", 320, 512, 50, 0.01)
    assert (cfg.crf_gaussian, cfg.crf_bilateral) == ((3, 3), (64, 5, 4))
    if method == "weclip":
        assert (cfg.scales, cfg.fuse_blocks) == ((1, 0.75), None)
    else:
        assert (cfg.scales, cfg.fuse_blocks, cfg.dino) == ((1, 1.5), 1, "dinov2_vits14")
        assert (cfg.self_label_after, cfg.self_label_above) == (18_000 if dataset == "voc" else 40_000, 0.75)


def frozen_on_paper(clip_name, dino_name):
    """Backbones of the published sizes, without a single number in them."""
    of_clip, of_dino = golden.CLIP_LAYOUTS[clip_name], golden.DINO_LAYOUTS[dino_name]
    text = of_clip["text_width"]
    with torch.device("meta"):
        model = clip.model.CLIP(of_clip["embed"], of_clip["resolution"], of_clip["layers"], of_clip["width"],
                                of_clip["patch"], 77, 49_408, text, text // 64, of_clip["text_layers"])
        return {"clip": model, "dino": backbone.DINOv2(of_dino["width"], of_dino["layers"], of_dino["width"] // 64)}


@pytest.mark.parametrize("method, clip_name, dino_name, changes", [
    ("weclip", "ViT-B/16", "dinov2_vitl14", {}),
    ("weclip", "ViT-L/14", "dinov2_vits14", dict(static_maps=12, dynamic_maps=12)),
    ("weclip+", "ViT-B/16", "dinov2_vitb14", {}),
    ("weclip+", "ViT-L/14", "dinov2_vits14", dict(static_maps=12, dynamic_maps=12, logit_scale_divisor=4)),
    ("weclip+", "ViT-B/16", "dinov2_vitl14", dict(depth=5)),
    ("weclip+", "ViT-L/14", "dinov2_vitl14", dict(static_maps=12, dynamic_maps=12, logit_scale_divisor=4, depth=5)),
])
def test_larger_backbones_change_the_numbers_that_the_released_code_changes(method, clip_name, dino_name, changes):
    """ViT-L/14: 12 maps; WeCLIP+ divides CLIP's scale by 4 as well, and has 5 decoder blocks with DINOv2 ViT-L."""
    found = decoder.HERE_ARE[method]
    for row in (found.rows["voc"], found.rows["coco"]):
        assert found.suited(row, frozen_on_paper(clip_name, dino_name)) == replace(row, **changes)


@pytest.mark.parametrize("field, value, said", [
    ("lr", 0, "--lr 0: wanted a number above 0"),
    ("lr", math.nan, "--lr nan"),
    ("max_iters", -1, "--max-iters -1"),
    ("depth", 0, "--depth 0"),
    ("scales", (1.0, 0.0), "--scales 0.0"),
    ("scale_range", (0.5, math.inf), "--scale-range inf"),
    ("weight_decay", -0.1, "--weight-decay -0.1: wanted a number that is not negative"),
    ("crf_bilateral", (64, -5, 4), "--crf-bilateral -5"),
    ("dynamic_from", -1, "--dynamic-from -1"),
    ("box_fraction", math.nan, "--box-fraction nan"),
    ("self_label_above", -math.inf, "--self-label-above -inf"),
    ("crop_size", 8193, "--crop-size 8193: wanted a number above 0, at most 8192"), ("depth", 65, "--depth 65"),
    ("max_iters", 10**9 + 1, "--max-iters 1000000001"), ("long_side", "512", "--long-side '512': wanted int"),
    ("depth", True, "--depth True: wanted int"), ("depth", 3.0, "--depth 3.0"), ("lr", None, "--lr None: wanted float"),
    ("clip", 5, "--clip 5: wanted str"), ("box_fraction", "none", "--box-fraction 'none': wanted float | None"),
    ("scales", (), r"--scales \(\): wanted tuple"), ("scales", [1.0], r"--scales \[1.0\]"), ("scales", ("1",), "--scales"),
    ("crf_gaussian", (3,), r"--crf-gaussian \(3,\)"), ("scale_range", (2, 1), "--scale-range 2 1: wanted the smaller one first"),
])
def test_a_number_that_makes_no_sense_is_refused_by_the_name_of_its_option(field, value, said):
    with pytest.raises(data.DataError, match=said):
        replace(decoder.WeCLIPPlus.rows["voc"], **{field: value})


def test_none_and_zero_are_taken_where_they_mean_something():
    """No boxes, no self labels, all blocks; no warm-up, no weight decay, the trained part's word from the start."""
    nothing = dict(box_fraction=None, self_label_after=None, fuse_blocks=None, warmup=0, weight_decay=0, dynamic_from=0)
    cfg = replace(decoder.WeCLIPPlus.rows["coco"], **nothing)
    assert {name: getattr(cfg, name) for name in nothing} == nothing


def test_the_rows_of_all_methods_fit_their_own_types():
    """A field whose default is of another type than it says would be refused in its own checkpoint."""
    for name in (*decoder.HERE_ARE, "excel", "diclip", "weakclip"):
        for row in decoder.method_class(name).rows.values():
            assert type(row)(**asdict(row)) == row


# -------------------------------------------------------------------------------------------------- the trained parts

@pytest.mark.parametrize("method, dataset, dino_name, count", [
    ("weclip", "voc", "dinov2_vits14", 5_985_045),
    ("weclip", "coco", "dinov2_vits14", 6_000_465),
    ("weclip+", "voc", "dinov2_vits14", 2_933_269),
    ("weclip+", "voc", "dinov2_vitb14", 3_031_573),
    ("weclip+", "voc", "dinov2_vitl14", 4_676_629),
])
def test_the_trained_part_has_the_released_number_of_parameters(method, dataset, dino_name, count, monkeypatch):
    """Of the row, as it is suited to the backbones. These have sizes and no numbers: they read no words."""
    found, frozen = decoder.HERE_ARE[method], frozen_on_paper("ViT-B/16", dino_name)
    monkeypatch.setattr(found, "texts", lambda self: (None, None))
    made = found(found.suited(found.rows[dataset], frozen), data.DATASETS[dataset], frozen)
    assert sum(p.numel() for p in made.model.parameters()) == count


def test_the_trained_part_bears_the_released_names():
    """So that the authors' checkpoints of it load with strict=True."""
    with torch.device("meta"):
        plain, plus = decoder.Head(21), decoder.TwoBranches(21)
    for model, shapes in ((plain, golden.head_shapes(768, 21, 11)), (plus, golden.head_shapes(768, 21, 1, 384))):
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes


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
    model = seeded(decoder.Head(num_classes=4, clip_width=8, blocks=2, depth=1))
    prediction = model(backbone.Seen(tokens, None, (2, 3)))
    changed = [torch.full_like(tokens[0], 9.0), *(torch.cat([x[:, :1] + 5, x[:, 1:]], dim=1) for x in tokens[1:])]
    close(model(backbone.Seen(changed, None, (2, 3))).logits, prediction.logits)
    close(model.decoder(model.decoder_fts_fuse([x[:, 1:] for x in tokens[1:]], (2, 3))), prediction.logits)
    assert prediction.logits.shape == (2, 4, 2, 3) and prediction.fused.shape == (2, 256, 2, 3)


def test_weclip_plus_reads_both_encoders_with_one_decoder(tokens):
    model = seeded(decoder.TwoBranches(num_classes=4, clip_width=8, dino_width=5, depth=1))
    dino_map = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    logits, fused, of_clip, of_dino = model(decoder.SeenByBoth(tokens, None, (2, 3), dino_map))
    close(model.decoder(fused[:, :256]), of_clip)
    close(model.decoder(fused[:, 256:]), of_dino)
    close(logits, (of_clip + of_dino) / 2)
    on_dinos_grid = model.dino_decoder_fts_fuse([dino_map.flatten(2).mT], (4, 4))
    expected = [slow.resize_grid(x, (2, 3), (2 / 4, 3 / 4), kernel=slow.linear, support=1)
                for x in on_dinos_grid[0, :3].detach()]
    close(fused[0, 256:259].detach(), torch.stack(expected))


def test_the_affinity_sees_the_features_after_dropout(tokens):
    """Dropout takes out whole channels of the fused features; the learned affinity is made from what is left."""
    torch.manual_seed(0)
    model = decoder.Head(num_classes=4, clip_width=8, blocks=2, depth=1).train()
    fused = model(backbone.Seen(tokens, None, (2, 3))).fused
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


# ------------------------------------------------------------------------------------------------------------- losses

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
    assert float(decoder.seg_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [0, 2, VOID])
def test_an_empty_half_counts_nothing_and_spoils_no_gradient(label):
    """In the released code the value is NaN there; a masked mean written carelessly has NaN gradients as well."""
    logits = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(7)).requires_grad_()
    labels = torch.full((1, 3, 5), label)
    loss = decoder.seg_loss(logits, labels)
    loss.backward()
    expected = 0 if label == VOID else F.cross_entropy(logits, labels).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
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
    assert float(decoder.dice_loss(logits, labels)) == pytest.approx(1 - total / 4, rel=1e-5)
    assert torch.equal(labels, given)


def test_confident_predictions_replace_labels():
    probs = torch.tensor([[0.8, 0.7, 0.1], [0.1, 0.2, 0.1], [0.1, 0.1, 0.8]])  # classes, pixels
    labels = torch.tensor([[[1, 1, 1]]])
    assert decoder.self_labels(labels, probs.log()[None, :, None], above=0.75).tolist() == [[[0, 1, 2]]]


LOSSES = {  # of the logits (B, C, 4, 5) and the labels (B, 8, 10)
    "seg": lambda logits, labels: decoder.seg_loss(cam.enlarge(logits, (8, 10)), labels),
    "aff": lambda logits, labels: decoder.affinity_loss(decoder.learned_affinity(logits),
                                                        decoder.affinity_label(labels, (4, 5), radius=2)),
    "dice": lambda logits, labels: decoder.dice_loss(cam.enlarge(logits, (8, 10)), labels)}


def measured(network, features, labels):
    """{loss: (its value, its gradient by the weights of the network)}"""
    found = {}
    for name, loss in LOSSES.items():
        network.zero_grad(set_to_none=True)
        value = loss(network(features), labels)
        value.backward()
        found[name] = value.detach(), next(network.parameters()).grad
    return found


def measure_a_half(rank, network, features, labels, folder):
    """What each of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", 2), rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    shared = nn.parallel.DistributedDataParallel(network)
    torch.save(measured(shared, features[mine], labels[mine]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_losses_and_gradients_of_the_whole_batch(tmp_path):
    """Losses are ratios of sums over the whole batch, so sharing it among processes must not change a step.

    The halves differ: one has no foreground at all, and much void. Means taken per process would give other numbers.
    """
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(4, 6, 4, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (4, 8, 10), generator=generator)
    labels[2:] = 0
    labels[2:, :, :6] = VOID
    network = nn.Conv2d(6, 3, kernel_size=1, bias=False, dtype=torch.float64)
    nn.init.normal_(network.weight, generator=generator)
    torch.multiprocessing.spawn(measure_a_half, (network, features, labels, str(tmp_path)), nprocs=2)
    whole = measured(network, features, labels)
    halves = [measured(network, *half) for half in zip(features.split(2), labels.split(2))]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (value, gradient) in whole.items():
            close(found[name][0], value, 1e-12)
            close(found[name][1], gradient, 1e-12)
            assert abs(sum(half[name][0] for half in halves) / 2 - value) > 1e-3


# ------------------------------------------------------------------------------------- the methods: from image to loss

TOY = data.with_prompts("toy", ("ant", "bee", "cow", "dog", "elk"), ("ground", "sky", "water"))


@pytest.fixture(scope="module")
def methods(tower):
    """Both, with toy encoders and a trained part of random weights, for a picture of 40 pixels' long side."""
    dino = backbone.dino_from_state_dict(golden.dino_state_dict(golden.DINO_LAYOUTS["tiny"], seed=5))
    frozen = {"clip": tower, "dino": dino.eval().requires_grad_(False)}
    numbers = dict(long_side=40, depth=1, static_maps=3, dynamic_maps=3)
    made = {name: found(replace(found.rows["voc"], **numbers), TOY, frozen) for name, found in decoder.HERE_ARE.items()}
    for method in made.values():
        seeded(method.model)
    return made


@pytest.fixture(params=["weclip", "weclip+"])
def method(methods, request):
    return methods[request.param]


def with_numbers(method, **numbers):
    """The same method with another row; its trained part is shared."""
    other = copy.copy(method)
    other.cfg = replace(method.cfg, **numbers)
    return other


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(3))  # 4 x 5 patches


def test_a_method_reads_its_words_and_looks_with_its_encoders(method, images):
    """The words are the prompts of its data set. All maps that a stage reads but the last block's; none without labels."""
    close(method.text_fg, backbone.text_features(method.clip, TOY.prompts))
    close(method.text_bg, backbone.text_features(method.clip, TOY.background))
    expected = backbone.look(method.clip, images, num_maps=2)
    with_maps, without = method.look(images, for_labels=True), method.look(images, for_labels=False)
    for seen in (with_maps, without):
        close(torch.stack(seen.tokens), torch.stack(expected.tokens))
        assert seen.grid == (4, 5)
    close(with_maps.maps, expected.maps)
    assert without.maps.shape[1] == 0


def test_weclip_plus_sees_with_dino_too(methods, images):
    method = methods["weclip+"]
    close(method.look(images, for_labels=False).dino_map, backbone.dino_features(method.frozen["dino"], images))


@pytest.fixture
def maps_formed(monkeypatch):
    """One entry for each block of CLIP that 02 runs: was its attention map formed?"""
    formed, attend = [], backbone.attend

    def record(mha, x, with_map):
        formed.append(with_map)
        return attend(mha, x, with_map)
    monkeypatch.setattr(backbone, "attend", record)
    return formed


@pytest.mark.parametrize("static, dynamic, masks, expected", [
    (3, 2, None, [False, True, True, True]),    # of 4 blocks the last is in 03, which always wants its map
    (2, 2, None, [False, False, True, True]),
    (1, 4, None, [True, True, True, True]),
    (3, 2, torch.ones(2, 32, 40, dtype=torch.long), [False, False, False])])
def test_a_step_forms_only_the_maps_that_its_labels_are_read_from(method, images, shown, maps_formed, static, dynamic, masks,
                                                                  expected):
    method = with_numbers(method, static_maps=static, dynamic_maps=dynamic)
    method.model = method.network = copy.deepcopy(method.model)
    train.train_step(method, train.make_optimizer(method.model, 0.0), images, shown, step=0, masks=masks)
    assert maps_formed == expected


@pytest.mark.parametrize("skip", [0, 1])
def test_cams_are_made_from_the_rows_block_at_the_rows_scale(method, images, shown, skip):
    method, pairs = with_numbers(method, cam_skip=skip, logit_scale_divisor=4), cam.class_pairs(shown)
    seen = method.look(images, for_labels=True)
    raw, _, last = cam.grad_cam(method.clip, seen.tokens[2 - skip], method.text_fg, method.text_bg, pairs, (4, 5),
                                logit_scale=25)  # CLIP's own is 100
    cams, maps = method.cams(seen, None, pairs)
    close(cams, cam.normalize_cams(raw), 1e-4)
    close(maps, torch.cat([seen.maps, last[:, None]], dim=1))


def made_up_prediction(dtype=torch.float32):
    """Of WeCLIP+, for 2 images, 6 classes with background, 2 x 3 patches."""
    generator = torch.Generator().manual_seed(2)
    of_clip, of_dino = (torch.randn(2, 6, 2, 3, dtype=dtype, generator=generator).mul(4) for _ in range(2))
    fused = torch.randn(2, 8, 2, 3, dtype=dtype, generator=generator)
    return decoder.PredictionOfBoth((of_clip + of_dino) / 2, fused, of_clip, of_dino)


def test_the_trained_part_has_a_say_from_its_step_on_and_when_pictures_are_scored(method, attention):
    """Until `dynamic_from`, and where nothing is learned at all, CLIP alone says which patches belong together."""
    method, prediction = with_numbers(method, static_maps=3, dynamic_maps=4, dynamic_from=10), made_up_prediction()
    static = cam.static_affinity(attention, 3)
    dynamic = cam.dynamic_affinity(attention, 4, decoder.learned_affinity(prediction.fused))
    for step, has_a_say in ((0, False), (9, False), (10, True), (None, True)):
        close(method.affinity(attention, prediction, step), dynamic if has_a_say else static)
        close(method.affinity(attention, None, step), static)


PAIRS = torch.tensor([[0, 1], [0, 2], [1, 0]])
CAMS = torch.tensor([[[0.9, 0.9, 0.2], [0.1, 0.0, 0.0]],
                     [[0.3, 0.2, 0.9], [0.0, 0.1, 0.5]],
                     [[0.5, 0.0, 0.0], [0.9, 0.8, 0.1]]])


def refining(method, cams, attention, **numbers):
    """The method with other numbers, and with these CAMs and attention maps whatever it sees."""
    method = with_numbers(method, static_maps=3, dynamic_maps=4, **numbers)
    method.cams = lambda seen, prediction, pairs, step=None: (cams, attention)
    return method


def test_boxes_cut_columns_and_come_from_the_cam_before_the_probability(methods, images, attention):
    """Released: R * mask over columns, times (CAM * P_c), the mask made from the plain CAM."""
    prediction = made_up_prediction()
    prediction.logits[0, 2] = torch.tensor([[-9.0, 9.0, 9.0], [9.0, 9.0, 9.0]])  # boxes of the product would be others
    probs = prediction.logits.softmax(dim=1)
    transition = cam.transition_matrix(cam.dynamic_affinity(attention, 4, decoder.learned_affinity(prediction.fused)))
    masks = slow.boxes_by_flood_fill(CAMS, 0.7)
    assert masks[0].tolist() == [[True, True, False], [False, False, False]]
    assert not torch.equal(masks[:1], slow.boxes_by_flood_fill(CAMS[:1] * probs[0, 2], 0.7))
    for name, weigh in (("weclip", False), ("weclip+", True)):
        method = refining(methods[name], CAMS, attention, box_fraction=0.7)
        found = method.pseudo_labels(images, PAIRS, None, prediction, (8, 12))
        for p, (image, c) in enumerate(PAIRS.tolist()):
            matrix = transition[image] * masks[p].flatten()[None, :]
            close(found.flow[p].flatten(), matrix @ (CAMS[p] * (probs[image, c + 1] if weigh else 1)).flatten())


@pytest.mark.parametrize("step", [None, 0, 29_999])
@pytest.mark.parametrize("fraction", [None, 0.7])
def test_without_a_prediction_labels_are_those_of_clip_alone(method, images, attention, step, fraction):
    """Static affinity, and no probability weighs the CAM: what an untrained decoder would say is noise."""
    found = refining(method, CAMS, attention, box_fraction=fraction).pseudo_labels(images, PAIRS, None, None, (8, 12), step)
    transition = cam.transition_matrix(cam.static_affinity(attention, 3))
    close(found.transition, transition)
    boxed = CAMS if fraction is None else CAMS * slow.boxes_by_flood_fill(CAMS, fraction)
    for p, (image, _) in enumerate(PAIRS.tolist()):
        close(found.flow[p].flatten(), transition[image] @ boxed[p].flatten())


@pytest.mark.parametrize("step", [0, None])
def test_the_pseudo_label_knows_only_the_classes_of_its_image(method, images, attention, step):
    found = refining(method, CAMS, attention).pseudo_labels(images, PAIRS, None, made_up_prediction(), (13, 20), step)
    assert found.labels.shape == (2, 13, 20) and found.labels.dtype == torch.long
    assert set(found.labels[0].unique().tolist()) <= {0, 2, 3} and set(found.labels[1].unique().tolist()) <= {0, 1}
    assert len(found.labels[0].unique()) > 1
    assert found.maps.shape == (3, 13, 20) and found.maps.amax() < 1 and found.maps.amin() >= 0


def test_a_cam_without_activation_gives_background_and_no_nan(method, images, attention):
    method, pairs = refining(method, torch.zeros(1, 2, 3), attention), torch.tensor([[1, 0]])
    found = method.pseudo_labels(images, pairs, None, made_up_prediction(), (8, 12))
    assert (found.labels == 0).all() and found.scores.isfinite().all()


def test_pseudo_labels_are_all_stages_in_a_row(method, images, shown):
    """One call of what 03 offers singly: the tokens of the row's block, its scale, boxes and, in WeCLIP+, probabilities."""
    method, pairs = with_numbers(method, box_fraction=0.4, logit_scale_divisor=4), cam.class_pairs(shown)
    seen = method.look(images, for_labels=True)
    prediction = method.model(seen)
    cams, maps = method.cams(seen, prediction, pairs)
    transition = cam.transition_matrix(cam.dynamic_affinity(maps, 3, decoder.learned_affinity(prediction.fused)))
    probs = prediction.logits.softmax(dim=1)
    weights = torch.stack([probs[image, c + 1] for image, c in pairs.tolist()]) if hasattr(prediction, "of_dino") else 1
    flow = cam.spread(transition, cams * cam.box_masks(cams, 0.4) * weights, pairs)
    refined = cam.enlarge(cam.min_max(flow), (20, 30))
    scores, ids = cam.stack_scores(refined, pairs, batch=2)
    found = method.pseudo_labels(images, pairs, seen, prediction, (20, 30))
    for got, expected in zip(found[:5], (cams, transition, flow, refined, cam.par(images, scores)), strict=True):
        close(got, expected)
    assert torch.equal(found.labels, cam.best_label(found.scores, ids))
    assert not any(x.requires_grad for x in found) and prediction.logits.requires_grad


def a_prediction_to_judge():
    """Leaves with gradients and labels (2, 8, 12); float64, since arg-max and threshold are followed by comparisons."""
    prediction = made_up_prediction(torch.float64)
    labels = torch.randint(0, 6, (2, 8, 12), generator=torch.Generator().manual_seed(3))
    return decoder.PredictionOfBoth(*(x.requires_grad_() for x in prediction)), labels


def to_pixels(x):
    return F.interpolate(x, size=(8, 12), mode="bilinear", align_corners=False)


def test_the_total_of_weclip_plus_is_the_released_sum(methods):
    """seg + 0.1 aff + 0.1 (each branch against the other's argmax) + dice, all at pixels."""
    prediction, labels = a_prediction_to_judge()
    logits, of_clip, of_dino = map(to_pixels, (prediction.logits, prediction.of_clip, prediction.of_dino))
    parts = with_numbers(methods["weclip+"], affinity_radius=1).losses(prediction, labels, step=10)
    assert list(parts) == ["seg", "aff", "mutual_clip", "mutual_dino", "dice", "total"]
    close(parts["seg"], decoder.seg_loss(logits, labels))
    close(parts["mutual_clip"], decoder.seg_loss(of_clip, of_dino.argmax(1)))
    close(parts["mutual_dino"], decoder.seg_loss(of_dino, of_clip.argmax(1)))
    close(parts["dice"], decoder.dice_loss(logits, labels))
    learned = decoder.learned_affinity(prediction.fused)
    close(parts["aff"], decoder.affinity_loss(learned, decoder.affinity_label(labels, (2, 3), radius=1)))
    tenths = parts["aff"] + parts["mutual_clip"] + parts["mutual_dino"]
    close(parts["total"], parts["seg"] + parts["dice"] + 0.1 * tenths)


def test_self_labels_start_after_their_step_and_leave_the_affinity_alone(methods):
    prediction, labels = a_prediction_to_judge()
    method = with_numbers(methods["weclip+"], self_label_after=10, self_label_above=0.75)
    before, after = (method.losses(prediction, labels, step) for step in (10, 11))
    logits = to_pixels(prediction.logits)
    updated = decoder.self_labels(labels, logits, 0.75)
    assert not torch.equal(updated, labels)
    close(before["seg"], decoder.seg_loss(logits, labels))
    close(after["seg"], decoder.seg_loss(logits, updated))
    close(after["dice"], decoder.dice_loss(logits, updated))
    for untouched in ("aff", "mutual_clip", "mutual_dino"):
        close(after[untouched], before[untouched])
    never = with_numbers(method, self_label_after=None).losses(prediction, labels, step=10**6)
    close(never["total"], before["total"])


def test_weclip_has_two_losses(methods):
    prediction, labels = a_prediction_to_judge()
    method = with_numbers(methods["weclip"], affinity_radius=1)
    parts = method.losses(decoder.Prediction(prediction.logits, prediction.fused), labels, step=10**6)
    assert list(parts) == ["seg", "aff", "total"]
    close(parts["seg"], decoder.seg_loss(to_pixels(prediction.logits), labels))
    learned = decoder.learned_affinity(prediction.fused)
    close(parts["aff"], decoder.affinity_loss(learned, decoder.affinity_label(labels, (2, 3), radius=1)))
    close(parts["total"], parts["seg"] + 0.1 * parts["aff"])


def test_the_loss_trains_every_parameter_of_the_trained_part_and_nothing_else(method, images, shown):
    model = method.model
    seen = method.look(images, for_labels=True)
    prediction = model(seen)
    found = method.pseudo_labels(images, cam.class_pairs(shown), seen, prediction, (32, 40), step=0)
    method.losses(prediction, found.labels, step=0)["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for frozen in method.frozen.values() for p in frozen.parameters())
    model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------------- inference

@pytest.fixture
def picture():
    return torch.randn(3, 27, 33, generator=torch.Generator().manual_seed(5))


def test_one_scale_without_mirror_is_a_plain_forward(method, picture):
    """The "single scale" of the released scores: long side to 40 here, the other truncated (27 * 40 / 33 is 32.7)."""
    image = F.interpolate(picture[None], size=(32, 40), mode="bilinear", align_corners=False)
    close(method.network_image(picture), image)
    expected = method.model(method.look(image, for_labels=False)).logits[0].detach()
    close(method.logits(picture, scales=(1,), flip=False), expected)


def test_scales_are_averaged_on_the_first_scales_grid(method, picture):
    """Those of the row, 1 and 0.75 or 1.5: times 32 x 40 they are whole, so that factor and size say the same."""
    first, maps = F.interpolate(picture[None], size=(32, 40), mode="bilinear", align_corners=False), []
    for scale in method.cfg.scales:
        image = F.interpolate(first, size=(int(32 * scale), int(40 * scale)), mode="bilinear", align_corners=False)
        for x in (image, image.flip(-1)):
            logits = method.model(method.look(x, for_labels=False)).logits.detach()
            logits = F.interpolate(logits, size=(4, 5), mode="bilinear", align_corners=False)
            maps.append(logits if x is image else logits.flip(-1))
    assert len(maps) == 4
    close(method.logits(picture), (sum(maps) / 4)[0])


def test_a_mirrored_picture_has_mirrored_logits(method, picture):
    close(method.logits(picture.flip(-1)), method.logits(picture).flip(-1), 1e-4)


def test_the_second_scale_is_sampled_by_the_factor_itself(method, picture):
    """0.77 * 40 = 30.8 pixels, of which 30 are made, each 1 / 0.77 apart: not the whole width stretched onto 30."""
    first, second = method.network_image(picture), method.network_image(picture, 0.77)
    assert second.shape == (1, 3, 24, 30)
    close(second[0, 0], slow.resize_grid(first[0, 0], (24, 30), (0.77, 0.77), kernel=slow.linear, support=1))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (200, 3)])
def test_pictures_smaller_than_a_patch_are_segmented_at_their_own_size(method, size):
    logits = method.logits(torch.randn(3, *size, generator=torch.Generator().manual_seed(1)), scales=(1, 0.5))
    assert logits.isfinite().all() and cam.enlarged_labels(logits, size).shape == size


def test_inference_forms_no_map_and_no_cam_and_sees_image_and_mirror_at_once(method, picture, maps_formed, monkeypatch):
    sizes, look = [], backbone.look
    monkeypatch.setattr(backbone, "look", lambda model, x, *more: sizes.append(tuple(x.shape)) or look(model, x, *more))
    monkeypatch.delattr(cam, "grad_cam")
    monkeypatch.delattr(cam, "par")
    method.logits(picture, scales=(1, 1.5))
    assert sizes == [(2, 3, 32, 40), (2, 3, 48, 60)] and maps_formed == [False] * 6


def test_the_ladder_has_a_label_map_for_each_stage(method, picture):
    """One map per class, and a background of 1 - the best of them: the best class wins where it is above a half."""
    ids = torch.tensor([2, 4])
    found = method.ladder(picture, F.one_hot(ids, 5).sum(dim=0))
    assert list(found.labels) == ["CAM", "refined", "pseudo label", "segmentation"]
    assert list(found.maps) == ["CAM", "refined"]
    pairs = torch.tensor([(0, 2), (0, 4)])
    cams, _ = method.cams(method.look(method.network_image(picture), for_labels=True), None, pairs)
    close(found.maps["CAM"], F.interpolate(cams[None], size=(27, 33), mode="bilinear", align_corners=False)[0])
    assert all(labels.shape == (27, 33) and labels.dtype == torch.long for labels in found.labels.values())
    for rung, maps in found.maps.items():
        best, which = maps.max(dim=0)
        assert maps.shape == (2, 27, 33)
        assert torch.equal(found.labels[rung], (1 + ids[which]).where(best > 0.5, 0))
        assert len(found.labels[rung].unique()) > 1
    assert set(found.labels["pseudo label"].unique().tolist()) <= {0, 3, 5}
    logits = method.logits(picture, scales=(1,), flip=False)
    large = F.interpolate(logits[None], size=(27, 33), mode="bilinear", align_corners=False)[0]
    assert (found.labels["segmentation"] == large.argmax(dim=0)).float().mean() > 0.99


def test_the_ladder_of_a_picture_without_any_class_is_background_but_for_the_segmentation(method, picture):
    found = method.ladder(picture, torch.zeros(5))
    assert all((found.labels[rung] == 0).all() for rung in method.rungs)
    assert found.labels["segmentation"].shape == (27, 33) and found.maps["CAM"].shape == (0, 27, 33)
