"""Does the toy world mean something? The shipped encoders on pictures that they have not seen, drawn with another seed."""
import re
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
draw = import_module("shapes.draw")

INFO = data.DATASETS["shapes"]


@pytest.fixture(scope="module")
def scenes():
    """Forty pictures (H, W, 3) and masks (H, W) of a seed that neither the data set nor the encoders have."""
    return [draw.scene(12_345, i) for i in range(40)]


def test_the_shipped_files_are_in_the_official_layouts():
    """OpenAI's build_model and Meta's keys: the code that reads them is the code that reads the real ones."""
    model, dino = backbone.load_clip("shapes"), backbone.load_dino("shapes")
    assert type(model) is backbone.clip.model.CLIP and model.vocab_size == 49_408
    assert {"cls_token", "mask_token", "blocks.0.ls1.gamma"} <= dino.state_dict().keys()
    assert all((backbone.SHAPES_DIR / name).stat().st_size < 4_000_000 for name in ("clip.pt", "dino.pth"))


def test_each_refinement_lifts_the_cams(scenes):
    """raw CAM < affinity < PAR, and at least five points from the first to the last: mIoU with the image-level labels."""
    method, matrices = decoder.new_method("weclip", INFO, {}, "cpu"), {}
    for image, mask in scenes:
        images = method.network_image(data.normalize(image))
        pairs = torch.tensor([(0, c) for c in data.mask_labels(mask)])
        found = method.pseudo_labels(images, pairs, method.look(images, for_labels=True), None, mask.shape)
        maps = {"raw": cam.enlarge(found.cams, mask.shape), "refined": found.maps}
        labels = {rung: cam.best_label(*cam.stack_scores(x, pairs, 1)) for rung, x in maps.items()} | {"label": found.labels}
        for rung, label in labels.items():
            matrix = cam.confusion_matrix(torch.from_numpy(mask), label[0], INFO.num_classes)
            matrices[rung] = matrices.get(rung, 0) + matrix
    miou = {rung: 100 * cam.scores(matrix)["miou"] for rung, matrix in matrices.items()}
    assert miou["raw"] < miou["refined"] < miou["label"] and miou["label"] - miou["raw"] >= 5, miou


