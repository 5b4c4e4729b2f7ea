"""Does the toy world mean something? The shipped encoders on pictures that they have not seen, drawn with another seed."""
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")

INFO = data.DATASETS["shapes"]


@pytest.fixture(scope="module")
def scenes():
    """Forty pictures (H, W, 3) and masks (H, W) of a seed that neither the data set nor the encoders have."""
    return [data.scene(12_345, i) for i in range(40)]


def test_the_shipped_files_are_in_the_official_layouts():
    """OpenAI's build_model and Meta's keys: the code that reads them is the code that reads the real ones."""
    encoders = backbone.load_encoders("shapes", "shapes", INFO)
    assert type(encoders.clip) is backbone.clip.model.CLIP and encoders.clip.vocab_size == 49_408
    assert {"cls_token", "mask_token", "blocks.0.ls1.gamma"} <= encoders.dino.state_dict().keys()
    assert all((backbone.SHAPES_DIR / name).stat().st_size < 4_000_000 for name in ("clip.pt", "dino.pth"))


def test_each_refinement_lifts_the_cams(scenes):
    """raw CAM < affinity < PAR, and at least five points from the first to the last: mIoU with the image-level labels."""
    encoders = backbone.load_encoders("shapes", None, INFO)
    cfg = decoder.config_for("weclip", "shapes", encoders.clip, None)
    model = decoder.build_model(cfg, INFO.num_classes, encoders.clip, None).eval()  # untrained: the static affinity needs none
    matrices = dict.fromkeys(("raw", "refined", "label"), 0)
    for image, mask in scenes:
        pixels = data.normalize(image)[None]
        pairs = torch.tensor([(0, c) for c in data.mask_labels(mask)])
        seen = backbone.look(encoders, pixels, decoder.maps_needed(cfg, dynamic=False))
        with torch.no_grad():
            prediction = model(seen.tokens, seen.grid)
        cams, refined = decoder.label_images(cfg, encoders, pixels, seen, prediction, pairs, mask.shape, dynamic=False)
        upsampled = F.interpolate(cams[:, None], size=mask.shape, mode="bilinear", align_corners=False)[:, 0]
        labels = {"raw": decoder.best_label(*decoder.stack_scores(upsampled, pairs, 1)),
                  "refined": decoder.best_label(*decoder.stack_scores(refined.maps, pairs, 1)), "label": refined.labels}
        for rung, label in labels.items():
            matrices[rung] = matrices[rung] + data.confusion_matrix(torch.from_numpy(mask), label[0], INFO.num_classes)
    miou = {rung: 100 * data.scores(matrix)["miou"] for rung, matrix in matrices.items()}
    assert miou["raw"] < miou["refined"] < miou["label"] and miou["label"] - miou["raw"] >= 5, miou


