"""Does each stage of 03 do what its docstring says? Each is held against something written in another way.

The oracles are closed forms, slow loops (the longer ones in slow.py) and torch's own modules. No file outside this folder
is read; the numbers of the authors' code are in test_parity.py.
"""
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import slow
from slow import close

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")


# -------------------------------------------------------------------------------------------------------- CAMs, boxes

@pytest.fixture(scope="module")
def last_tokens(tower):
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(7))  # 4 x 5 patches
    return backbone.look(tower, images).tokens[-1]


def test_every_image_gets_one_pair_per_class_it_shows(shown):
    assert cam.class_pairs(shown).tolist() == [[0, 1], [0, 3], [0, 4], [1, 0]]
    assert cam.class_pairs(torch.zeros(2, 5)).shape == (0, 2)


@pytest.mark.parametrize("pairs", [
    [[0, 1], [0, 3], [0, 4], [1, 0]],                  # as class_pairs gives them
    [[0, 4], [0, 1], [1, 3], [1, 0], [1, 4], [1, 2]],  # in no order within an image
    [[1, 0], [0, 3], [1, 2], [0, 1]]])                 # nor of the images
@pytest.mark.parametrize("scale", [None, 25.0])
def test_batched_cams_equal_one_backward_pass_per_class(tower, last_tokens, words, pairs, scale):
    """In the order of the pairs, whichever it is: released labels are in the order of their annotation."""
    cams, probs, _ = cam.grad_cam(tower, last_tokens, *words, torch.tensor(pairs), (4, 5), logit_scale=scale)
    for i, (image, target) in enumerate(pairs):
        classes = [c for b, c in pairs if b == image]
        expected, expected_probs = slow.one_cam_at_a_time(tower, last_tokens[image], *words, classes, target, (4, 5),
                                                          scale or tower.logit_scale.exp())
        close(cams[i], expected, 1e-4)  # CLIP's own scale makes the rounding of a cosine a hundred times larger
        close(probs[image][classes + [5, 6, 7]], expected_probs, 1e-4)
        assert (probs[image, sorted(set(range(5)) - set(classes))] == 0).all()  # what it does not show has no share


def test_the_last_attention_map_is_that_of_torchs_own_attention(tower, last_tokens, words, shown):
    _, _, last_map = cam.grad_cam(tower, last_tokens, *words, cam.class_pairs(shown), (4, 5))
    block = tower.visual.transformer.resblocks[-1]
    x = block.ln_1(last_tokens).transpose(0, 1)
    close(last_map, block.attn(x, x, x)[1])


def test_an_images_cams_do_not_depend_on_its_neighbours_in_the_batch(tower, last_tokens, words):
    """The n-th classes of all images share one way back: here both first ones, then both second ones."""
    pairs = torch.tensor([[0, 3], [0, 1], [1, 2], [1, 3]])
    together, probs, maps = cam.grad_cam(tower, last_tokens, *words, pairs, (4, 5), logit_scale=25)
    for image in range(2):
        mine = pairs[pairs[:, 0] == image] - torch.tensor([image, 0])
        alone = cam.grad_cam(tower, last_tokens[image:image + 1], *words, mine, (4, 5), logit_scale=25)
        for got, expected in zip((together[2 * image:2 * image + 2], probs[image:image + 1], maps[image:image + 1]), alone):
            close(got, expected, 1e-4)


def test_no_class_gives_no_cam(tower, last_tokens, words):
    cams, probs, _ = cam.grad_cam(tower, last_tokens, *words, torch.zeros(0, 2, dtype=torch.long), (4, 5))
    assert cams.shape == (0, 4, 5) and cam.normalize_cams(cams).shape == (0, 4, 5)
    close(probs.sum(1), torch.ones(2))


def test_nothing_of_clip_collects_a_gradient(tower, last_tokens, words, shown):
    """Frozen means frozen: the CAM's backward pass stops at ln_1's output."""
    cams, probs, last_map = cam.grad_cam(tower, last_tokens, *words, cam.class_pairs(shown), (4, 5))
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


