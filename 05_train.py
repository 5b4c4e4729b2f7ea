"""05 - Training: how does a segmentation grow out of image-level labels?

In     a data set (01_data) and a method (04_decoder, or a file of methods/)
Out    OUTPUT/last.pt and best.pt (the trained part only), log.csv, scores.csv, preview/*.png, args.json
Paper  WeCLIP, CVPR 2024, and WeCLIP+, TPAMI 2025: single-stage training. Each step makes its own pseudo labels from what
       the frozen encoders see and the decoder has learned so far, and learns from them; with --masks from masks instead.

    python 05_train.py shapes                                         # the toy world: minutes on a laptop, no downloads
    python 05_train.py voc --data-path VOCdevkit --method weclip+     # the papers' runs
    python 05_train.py voc --masks truth                              # true masks: the upper bound. Or a folder of masks
    torchrun --standalone --nproc_per_node=4 05_train.py voc          # the same batch size in total, on four GPUs

A step: images -> frozen tokens, attention -> prediction -> CAM -> refined -> pseudo label -> losses -> AdamW.
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib import import_module
from itertools import chain, count
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # before torch: threads that wait spin shortly, then leave the cores to others
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # our folder, wherever we are started from
data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")

DEFAULT_METHOD = "weclip+"
COMMAND = dict.fromkeys(decoder.TOLD) | {"method": DEFAULT_METHOD, "seed": 0, "amp": False}  # beside the numbers of its row
SAVE_EVERY = 500  # steps, between evaluations
PREVIEW_ROWS = 4
PATIENCE = timedelta(minutes=10)  # how long a process waits for one that neither answers nor ends; others end at once
MAY_CHANGE = {"max_iters", "eval_every", "eval_images", "long_side"}  # when a run is resumed. max_iters moves the learning rate's end too
ENDINGS = {  # what torch says when something outside of the run has ended it -> what that means
    "DataLoader worker": "a loader process died; if memory ran out, take fewer with -j",
    "DataLoader timed out": "no loader process has given a batch for ten minutes; -j 0 does without them",
    **dict.fromkeys(("gloo", "NCCL"), "another process of the run has ended or cannot be reached, its own message says why")}
CURVE_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: safe for the colour-blind
LOCKS = []  # of the folders that are ours
MULTI_PAR = "multi-scale + PAR"  # not the papers', who use a dense CRF, which needs a compiler


def learning_rate(step: int, base: float, max_iters: int, warmup: int = 50, decay: str = "linear") -> float:
    """The released schedules: linear warm-up from base * 1e-6, then linear decay to 0; or cosine all along, to base / 100.

    step  counted from 0; the rate that the optimiser uses in that step
    """
    warm = 1 - (1 - step / warmup) * (1 - 1e-6) if step < warmup else 1
    if decay == "cosine":
        return base * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / max_iters)) / 2)
    return base * warm if step < warmup else base * (1 - step / max_iters)


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW as in the released code; its learning rate is set anew in every step."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)


def train_step(method, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, step: int,
               masks: torch.Tensor | None = None, amp: torch.dtype | None = None) -> dict[str, float]:
    """One step of the method, readable from top to bottom.

    images  (B, 3, H, W) normalised, on the device of the method
    labels  (B, C-1) multi-hot image-level labels, on the CPU: all the supervision there is
    masks   (B, H, W) long, to learn from instead (255 is left out)
    ->      the losses by name, as measured before the step
    Raises  FloatingPointError when the loss is not finite; the weights are then still those before the step
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, method.cfg.lr, method.cfg.max_iters, method.cfg.warmup, method.cfg.decay)
    seen = method.look(images, masks is None, step, amp)
    prediction = method.network(seen)
    if masks is None:
        masks = method.pseudo_labels(images, cam.class_pairs(labels), seen, prediction, images.shape[-2:], step).labels
    losses = method.losses(prediction, masks, step)
    values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist()))  # one wait for the GPU
    if not math.isfinite(values["total"]):
        raise FloatingPointError(f"step {step}: the loss is {values['total']}")
    optimizer.zero_grad(set_to_none=True)
    losses["total"].backward()
    optimizer.step()
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Which picture when?
# ----------------------------------------------------------------------------------------------------------------------


