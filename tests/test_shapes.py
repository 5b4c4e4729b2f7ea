"""Does the toy world mean something? The shipped encoders on pictures that they have not seen, drawn with another seed."""
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
