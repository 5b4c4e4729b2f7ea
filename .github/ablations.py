"""What does each stage do? WeCLIP+ on `shapes` with one stage taken out, as pictures and as scores. Nothing is trained anew.

    python .github/ablations.py runs/shapes-weclip+/best.pt        # draws .github/ablations.png; about four minutes

A stage is a function of the method: to take it out is a subclass that replaces this function, and all others are inherited.
"""
import sys
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
data, cam, decoder, train = map(import_module, ("01_data", "03_cam", "04_decoder", "05_train"))


class WithAll(decoder.WeCLIPPlus):
    """all stages"""


class NoBackgroundWords(decoder.WeCLIPPlus):
    """no background words"""

    def texts(self):
        text_fg, text_bg = super().texts()
        return text_fg, text_bg[:0]


class NoAffinity(decoder.WeCLIPPlus):
    """no affinity"""

    def affinity(self, maps, prediction, step=None):  # each patch belongs to itself
        return torch.eye(maps.shape[-1] - 1, device=maps.device).expand(len(maps), -1, -1)


class NoPAR(decoder.WeCLIPPlus):
    """no PAR"""

    def label(self, images, seen, flow, pairs, size):
        maps = cam.enlarge(cam.min_max(flow), size)
        scores, ids = cam.stack_scores(maps, pairs, len(images))
        return maps, scores, cam.best_label(scores, ids)


class OneScale(decoder.WeCLIPPlus):
    """one scale, no mirror"""

    def logits(self, image, scales=None, flip=True, amp=None):
        return super().logits(image, (1,), False, amp)


SHOWN = {NoBackgroundWords: ("CAM", 0), NoAffinity: ("refined", 2), NoPAR: ("pseudo label", 2), OneScale: ("multi-scale", 2)}
# a rung of each, and on which of the first pictures of val it is drawn


def main(path: str) -> None:
    checkpoint, info = decoder.read_checkpoint(path), data.DATASETS["shapes"]
    cfg, samples = decoder.WeCLIPPlusConfig(**checkpoint["config"]), data.list_samples(info, None, "val")
    frozen, cells, captions = decoder.WeCLIPPlus.load(cfg, "cpu"), [], []

    def method(kind: type):
        found = kind(cfg, info, frozen, checkpoint["model"])
        found.model.eval()
        return found

    def measured(kind: type) -> dict[str, float]:
        """mIoU of the rungs on val; those of several scales where these are what changes."""
        matrices = train.evaluate(method(kind), samples, everything=kind in (WithAll, OneScale))
        scores = {rung: 100 * cam.scores(matrix)["miou"] for rung, matrix in matrices.items()}
        print(f"{kind.__doc__:20}  " + "   ".join(f"{rung} {score:.1f}" for rung, score in scores.items()), flush=True)
        return scores

    def cell(kind: type, rung: str, sample, image) -> object:
        item = data.as_item(sample, image, None, info.num_classes)
        found = train.climb(method(kind), item["image"], item["labels"], True, None)
        if rung in found.maps:
            return cam.paint(image, found.maps[rung], sorted(sample.labels), info.classes)
        return data.overlay(image, found.labels[rung].numpy(), info.classes)

    whole = measured(WithAll)
    for kind, (rung, number) in SHOWN.items():
        image, truth = data.load_pair(samples[number], info.num_classes, True)
        cells += [image, *(cell(one, rung, samples[number], image) for one in (WithAll, kind)),
                  data.overlay(image, truth, info.classes)]
        name = {"multi-scale": "prediction"}.get(rung, rung)
        captions += ["picture", f"{name}: {whole[rung]:.1f}", f"{kind.__doc__}: {measured(kind)[rung]:.1f}", "truth"]
    sheet = data.contact_sheet(cells, captions, columns=4, side=220)
    sheet.quantize(256, dither=0).save(HERE / "ablations.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/shapes-weclip+/best.pt"])