def with_masks_of(samples: list[data.Sample], folder: str) -> list[data.Sample]:
    """The samples with FOLDER/NAME.png as their masks, palette PNGs of class numbers, 255 left out. Raises data.DataError if one
    with a class has none."""
    paths = [Path(folder) / f"{sample.name}.png" for sample in samples]
    found = [replace(sample, mask=str(path) if path.is_file() else None) for sample, path in zip(samples, paths)]
    if wrong := data.missing(f"masks in {folder}", [f"{s.name}.png" for s in found if s.labels and s.mask is None]):
        raise data.DataError(wrong)
    return found


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) the order in which an epoch goes through the images."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


class TrainDataset(Dataset):
    """Random views with image-level labels. Item t is the t-th draw of the run, t = 0, 1, 2, ... without end.

    Draw t is image t % n of epoch t // n in a random order; order and view depend on (seed, t) alone. So the run is the
    same for any number of workers and processes, and goes on in the middle: see `draw_batches`.
    Images without a foreground class are left out, `skipped` counts them.

    Item    see `as_item`, with H = W = crop_size; mask only with `with_masks`: the truth, 255 where void or padded;
            broken: what was wrong with the files in whose place the next ones of the epoch are shown
    Raises  data.DataError  if no image has a class; with_masks: if a mask is missing; at the item: if ten in a row are broken
    """

    def __init__(self, samples: list[data.Sample], num_classes: int, crop_size: int, seed: int = 0,
                 with_masks: bool = False, scales: tuple[float, float] = (0.5, 2.0)):
        self.samples = [sample for sample in samples if sample.labels]
        self.skipped = len(samples) - len(self.samples)
        if not self.samples:
            raise data.DataError(f"none of {len(samples)} images has a foreground class: nothing to learn from; "
                            "`python 01_data.py DATASET --check` says what is missing")
        if without := [sample.name for sample in self.samples if with_masks and sample.mask is None]:
            raise data.DataError(data.missing("masks (for COCO, `python 01_data.py coco` writes them from the json)", without))
        self.num_classes, self.crop_size, self.seed = num_classes, crop_size, seed
        self.with_masks, self.scales = with_masks, scales

    def __len__(self) -> int:
        """Images in an epoch, n."""
        return len(self.samples)

    def __getitem__(self, draw: int) -> dict:
        epoch, place = divmod(draw, len(self))
        order, broken = epoch_order(self.seed, epoch, len(self)), []
        while True:
            sample = self.samples[order[(place + len(broken)) % len(self)]]
            try:
                pair = data.load_pair(sample, self.num_classes, self.with_masks)
                break
            except data.DataError as error:
                broken.append(str(error))
                if len(broken) == min(10, len(self)):
                    raise
        pair = data.augment(*pair, self.crop_size, np.random.default_rng((self.seed, 1, draw)), self.scales)
        return data.as_item(sample, *pair, self.num_classes) | {"broken": broken}