def test_colour_alone_does_not_tell_the_classes(scenes):
    """The most frequent class of each of 512 colours, learned from true masks, is little better than background everywhere."""
    def bins(image):
        return (image.astype(int) // 32 @ [64, 8, 1]).ravel()

    counts = np.zeros((512, INFO.num_classes))
    for i in range(200):
        image, mask = data.scene(54_321, i)
        np.add.at(counts, (bins(image), mask.ravel()), 1)
    matrix = sum(data.confusion_matrix(torch.from_numpy(mask.ravel()), torch.from_numpy(counts.argmax(1)[bins(image)]),
                                       INFO.num_classes) for image, mask in scenes)
    assert data.scores(matrix)["miou"] < 0.15


@pytest.mark.parametrize(("module", "kind"), [(backbone, "look"), (cam, "cam"), (decoder, "ladder")])
def test_run_alone_each_file_leaves_a_picture(tmp_path, monkeypatch, capsys, module, kind):
    """Without arguments of one's own: a picture of `shapes`; with a photo and words: that one, whatever its size and mode."""
    data.make_shapes(tmp_path / "shapes", n_train=1, n_val=2)
    monkeypatch.setattr(data, "find_root", lambda *_: tmp_path / "shapes")
    assert module.main(["--out", str(tmp_path)]) == 0
    Image.fromarray(scene_of_one_figure()).convert("L").resize((150, 97)).save(tmp_path / "my photo ü.png")
    words = [] if module is backbone else ["--classes", "cat", "sofa"]
    toys = ["--clip", "shapes"] + ([] if module is cam else ["--dino", "shapes"])
    photo = [str(tmp_path / "my photo ü.png"), *words, *toys]
    assert module.main(photo) == module.main([*photo, "--output-dir", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    made = [*tmp_path.glob(f"*_{kind}.png"), *(tmp_path / folder / f"my photo ü_{kind}.png" for folder in ("predictions", "new/folder"))]
    assert len(made) == 3
    for picture in made:
        assert np.asarray(Image.open(picture)).std() > 20 and str(picture) in printed


def test_cams_come_in_the_order_in_which_the_words_were_given():
    """The captions of the picture rely on it."""
    encoders = backbone.load_encoders("shapes", None, INFO)
    image, (cat, fish) = scene_of_one_figure(), map(INFO.classes.index, ("cat", "fish"))
    one, other = (cam.cams_of_picture(encoders, image, ids, 96) for ids in ([cat, fish], [fish, cat]))
    for a, b in zip(one, other):
        np.testing.assert_allclose(a, b[::-1], atol=1e-5)
    assert one[1][0] > 0.9 > other[1][0]  # the picture shows a cat


def test_a_look_at_a_single_patch(tmp_path):
    """The smallest picture there is has no axes of colour, but a picture all the same."""
    Image.new("RGB", (3, 3), "red").save(tmp_path / "dot.png")
    assert backbone.main([str(tmp_path / "dot.png"), "--clip", "shapes", "--dino", "shapes", "--long-side", "8"]) == 0


def test_cams_of_a_folder_survive_a_bad_file(tmp_path, capsys):
    """The good pictures are drawn, the bad one is named, and the exit status says so."""
    Image.fromarray(scene_of_one_figure()).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert cam.main([str(tmp_path), "--classes", "cat", "--clip", "shapes"]) == 1
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["good_cam.png"]
    assert "bad.jpg: cannot be read" in capsys.readouterr().err


def scene_of_one_figure() -> np.ndarray:
    rng = np.random.default_rng(0)
    image = data.draw_background(rng, 96, "sand")
    data.paint_figure(rng, image, data.FIGURES["cat"], np.array((48., 48.)), 40, "cat")
    return image.round().astype(np.uint8)


def test_a_glow_is_brightest_where_it_is_hottest():
    image, heat = np.full((6, 8, 3), 100, np.uint8), torch.zeros(3, 4)
    heat[1, 2] = 7
    shown = backbone.glow(image, heat)
    assert (shown[2:4, 4:6] == [255, 220, 60]).all()
    shown[2:4, 4:6] = 35
    assert (shown == 35).all()


def test_what_looks_alike_has_one_colour():
    """Three kinds of patches, told apart by three axes of the features: equal features equal colours, others others."""
    kinds = torch.tensor([[0, 0, 1, 2], [3, 1, 2, 3]])
    colours = backbone.principal_colours(F.one_hot(kinds, 4).float().permute(2, 0, 1))
    assert colours.shape == (2, 4, 3) and colours.dtype == np.uint8
    by_kind = [{tuple(c) for c in colours[(kinds == kind).numpy()].tolist()} for kind in range(4)]
    assert all(len(found) == 1 for found in by_kind) and len(set.union(*by_kind)) == 4


def test_a_patch_outside_is_refused(capsys):
    with pytest.raises(data.DataError, match="--patch 12 0 is outside; the picture has 12 x 12"):
        backbone.main(["--patch", "12", "0"])