# ------------------------------------------------------------------------------------------ affinity, spreading, PAR

def test_the_static_affinity_is_the_mean_of_the_last_maps_between_patches(attention):
    close(cam.static_affinity(attention, 3), ((attention[:, 2] + attention[:, 3] + attention[:, 4]) / 3)[:, 1:, 1:])


def test_the_dynamic_affinity_keeps_maps_by_the_released_signed_statistic(attention):
    """Literally: S_l = sum(learned - map_l); keep where S_l <= mean S; sum / (count + 1e-5); times learned; float64."""
    learned = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(5))
    affinity = cam.dynamic_affinity(attention, 4, learned)
    for b in range(2):
        candidates = attention[b, -4:, 1:, 1:].double()
        statistic = [float((learned[b].double() - m).sum()) for m in candidates]
        kept = [m for m, s in zip(candidates, statistic) if s <= sum(statistic) / 4]
        assert 0 < len(kept) < 4
        close(affinity[b].double(), sum(kept) / (len(kept) + 1e-5) * learned[b])


def test_the_transition_matrix_equals_slow_loops():
    """Columns then rows to sum one, three times; symmetrised; squared."""
    affinity = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(6))
    got = cam.transition_matrix(affinity)
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
    flow = cam.spread(transition, cams, pairs)
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
    close(cam.par(images, maps, iterations=3).double(), expected)


def test_par_stretches_the_image_onto_the_maps_with_corners_aligned():
    """A 2 x 2 picture becomes a bilinear ramp between its corners."""
    corners = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y, x = torch.linspace(0, 1, 9)[:, None], torch.linspace(0, 1, 12)
    (a, b), (c, d) = corners[0].permute(1, 2, 0)[..., None, None]  # each (3, 1, 1)
    ramp = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d)
    maps = torch.rand(1, 2, 9, 12, generator=torch.Generator().manual_seed(2))
    close(cam.par(corners, maps), cam.par(ramp[None], maps), 1e-4)


def test_par_adds_one_percent_per_iteration_to_a_constant_map():
    """The 48 weights of a pixel sum to 1.01: 1 from the colours, 0.01 from the positions."""
    images = torch.randn(1, 3, 9, 12, generator=torch.Generator().manual_seed(3))
    close(cam.par(images, torch.ones(1, 1, 9, 12)), torch.full((1, 1, 9, 12), 1.01 ** 20), 1e-4)


# -------------------------------------------------------------------------------------------------------------- labels

@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,), (2, 0)])
def test_maps_are_enlarged_each_by_itself_however_many_there_are(leading):
    maps = torch.randn(*leading, 3, 4, generator=torch.Generator().manual_seed(1))
    enlarged = cam.enlarge(maps, (7, 6))
    assert enlarged.shape == (*leading, 7, 6)
    for place in np.ndindex(leading):
        close(enlarged[place], slow.resize_grid(maps[place], (7, 6), (7 / 3, 6 / 4), kernel=slow.linear, support=1))


def test_scores_are_stacked_per_image_with_the_background_first():
    """Image 0 shows classes 4 and 2, image 1 none, image 2 class 0; background is what the best class leaves over."""
    refined = torch.tensor([[[0.2, 0.9]], [[0.5, 0.1]], [[0.7, 0.0]]])
    scores, ids = cam.stack_scores(refined, torch.tensor([[0, 4], [0, 2], [2, 0]]), batch=3)
    close(scores, torch.tensor([[[[0.5, 0.1]], [[0.2, 0.9]], [[0.5, 0.1]]],
                                [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]],
                                [[[0.3, 1.0]], [[0.7, 0.0]], [[0.0, 0.0]]]]))
    assert ids.tolist() == [[0, 5, 3], [0, 0, 0], [0, 1, 0]]
    scores[0, 0] -= 0.01  # away from the tie
    assert cam.best_label(scores, ids).tolist() == [[[3, 5]], [[0, 0]], [[1, 0]]]