def draw_batches(start: int, stop: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[range]:
    """The draws of each step from `start` to `stop`, for this process: a `batch_sampler` for TrainDataset.

    Step s of the run takes the draws s B .. (s+1) B - 1 with B = batch_size * world_size, process r the r-th batch_size
    of them: two processes with 2 images see in each step what one process with 4 sees.
    """
    for step in range(start, stop):
        first = (step * world_size + rank) * batch_size
        yield range(first, first + batch_size)


def collate(items: list[dict]) -> dict:
    """Items -> a batch of numpy arrays, names as a list. Tensors would go from the loader's processes to the training by
    sockets in TMPDIR, whose paths must be short, and by shared memory, which containers have little of."""
    arrays = items[0].keys() - {"name", "broken"}
    return ({key: [item[key] for item in items] for key in ("name", "broken") if key in items[0]}
            | {key: np.stack([np.asarray(item[key]) for item in items]) for key in arrays})


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: what has each step of the ladder brought?
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(method, samples: list, everything: bool = False, amp: torch.dtype | None = None,
             stop: "StopRequest | None" = None) -> dict[str, torch.Tensor] | None:
    """The ladder on pictures of a split: for each rung one confusion matrix over all of them.

    samples     with masks; the processes of a torchrun share them, each picture counts once
    everything  the rungs of several scales as well
    stop        asked before each image
    ->          {rung: (C, C)}; None if a process was asked to stop
    """
    rank, world = rank_and_world()
    classes = method.info.num_classes
    method.model.eval()  # Deviation: the released training script leaves dropout on while it validates
    matrices = {rung: torch.zeros(classes, classes, dtype=torch.long) for rung in all_rungs(method, everything)}
    for sample in tqdm(samples[rank::world], desc="evaluating", disable=None if rank == 0 else True, leave=False):
        if stop is not None and stop.requested:
            break
        try:
            item = data.as_item(sample, *data.load_pair(sample, classes, True), classes)
        except data.DataError as error:
            print(f"not scored: {error}", flush=True)
            continue
        found = climb(method, item["image"].to(method.device), item["labels"], everything, amp)
        for rung, matrix in matrices.items():
            matrix += cam.confusion_matrix(item["mask"], found.labels[rung].cpu(), classes)
    if wanted_anywhere(stop):
        return None
    return {rung: sum_over_processes(matrix) for rung, matrix in matrices.items()}


def score(method, samples: list, last: bool, amp: torch.dtype | None, stop: "StopRequest | None") -> tuple[dict, float] | None:
    """The scores of all rungs; along the way on cfg.eval_images pictures, at the end on all, several scales included.

    -> {rung: 03_cam.scores} and what best.pt is chosen by: the segmentation's mIoU, each time on the same pictures; or None
    """
    count = min(len(samples), method.cfg.eval_images or len(samples))
    part = np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()  # from all over the split
    matrices = evaluate(method, [samples[n] for n in part], last, amp, stop)
    chosen_by = matrices and cam.scores(matrices["segmentation"])["miou"]
    rest = [samples[n] for n in sorted(set(range(len(samples))) - set(part))]
    if matrices and last and rest:
        more = evaluate(method, rest, last, amp, stop)
        matrices = more and {rung: matrix + more[rung] for rung, matrix in matrices.items()}
    return matrices and ({rung: cam.scores(matrix) for rung, matrix in matrices.items()}, chosen_by)


def all_rungs(method, everything: bool = True) -> list[str]:
    """What is scored, in the order in which it is made."""
    return [*method.rungs, "segmentation"] + ["multi-scale", MULTI_PAR] * everything


def climb(method, image: torch.Tensor, labels: torch.Tensor, everything: bool, amp: torch.dtype | None):
    """The ladder of one image (3, H, W), and with `everything` the rungs of several scales above it."""
    found = method.ladder(image, labels, amp)
    if everything:
        logits = method.logits(image, amp=amp)
        found.labels["multi-scale"] = cam.enlarged_labels(logits, image.shape[-2:])
        found.labels[MULTI_PAR] = cam.par_labels(image, logits)
    return found


@torch.no_grad()
def draw_preview(method, samples: list, amp: torch.dtype | None, path: Path) -> None:
    """A row for each sample: image, all rungs, the truth where there is one. CAMs glow in the colours of their classes."""
    info, rows = method.info, []
    method.model.eval()
    for sample in samples:
        try:
            image, truth = data.load_pair(sample, info.num_classes, sample.mask is not None)
        except data.DataError:  # named where it is scored
            continue
        item = data.as_item(sample, image, None, info.num_classes)
        found = climb(method, item["image"].to(method.device), item["labels"], True, amp)
        labels = {rung: x.cpu().numpy() for rung, x in found.labels.items() if rung not in found.maps}
        labels |= {} if truth is None else {"truth": truth}
        ids = sorted(sample.labels)
        rows.append({"image": image} | {rung: cam.paint(image, maps, ids, info.classes) for rung, maps in found.maps.items()}
                    | {rung: data.overlay(image, x, info.classes) for rung, x in labels.items()})
    heads, blank = list(dict.fromkeys(chain(*rows))), np.full((1, 1, 3), 255, np.uint8)  # a truth is missing here and there
    pictures = [row.get(head, blank) for row in rows for head in heads]
    data.save_picture(path, data.contact_sheet(pictures, heads * len(rows), columns=len(heads)))


# ----------------------------------------------------------------------------------------------------------------------
# Processes, checkpoints, logs
# ----------------------------------------------------------------------------------------------------------------------


def start_processes(wanted: str | None) -> torch.device:
    """This process' device; under torchrun also the process group: nccl between GPUs, gloo for what is on the CPU.

    Raises  data.DataError  where the environment is that of no torchrun, or the processes cannot meet
    """
    if "RANK" not in os.environ:
        return backbone.choose_device(wanted)
    told = {name: os.environ.get(name) for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if lacking := [name for name, value in told.items() if not value]:
        raise data.DataError(f"the environment has RANK, but not {', '.join(lacking)}: is it left over? One process needs "
                             "none of them (`unset RANK`); several are started by torchrun, which sets them all")
    on_gpus = (wanted or "cuda").startswith("cuda") and torch.cuda.is_available()
    device = backbone.choose_device(f"cuda:{told['LOCAL_RANK']}" if on_gpus else wanted)
    try:
        if on_gpus:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise data.DataError(f"the processes of the run cannot meet at {told['MASTER_ADDR']}:{told['MASTER_PORT']} "
                             f"({str(error).splitlines()[0]}); take another port (torchrun --master_port=N), or for one "
                             "process `unset RANK`") from error
    return device


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """The sum of x, on the CPU, over all processes; x itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wanted_anywhere(stop: "StopRequest | None") -> bool:
    """Was any process asked to stop? All must stop after the same step: signals reach them at different ones."""
    return stop is not None and sum_over_processes(torch.tensor(int(stop.requested))).item() > 0


class Log:
    """A table in a CSV file, whole on the disk after each row; a resumed run drops the rows that it will make again."""

    def __init__(self, path: Path, last_step: int):
        rows = csv.DictReader(data.read_text(path).splitlines()) if last_step and path.is_file() else ()
        whole = [row for row in rows if None not in (*row, *row.values()) and row.get("step", "").isdecimal()]
        self.path, self.rows = path, [row for row in whole if int(row["step"]) <= last_step]
        self.save()

    def write(self, **row) -> None:
        """The columns are those of the first row."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        lines = [*self.rows[:1], *([row.get(column, "") for column in self.rows[0]] for row in self.rows)]
        data.write_text(self.path, "".join(",".join(map(str, line)) + "\n" for line in lines))


def reserve_folder(args: argparse.Namespace, name: str) -> Path:
    """The folder of this run: --output-dir, else that of the run that is resumed, else runs/NAME-METHOD[-2, -3, ...].

    It is ours from now on until this process ends, however that happens: another training that is started meanwhile takes
    another one, or is refused.
    Raises  data.DataError  if it holds a run that is not resumed, or belongs to one that is running
    """
    resumed = Path(args.resume).parent if args.resume not in (None, "last") else None
    folder = Path(args.output_dir or resumed or f"runs/{name}-{args.method}{'-masks' * bool(args.masks)}")
    goes_on = args.resume == "last" or (resumed and resumed.resolve() == folder.resolve())
    if args.output_dir or goes_on:
        if (folder / "last.pt").exists() and not goes_on:
            raise data.DataError(f"{folder} holds a run already; go on with it by --resume, or choose another --output-dir")
        if not locked(folder):
            raise data.DataError(f"{folder} belongs to a training that is running; choose another --output-dir")
        return folder
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(place for place in chain([folder], others) if not (place / "last.pt").exists() and locked(place))


def locked(folder: Path) -> bool:
    """Could we lock this folder, which is made if need be? The system gives it back when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    LOCKS.append(lock)  # it is ours as long as this lives
    return True


def draw_curves(output: Path) -> Image.Image:
    """log.csv and scores.csv of a run as a picture: losses above, mIoU in percent below, over the steps."""
    width, height, left, top = 760, 240, 50, 34  # pixels of a panel and its margins
    sheet = Image.new("RGB", (width + 170, 2 * (height + 2 * top)), "white")
    pen, write = ImageDraw.Draw(sheet), partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(13))
    for base, title, file in ((top, "losses", "log.csv"), (3 * top + height, "mIoU in percent", "scores.csv")):
        rows = list(csv.DictReader(data.read_text(output / file).splitlines()))
        lines = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
                 for name in chain(*rows[:1]) if name not in ("step", "lr", "images_per_s")}
        last, highest = (max((point[axis] for line in lines.values() for point in line), default=0) or 1 for axis in (0, 1))
        write((left, base - 8), title, anchor="lb")
        for share in (0, .25, .5, .75, 1):
            x, y = left + share * (width - left), base + height * (1 - share)
            pen.line([left, y, width, y], fill=(225, 225, 225))
            write((left - 6, y), f"{share * highest:.3g}", anchor="rm")
            write((x, base + height + 4), f"step {share * last:.0f}", anchor="mt")
        for number, (name, line) in enumerate((name, line) for name, line in lines.items() if line):
            colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
            points = [(left + (width - left) * step / last, base + height * (1 - value / highest)) for step, value in line]
            pen.line(points, fill=colour, width=2)
            for x, y in points if len(points) < 20 else points[-1:]:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
            write((width + 10, base + 16 * number), f"{name} {line[-1][1]:.3g}", fill=colour)
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------


def settle(args: argparse.Namespace, device: torch.device, world: int) -> tuple:
    """What does this run learn, from what, with which numbers? -> (method, root, samples, identity).

    identity  what a checkpoint must have in common with the run that goes on from it, beside the numbers
    Raises    data.DataError for data, weights or numbers that are not there or do not go together
    """
    if not (args.masks or decoder.method_class(args.method).rungs):
        raise data.DataError(f"{args.method} makes no labels of its own; give it masks: --masks DIR, or --masks truth")
    info, root = data.dataset_info(args.dataset, args.background), data.find_root(args.dataset, args.data_path)
    split = args.split or next(iter(data.SPLITS[info.name]))
    samples = data.list_samples(info, root, split)
    learned_from = [(sample.name, sample.labels) for sample in samples]  # true masks may be added while a run pauses
    masks = args.masks
    if masks not in (None, "truth"):
        samples = with_masks_of(samples, masks)
        masks = f"{Path(masks).resolve()}, check sum {data.check_sum(Path(s.mask).read_bytes() for s in samples if s.mask)}"
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # this one downloads and makes, the others wait
    if not first_here:
        sum_over_processes(torch.zeros(1))
    options = args.options | (decoder.method_class(args.method).with_masks if args.masks else {})
    method = decoder.new_method(args.method, info, options, device)
    method.ready(samples)
    if first_here:
        sum_over_processes(torch.zeros(1))
    method.cfg = cfg = replace(method.cfg, batch_size=(args.batch_size or max(1, method.cfg.batch_size // world)) * world)
    if split == "val":
        print("warning: val is what is scored; what is trained on it has no score that counts", file=sys.stderr)
    patch = backbone.patch_size(method.clip)
    if "crop_size" in args.options and not args.resume and cfg.crop_size % patch:
        lower = cfg.crop_size // patch * patch
        raise data.DataError(f"--crop-size {cfg.crop_size} is no multiple of the patch of {cfg.clip}, {patch} pixels; "
                             f"take {lower or patch} or {lower + patch}")
    usable = sum(bool(sample.labels) for sample in samples)
    if 0 < usable < cfg.batch_size:
        raise data.DataError(f"{usable} images with a class in {split}, but {cfg.batch_size} in a batch "
                             f"({world} processes); take a smaller -b, or more images")
    identity = {"method": args.method, "dataset": info.name, "classes": list(info.classes), "prompts": list(info.prompts),
                "background": list(info.background), "split": split, "masks": masks, "seed": args.seed, "amp": args.amp,
                "samples": f"{len(samples)} images, check sum {data.check_sum([repr(learned_from).encode()])}",
                "frozen": decoder.frozen_names(cfg, method.frozen)}
    return method, root, samples, identity


def run(args: argparse.Namespace, device: torch.device, stop: "StopRequest") -> int:
    """The whole of a training: what it needs is checked first, then step after step; see `train_step` for the method.

    stop  asked after each step, while a batch is waited for, and before each image of an evaluation: the run then saves
    ->    exit status: 0, or 128 + the number of the signal that has stopped it
    """
    rank, world = rank_and_world()
    say = partial(print, flush=True) if rank == 0 else lambda *_: None
    torch.manual_seed(args.seed)
    method, root, samples, identity = settle(args, device, world)
    info, cfg, model = method.info, method.cfg, method.model
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    place = [str(reserve_folder(args, root.resolve().name if info.name == "folder" else info.name))] if rank == 0 else [None]
    if dist.is_initialized():
        dist.broadcast_object_list(place)
    output = Path(place[0])
    progress = {"step": 0, "evaluated": 0, "best": -1.0}  # steps made, the last one that was scored, its best score
    if args.resume:
        path = output / "last.pt" if args.resume == "last" else Path(args.resume)
        progress = resume(path, identity, method, optimizer)
        if not (output / "best.pt").exists():  # another folder than before: the next one is the best there
            progress.update(best=-1.0, evaluated=min(progress["evaluated"], progress["step"] - 1))
    start, broken, described = progress["step"], set(), data.describe(samples)
    if start > cfg.max_iters:
        raise data.DataError(f"{path} has made {start} steps already, more than --max-iters {cfg.max_iters}")
    train_set = TrainDataset(samples, info.num_classes, cfg.crop_size, args.seed, bool(args.masks), cfg.scale_range)
    draws = draw_batches(start, cfg.max_iters, cfg.batch_size // world, rank, world)
    try:
        batches = iter(DataLoader(train_set, batch_sampler=draws, num_workers=args.workers,
                                  worker_init_fn=cam.live_as_long_as_the_training, collate_fn=collate,
                                  timeout=PATIENCE.total_seconds() if args.workers else 0))
    except (OSError, RuntimeError) as error:
        raise data.DataError(f"no loader process could be started ({error}); -j 0 does without them") from error
    val_samples = data.list_samples(info, root, "val")
    with_masks = [sample for sample in val_samples if sample.mask]
    if rank == 0:
        settings = {**identity, "labels": described, "config": asdict(cfg), "processes": world, "data_path": str(root),
                    "torch": torch.__version__}
        data.write_text(output / "args.json", json.dumps(settings, indent=1, ensure_ascii=False))
        log, score_log = Log(output / "log.csv", start), Log(output / "scores.csv", progress["evaluated"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.method} on {info.name}, {f'masks: {args.masks}' if args.masks else 'image-level labels'}; {identity['split']}: "
        f"{described}; {train_set.skipped} skipped\n"
        f"{trained:,} trained parameters on {device} x {world}, {cfg.batch_size} images per step, "
        f"steps {start} to {cfg.max_iters}, learning rate {cfg.lr:g} -> {output}")
    looked = [data.inspect(sample, info.num_classes)[1] for sample in with_masks[:50]] if rank == 0 else []
    if warning := data.contradiction(sum(looked), len(looked)):
        say(f"warning: of the first {len(looked)} masks of val, {warning}")
    if not with_masks:
        say(f"nothing is scored: none of {len(val_samples)} images of val has a mask"
            + ("; `python 01_data.py coco` writes them" if info.name == "coco" else ""))

    if dist.is_initialized():
        method.network = DistributedDataParallel(model)
    amp = backbone.half_precision(device) if args.amp else None

    told = {key: getattr(args, key) for key in COMMAND} | {"data_path": str(root.resolve())}
    told |= {"dataset": told["data_path"]} if info.name == "folder" else {}
    told |= {"masks": str(Path(args.masks).resolve())} if args.masks not in (None, "truth") else {}

    def save(name: str) -> None:
        if not decoder.finite(model):  # in all processes alike
            raise data.DataError(f"step {progress['step']}: weights are not finite any more, {output / name} is left as it "
                                 "was; start again with a smaller --lr")
        if rank == 0:
            checkpoint = {**identity, "command": told, "config": asdict(cfg), **progress, "model": model.state_dict(),
                          "optimizer": optimizer.state_dict()}
            data.write_whole(output / name, partial(torch.save, checkpoint))
            data.save_picture(output / "preview" / "curves.png", draw_curves(output))

    def look_back(step: int) -> None:
        shown = (with_masks or val_samples)[:PREVIEW_ROWS]
        if rank == 0 and shown:
            draw_preview(method, shown, amp, output / "preview" / f"step_{step:06d}.png")

    look_back(start)
    began = time.perf_counter()
    seconds, measured = 0.0, 0  # of the steps since the last line
    for step in range(start, cfg.max_iters + 1):
        last = step == cfg.max_iters
        if with_masks and (last or step % cfg.eval_every == 0) and progress["evaluated"] < step:
            if last:
                say(f"scoring {len(with_masks)} pictures")
            found = score(method, with_masks, last, amp, stop)
            if found is None:
                break
            result, chosen_by = found
            progress["evaluated"] = step
            if chosen_by > progress["best"]:
                progress["best"] = chosen_by
                save("best.pt")
            look_back(step)
            if rank == 0:
                score_log.write(step=step, **{rung: f"{100 * result[rung]['miou']:.2f}" if rung in result else ""
                                              for rung in all_rungs(method)})
            save("last.pt")
            note = cam.without_truth(result, info) or (f"{cfg.eval_images} pictures" if cfg.eval_images and not last else "")
            say(f"mIoU at step {step}: " + "   ".join(f"{r} {100 * s['miou']:.1f}" for r, s in result.items())
                + (note and f"   ({note})"))
            if last and rank == 0:
                cam.print_scores(result, info, f"{len(with_masks)} images of val")
        if last:
            chosen = with_masks and method.rungs and progress["best"] >= 0  # masks are not chosen by truth
            checkpoint = output / ("best.pt" if chosen else "last.pt")
            rest = ("--data-path", root) if with_masks and (info.name != "shapes" or args.data_path) else ()
            if broken:
                say(f"{len(broken)} training pictures were passed over, see above")
            what = [*rest, *(() if with_masks else ("PICTURE",))]
            say(f"\nlook at {output / 'preview'}, then:\n    {data.command(HERE / '06_infer.py', checkpoint, *what)}")
            return 0

        clock = time.perf_counter()
        torch.manual_seed(hash((args.seed, step, rank)))  # dropout of a step depends on nothing but these: runs resume
        try:
            batch = stop.wait_for(batches, world)
            if batch is None:
                break
            for message in set(chain(*batch["broken"])) - broken:
                print(f"passed over: {message}", flush=True)
                broken.add(message)
            if len(broken) > max(10, len(train_set) / 100):
                raise data.DataError(f"{len(broken)} of {len(train_set)} training pictures cannot be used, see above")
            masks = torch.from_numpy(batch["mask"]).to(device).long() if args.masks else None
            images, labels = torch.from_numpy(batch["image"]).to(device), torch.from_numpy(batch["labels"])
            model.train()  # what is looked at between steps is looked at in eval mode
            values = train_step(method, optimizer, images, labels, step, masks, amp)
        except data.DataError:  # all steps so far are whole
            save("last.pt")
            raise
        except FloatingPointError as error:
            raise data.DataError(f"process {rank}: {error}; images of the batch: {', '.join(batch['name'])}. Nothing is saved "
                                 f"of this step, {output / 'last.pt'} is left as it was; a smaller --lr may help") from error
        progress["step"] = done = step + 1
        seconds, measured = seconds + time.perf_counter() - clock, measured + 1
        if rank == 0 and (done % args.print_freq == 0 or done == cfg.max_iters):
            speed, seconds, measured = measured * cfg.batch_size / seconds, 0.0, 0
            lr = optimizer.param_groups[0]["lr"]
            minutes = (time.perf_counter() - began) / (done - start) * (cfg.max_iters - done) / 60  # as it has gone so far
            peak = f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GB GPU" if torch.cuda.is_initialized() else ""
            log.write(step=done, lr=f"{lr:.3e}", **{k: f"{v:.6f}" for k, v in values.items()}, images_per_s=f"{speed:.1f}")
            say(f"step {done:6d}/{cfg.max_iters}  " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                + f"  lr {lr:.1e}  {speed:.1f} images/s  {minutes:.1f} min left{peak}")
        if wanted_anywhere(stop):
            break
        if done == cfg.max_iters or done % cfg.eval_every == 0 or done % SAVE_EVERY == 0:
            save("last.pt")
    save("last.pt")
    say(f"stopped after step {progress['step']}; go on with:\n    {data.command(HERE / '05_train.py', '--resume', output)}")
    return 128 + stop.signal if stop.signal else 0


def resume(path: Path, identity: dict, method, optimizer: torch.optim.Optimizer) -> dict:
    """Go on from a checkpoint: its weights and optimiser are loaded -> its progress: step, evaluated, best.

    Raises  data.DataError if it is damaged, or of a run of another method, data, backbone or number: both sides are named
    """
    checkpoint = decoder.read_checkpoint(path)

    def essence(value):
        return value.get("fingerprint") if isinstance(value, dict) else value  # weights may lie elsewhere by now

    ours, theirs = ({**config, **run, **run["frozen"]} for config, run in ((asdict(method.cfg), identity),
                                                                          (checkpoint["config"], checkpoint)))
    if changed := [f"{key} is {theirs.get(key)}, this run has {value}" for key, value in ours.items()
                   if key not in MAY_CHANGE | {"frozen"} and essence(theirs.get(key)) != essence(value)]:
        raise data.DataError(f"{path}: {'; '.join(changed)}. Resume with the same settings, or start a new run in another "
                             "--output-dir")
    try:
        method.model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        sound = [state["step"] >= 0 and x.shape == w.shape and x.isfinite().all()
                 for w, state in optimizer.state.items() for x in (state["exp_avg"], state["exp_avg_sq"])]
        if not (decoder.finite(method.model) and all(sound)):
            raise ValueError("its numbers are not finite, or its optimizer is that of another model")
        return {key: checkpoint[key] for key in ("step", "evaluated", "best")}
    except Exception as error:  # whatever a foreign file makes torch raise
        raise data.DataError(f"{path}: does not fit this run ({error})") from error


class Stopped(BaseException):
    """Raised by a signal, only where nothing is lost by it: while a batch is waited for."""


class StopRequest:
    """SIGTERM and the first Ctrl-C let the step end and the run save; the second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal, self.waiting = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    @property
    def requested(self) -> bool:
        return self.signal > 0

    def request(self, number, frame) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.waiting:
            raise Stopped

    def wait_for(self, batches, world: int) -> dict | None:
        """The next batch, or None if a stop is asked for meanwhile: a loader that hangs must not keep a run from ending.

        Of several processes none may leave alone; there a loader that hangs is given up after PATIENCE.
        """
        try:
            self.waiting = world == 1
            return next(batches)
        except Stopped:
            return None
        finally:
            self.waiting = False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """-> the options below, and `options`: the numbers of the method's row that were given, by their names."""
    first = data.CommandLine("", "", add_help=False)  # these say which row's numbers are options
    first.add_argument("--method", help=f"{', '.join(decoder.HERE_ARE)}, or a file of methods/ (default: {DEFAULT_METHOD})")
    first.add_argument("--output-dir", metavar="DIR", help="default: runs/NAME-METHOD[-masks]")
    first.add_argument("--resume", nargs="?", const="last", metavar="RUN",
                       help="go on with the run in this folder, or from this file; what it was told need not be told again")
    p = data.CommandLine(__doc__, "dataset", parents=[first])
    p.add_argument("dataset", nargs="?", help=f"{', '.join(data.DATASETS)}, or a folder of your own")
    p.add_argument("--data-path", metavar="DIR", help="where the data lies (default: data/NAME)")
    p.add_argument("--masks", metavar="truth|DIR", help="learn from true masks, or from DIR/NAME.png, instead of pseudo labels")
    p.add_argument("--split", help="training split (default: train_aug for voc, else train)")
    p.add_argument("--background", nargs="+", metavar="WORD", help="background words instead of the data set's")
    p.add_argument("-b", "--batch-size", type=data.count, metavar="N",
                   help="images per step and process (default: the row's, shared among the processes)")
    p.add_argument("-j", "--workers", type=partial(data.natural, most=256), metavar="N", default=2,
                   help="loader processes (default: %(default)s)")
    p.add_argument("--seed", type=data.natural, metavar="N", help="default: 0")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="encoders in half precision (default: no)")
    p.add_argument("--device", help="cpu, cuda or mps (default: cuda if there is one)")
    p.add_argument("--print-freq", type=data.count, metavar="N", default=50, help="steps between lines (default: %(default)s)")
    p.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    known = first.parse_known_args(argv)[0]
    told = resumed_command(known)
    method = known.method or told.get("method") or DEFAULT_METHOD
    if method != told.get("method"):
        told.pop("options", None)  # numbers of another row; that the methods differ is said later
    names = decoder.add_row_options(p, type(decoder.method_class(method).rows["voc"]), leave_out=("batch_size",))
    p.epilog = textwrap.fill(f"and each number of the method's row; of {method}: --" + " --".join(names).replace("_", "-"), 125)
    p.set_defaults(**COMMAND | told)
    args = p.parse_args(argv)
    if args.supervised:
        raise data.DataError("--supervised is now --masks truth")
    if args.dataset != told.get("dataset", args.dataset) and args.data_path == told["data_path"]:
        args.data_path = None  # that was of other data; that the runs differ is said later
    if args.dataset is None:
        p.error(f"which data? {', '.join(data.DATASETS)}, or a folder of your own; or --resume RUN")
    args.resume, args.options = known.resume, told.get("options", {}) | decoder.chosen_options(args, names)
    return args


def resumed_command(known: argparse.Namespace) -> dict:
    """What the run that --resume or --output-dir names was told; {} if neither names one. A folder becomes its last.pt."""
    resume = known.output_dir if known.resume == "last" else known.resume
    if resume is None:
        return {}
    known.resume = str(Path(resume) / "last.pt" if Path(resume).is_dir() else resume)
    checkpoint = decoder.read_checkpoint(known.resume)
    return {**checkpoint.get("command", {}), "method": checkpoint["method"], "options": dict(checkpoint["config"])}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = start_processes(args.device)
    try:
        status = run(args, device, StopRequest())
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        meaning = data.out_of_memory(error) or next((f"{text} ({reason})" for sign, text in ENDINGS.items() if sign in str(error)), "")
        if not meaning:
            raise
        raise data.DataError(f"process {rank_and_world()[0]}: {meaning}. What was saved last is whole; go on with --resume") from error
    finally:
        while LOCKS:
            LOCKS.pop().release()
    if dist.is_initialized():
        dist.destroy_process_group()  # not after an error: it would wait for processes that are gone
    return status


if __name__ == "__main__":
    data.run(main)