def test_colour_alone_does_not_tell_the_classes(scenes):
    """The most frequent class of each of 512 colours, learned from true masks, is little better than background everywhere."""
    def bins(image):
        return (image.astype(int) // 32 @ [64, 8, 1]).ravel()

    counts = np.zeros((512, INFO.num_classes))
    for i in range(200):
        image, mask = draw.scene(54_321, i)
        np.add.at(counts, (bins(image), mask.ravel()), 1)
    matrix = sum(cam.confusion_matrix(torch.from_numpy(mask.ravel()), torch.from_numpy(counts.argmax(1)[bins(image)]),
                                       INFO.num_classes) for image, mask in scenes)
    assert cam.scores(matrix)["miou"] < 0.15


@pytest.mark.parametrize(("module", "kind"), [(backbone, "look"), (cam, "cam")])
def test_run_alone_the_file_leaves_a_picture(tmp_path, monkeypatch, capsys, module, kind):
    """Without arguments of one's own: a picture of `shapes`; with a photo and words: that one, whatever its size and mode."""
    draw.make_shapes(tmp_path / "shapes", data.save_mask, n_train=1, n_val=2)
    monkeypatch.setattr(data, "find_root", lambda *_: tmp_path / "shapes")
    assert module.main(["--out", str(tmp_path)]) == 0
    Image.fromarray(scene_of_one_figure()).convert("L").resize((150, 97)).save(tmp_path / "my photo ü.png")
    photo = [str(tmp_path / "my photo ü.png"), "--classes", "cat", "sofa", "--clip", "shapes", "--dino", "shapes"]
    assert module.main(photo) == module.main([*photo, "--output-dir", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    made = [*tmp_path.glob(f"*_{kind}.png"), *(tmp_path / folder / f"my photo ü_{kind}.png" for folder in ("predictions", "new/folder"))]
    assert len(made) == 3
    for picture in made:
        assert np.asarray(Image.open(picture)).std() > 20 and str(picture) in printed


@pytest.mark.parametrize("name", decoder.HERE_ARE)
def test_run_alone_04_prints_the_shape_of_every_stage(tmp_path, monkeypatch, capsys, name):
    """From the image to the losses; a third picture there is not."""
    draw.make_shapes(tmp_path / "shapes", data.save_mask, n_train=1, n_val=2)
    monkeypatch.setattr(data, "find_root", lambda *_: tmp_path / "shapes")
    assert decoder.main(["--method", name, "--index", "1"]) == 0
    printed = capsys.readouterr().out
    for line in ("image                (1, 3, 112, 112)", "fused ", "transition           (1, 196, 196)",
                 "labels               (1, 96, 96)", "losses of the untrained decoder: seg "):
        assert line in printed
    with pytest.raises(data.DataError, match="--index 2: the validation split has pictures 0 to 1"):
        decoder.main(["--method", name, "--index", "2"])


def test_cams_come_in_the_order_in_which_the_words_were_given(tmp_path, capsys):
    """The captions rely on it, and a word that is not in the picture is the less probable one."""
    Image.fromarray(scene_of_one_figure()).save(tmp_path / "a.png")
    found = []
    for words in (["cat", "fish"], ["fish", "cat"]):
        assert cam.main([str(tmp_path / "a.png"), "--classes", *words, "--clip", "shapes"]) == 0
        found.append(re.search(r"(\w+) (\d+) %, (\w+) (\d+) %", capsys.readouterr().out).groups())
    assert found[0] == found[1][2:] + found[1][:2] and int(found[0][1]) > int(found[0][3])


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
    image = draw.draw_background(rng, 96, "sand")
    draw.paint_figure(rng, image, draw.FIGURES["cat"], np.array((48., 48.)), 40, "cat")
    return image.round().astype(np.uint8)


def test_a_glow_is_brightest_where_it_is_hottest():
    image, heat = np.full((6, 8, 3), 100, np.uint8), torch.zeros(3, 4)
    heat[1, 2] = 7
    shown = backbone.glow(image, heat)
    assert (shown[2:4, 4:6] == [255, 220, 60]).all()
    shown[2:4, 4:6] = 35
    assert (shown == 35).all()


def test_the_patch_whose_affinity_is_shown_is_framed():
    """Where the first CAM is surest, in white; the picture itself is dark."""
    cams, image = torch.zeros(1, 4, 5), np.full((48, 60, 3), 10, np.uint8)
    cams[0, 2, 3] = 1
    sheet = cam.draw_ladder(image, cams, torch.full((1, 20, 20), 1e-9).index_fill(1, torch.tensor([0]), 1), cams,
                            torch.zeros(1, 2, 48, 60), torch.zeros(48, 60, dtype=torch.long), [0], ("cat",),
                            {name: "" for name in ("CAM", "refined", "pseudo label")})
    panel = np.asarray(sheet)[24:24 + 192, 2 * 248 + 4:3 * 248 - 4]
    rows, columns = ((panel == 255).all(axis=2)).nonzero()
    assert rows.min() // 48 == rows.max() // 48 == 2 and columns.min() // 48 == columns.max() // 48 == 3


def test_what_looks_alike_has_one_colour():
    """Three kinds of patches, told apart by three axes of the features: equal features equal colours, others others."""
    kinds = torch.tensor([[0, 0, 1, 2], [3, 1, 2, 3]])
    colours = backbone.principal_colours(F.one_hot(kinds, 4).float().permute(2, 0, 1))
    assert colours.shape == (2, 4, 3) and colours.dtype == np.uint8
    by_kind = [{tuple(c) for c in colours[(kinds == kind).numpy()].tolist()} for kind in range(4)]
    assert all(len(found) == 1 for found in by_kind) and len(set.union(*by_kind)) == 4


def test_a_patch_outside_is_refused(capsys):
    """For that picture: others may be larger."""
    assert backbone.main(["--patch", "14", "0"]) == 1
    assert "--patch 14 0 is outside; the picture has 14 x 14" in capsys.readouterr().err