def test_scores_without_any_class_are_background():
    scores, ids = cam.stack_scores(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.long), batch=2)
    assert scores.shape == (2, 1, 2, 3) and (cam.best_label(scores, ids) == 0).all()


@pytest.mark.parametrize("size", [(37, 50), (4, 5), (2, 3), (1, 90)])
def test_labels_enlarged_class_by_class_are_those_of_all_classes_at_once(size):
    """Bit for bit, ties included: whole numbers leave many pixels with two best classes, and the first one wins."""
    logits = torch.randint(0, 3, (7, 4, 5), generator=torch.Generator().manual_seed(1)).float()
    logits[5] = logits[2]
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    labels = cam.enlarged_labels(logits, size)
    assert labels.dtype == torch.long and torch.equal(labels, whole.argmax(dim=0))
    assert (whole == whole.amax(dim=0)).sum() > whole[0].numel() and len(labels.unique()) > 2


@pytest.mark.parametrize("long_side", [1024, 20])
def test_par_moves_the_border_of_a_prediction_to_the_edge_of_the_picture(long_side):
    """A black and a white half, a border that is three pixels off. A picture that is larger than `long_side` is refined at
    half its size, and its border is then a pixel off at the most."""
    image = torch.zeros(3, 30, 40)
    image[:, :, 20:] = 2
    logits = torch.zeros(5, 30, 40)
    logits[0, :, :23], logits[3, :, 23:], logits[1], logits[4] = 2, 2, -9, -9
    labels = cam.par_labels(image, logits, long_side)
    expected = torch.where(torch.arange(40) < 20, 0, 3).expand(30, 40)
    wrong = labels != expected
    assert labels.dtype == torch.long and (not wrong.any() if long_side == 1024 else not wrong[:, [*range(19), *range(21, 40)]].any())


# ---------------------------------------------------------------- scores

def test_confusion_matrix_counts_pixel_by_pixel():
    """The slow loop; void is not counted."""
    rng = np.random.default_rng(0)
    truth, guess = rng.choice([0, 1, 2, 3, 255], (2, 6, 7)), rng.integers(0, 4, (2, 6, 7))
    expected = np.zeros((4, 4), int)
    for t, g in zip(truth.ravel(), guess.ravel()):
        if t != 255:
            expected[t, g] += 1
    result = cam.confusion_matrix(torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(guess), 4)
    np.testing.assert_array_equal(result, expected)
    for wrong in (torch.full((2, 6, 7), 4), torch.zeros(2, 7, 6, dtype=torch.long)):
        with pytest.raises(ValueError, match="prediction"):
            cam.confusion_matrix(torch.from_numpy(truth), wrong, 4)


def test_scores_leave_out_classes_without_ground_truth():
    """By hand: class 0 has 3 of 5, class 1 has 2 of 4 of its union; class 2 is only ever predicted, class 3 nowhere."""
    result = cam.scores(torch.tensor([[3, 1, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert result["iou"][:3] == [3 / 5, 2 / 5, 0] and np.isnan(result["iou"][3])
    assert result["miou"] == (3 / 5 + 2 / 5) / 2 and result["pixel_accuracy"] == 5 / 8
    assert result["mean_accuracy"] == (3 / 4 + 2 / 4) / 2


def test_a_class_without_a_pixel_of_truth_is_named_beside_the_miou(capsys):
    """The mIoU is silent about it: said, or a mask that forgets a class scores well."""
    matrix = torch.tensor([[5, 0], [0, 0]])
    cam.print_scores({"x": cam.scores(matrix)}, data.with_prompts("own", ["fish"], []), "val")
    assert "no pixel of truth, left out of the mIoU: fish" in capsys.readouterr().out
