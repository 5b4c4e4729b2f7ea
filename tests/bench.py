"""How long does it take, against what it cannot do without?

The floor is one plain forward of the frozen encoders: all blocks, fused attention, no map, nothing kept. Every line of
the table is a ratio to the floor of the same batch, measured in the same rounds, so that it means the same on any machine.
Sizes are the real ones (ViT-B/16, ViT-S/14), weights and pictures are random; nothing is read and nothing downloaded.

    python tests/bench.py                          # everything
    python tests/bench.py --only cam par --quick   # two groups, few rounds
"""
import argparse
import ctypes
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import golden  # noqa: E402
import slow  # noqa: E402

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")
diclip = import_module("methods.diclip")

CLASSES, STEP = 20, 10_000  # of VOC; a step after the switch to the dynamic affinity


# ------------------------------------------------------------------------------------------------ what is measured with

@cache
def frozen(method: str, device: torch.device) -> dict:
    """Frozen encoders of full size with random weights."""
    if method == "weclip+":
        dino = backbone.dino_from_state_dict(golden.dino_state_dict(golden.DINO_LAYOUTS["dinov2_vits14"], seed=1))
        return frozen("weclip", device) | {"dino": dino.eval().requires_grad_(False).to(device)}
    layout = golden.CLIP_LAYOUTS["ViT-B/16"] | {"text_layers": 1}
    tower = backbone.clip.model.build_model(golden.clip_state_dict(layout, seed=1)).float()
    return {"clip": tower.eval().requires_grad_(False).to(device)}


class Batch:
    """Pictures, image-level labels and everything that the stages of one method make of them."""

    def __init__(self, args, method: str = "weclip", size: int = 4, crop: int = 320, classes: int = 2):
        generator = torch.Generator().manual_seed(3)
        rough, fine = (torch.randn(size, 3, n, n, generator=generator) for n in (10, crop))
        self.images = (F.interpolate(rough, size=(crop, crop), mode="bicubic") + 0.2 * fine).to(args.device)
        self.labels = torch.zeros(size, CLASSES)
        for image in range(size):
            self.labels[image, [(image + k) % CLASSES for k in range(classes)]] = 1
        self.pairs, kind = cam.class_pairs(self.labels), decoder.method_class(method)
        torch.manual_seed(4)
        self.method = kind(kind.rows["voc"], data.DATASETS["voc"], frozen(method, args.device))
        words = F.normalize(torch.randn(CLASSES + 25, 512, generator=generator), dim=1).to(args.device)
        self.method.text_fg, self.method.text_bg = words[:CLASSES], words[CLASSES:]  # the text tower has one layer here
        self.method.model.train()
        self.optimizer = train.make_optimizer(self.method.model, self.method.cfg.lr)

    def floor(self):
        plain_forward(self.method, self.images)

    def step(self, amp=None, step=STEP):
        train.train_step(self.method, self.optimizer, self.images, self.labels, step, amp=amp)

    def stages(self, amp=None):
        """What the single stages take: attributes of the same names."""
        self.seen = self.method.look(self.images, True, STEP, amp)
        prediction = self.method.model.eval()(self.seen)
        self.rungs = self.method.pseudo_labels(self.images, self.pairs, self.seen, prediction, self.images.shape[-2:], STEP)
        self.method.model.train()
        return self

    def grad_cam(self):
        return cam.grad_cam(self.method.clip, self.seen.tokens[-1], self.method.text_fg, self.method.text_bg, self.pairs,
                            self.seen.grid)


@torch.no_grad()
def plain_forward(method, images: torch.Tensor, amp: torch.dtype | None = None) -> None:
    """The floor: `look` has all blocks but CLIP's last one, which is added here."""
    x, block = method.look(images, False, amp=amp).tokens[-1], method.clip.visual.transformer.resblocks[-1]
    with backbone.in_precision(amp, images.device):
        x = x + backbone.attend(block.attn, block.ln_1(x), with_map=False)[0]
        x + block.mlp(block.ln_2(x))


def seconds(run, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def timed(args, runs: dict) -> dict[str, float]:
    """Median seconds of each; in every round each runs once, so that a busy machine is unfair to none. One warm-up."""
    times = {name: [] for name in runs}
    for _ in range(1 + (1 if args.quick else 5)):
        for name, run in runs.items():
            times[name].append(seconds(run, args.device))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def peak_extra(run, device: torch.device) -> float:
    """Megabytes that a run holds at its peak, beyond what was held before; nan where the system does not say."""
    run()  # what is made once and kept (optimiser state) is there already
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if platform.system() != "Linux":
        return float("nan")

    def resident(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    ctypes.CDLL(None).malloc_trim(0)                # freed memory back to the system, or it would count as held
    Path("/proc/self/clear_refs").write_text("5")   # the peak starts from now
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def memory_line(name: str, run, device: torch.device, wanted: str) -> None:
    extra, on_gpu = peak_extra(run, device), device.type == "cuda"
    line(f"{name}: peak memory", f"{extra:.0f} MB", "above the model"
         + on_gpu * f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GB in all; wanted: below {wanted}")


def line(name: str, value: str, note: str = "") -> None:
    print(f"  {name:58} {value:>10}   {note}".rstrip(), flush=True)


def ratios(times: dict[str, float], targets: dict[str, str]) -> None:
    """A line for each; the first is the floor."""
    floor = next(iter(times.values()))
    for name, t in times.items():
        line(name, f"{t / floor:.2f}", f"{t:8.3f} s   {targets.get(name, '')}")


# ------------------------------------------------------------------------------------------------ the groups

def bench_cam(args) -> None:
    """CAMs of a batch of 4 with 1, 2, 5 classes per image; the released way is a forward and a backward for each class."""
    batches = {k: Batch(args, classes=k).stages() for k in (1, 2, 5)}

    def one_by_one(batch):
        method = batch.method
        for image, target in batch.pairs.tolist():
            slow.one_cam_at_a_time(method.clip, batch.seen.tokens[-1][image], method.text_fg, method.text_bg,
                                   batch.labels[image].nonzero()[:, 0].tolist(), target, batch.seen.grid, 100.0)
    times = timed(args, {"floor": batches[1].floor}
                  | {f"CAMs, {k} per image": batch.grad_cam for k, batch in batches.items()}
                  | {f"one by one, {k} per image": lambda batch=batches[k]: one_by_one(batch) for k in (1, 2)})
    ratios(times, {"CAMs, 2 per image": "wanted: 0.35"})
    further = (times["CAMs, 5 per image"] - times["CAMs, 2 per image"]) / 3
    line("a further class, against one by one", f"{further / (times['one by one, 2 per image'] / 2):.2f}",
         "wanted: below 0.25")


def bench_par(args) -> None:
    """Label refinement of a batch of 4 with 2 classes per image."""
    batch = Batch(args).stages()
    scores, _ = cam.stack_scores(batch.rungs.maps, batch.pairs, len(batch.images))
    maps = torch.rand(4, *[batch.rungs.transition.shape[-1]] * 2, device=args.device)

    def par():
        return cam.par(batch.images, scores)

    def copies():
        return slow.par_with_48_copies(batch.images, scores)
    times = timed(args, {"floor": batch.floor, "PAR": par, "PAR with 48 copies": copies,
                         "box masks": lambda: cam.box_masks(batch.rungs.cams, 0.4),
                         "min-max, twice": lambda: cam.normalize_cams(batch.rungs.cams),
                         "transition matrix": lambda: cam.transition_matrix(maps)})
    ratios(times, {"PAR": "wanted: 0.5"})
    line("48 copies, against PAR: time", f"{times['PAR with 48 copies'] / times['PAR']:.1f}", "wanted: at least 7")
    peaks = [peak_extra(run, args.device) for run in (par, copies)]
    line("PAR, against 48 copies: peak extra memory", f"{peaks[0] / peaks[1]:.2f}",
         f"{peaks[0]:.0f} MB, {peaks[1]:.0f} MB; wanted: below 0.25")


def bench_step(args) -> None:
    """A whole training step, 320 x 320, batch 4, 2 classes per image, each against its own encoders."""
    for method in ("weclip", "weclip+"):
        batch = Batch(args, method)
        ratios(timed(args, {f"floor, {method}": batch.floor, f"training step, {method}": batch.step}),
               {f"training step, {method}": f"wanted: {1.5 if args.device.type == 'cuda' else 2.0}"})
        memory_line(f"training step, {method}", batch.step, args.device, "3 GB" if method == "weclip" else "4 GB")


def bench_excel(args) -> None:
    """ExCEL: both paths, the maps of a batch of 4, a step before the switch to LVC and one after; in floors of CLIP alone."""
    plain, batch = Batch(args).stages(), Batch(args, "excel").stages()
    method, switch = batch.method, batch.method.cfg.dynamic_from
    prediction = method.model(batch.seen)
    times = timed(args, {"floor, CLIP alone": plain.floor,
                         "both paths, with six maps": lambda: method.look(batch.images, True),
                         "CLIP's path, with six maps": lambda: backbone.look(method.clip, batch.images, 6),
                         "maps before the switch": lambda: method.cams(batch.seen, prediction, batch.pairs, 0),
                         "maps after it": lambda: method.cams(batch.seen, prediction, batch.pairs, switch),
                         "Grad-CAM of the same words": plain.grad_cam,
                         "training step, before the switch": lambda: batch.step(step=0),
                         "training step, after it": lambda: batch.step(step=switch)})
    ratios(times, {"maps before the switch": "no backward pass", "maps after it": "the second look is in it"})
    for name, step in (("before the switch", 0), ("after it", switch)):
        memory_line(f"training step, {name}", lambda step=step: batch.step(step=step), args.device, "3 GB")


def bench_weakclip(args) -> None:
    """A training step of WeakCLIP, 512 x 512, batch 2, against all of CLIP's blocks; its CRF apart, in this process."""
    weakclip = import_module("methods.weakclip")
    tower = backbone.clip.model.build_model(golden.clip_state_dict(golden.CLIP_LAYOUTS["ViT-B/16"], seed=1)).float()
    method = weakclip.WeakCLIP(weakclip.WeakCLIP.rows["voc"], data.DATASETS["voc"],
                               {"clip": tower.eval().requires_grad_(False).to(args.device)})
    without = weakclip.WeakCLIP(replace(method.cfg, boundary_weight=0), method.info, method.frozen)
    generator = torch.Generator().manual_seed(3)
    images = F.interpolate(torch.randn(2, 3, 16, 16, generator=generator), size=(512, 512), mode="bicubic").to(args.device)
    masks = torch.randint(0, CLASSES + 1, (2, 1, 16, 16), generator=generator).float()
    masks = F.interpolate(masks, size=(512, 512)).long()[:, 0].to(args.device)
    probs = cam.enlarge(torch.randn(2, CLASSES + 1, 8, 8, generator=generator), (64, 64)).softmax(dim=1)
    jobs = list(zip(weakclip.crf_image(images, 64), probs.numpy()))

    def step(which):
        optimizer = train.make_optimizer(which.model.train(), which.cfg.lr)
        return lambda: train.train_step(which, optimizer, images, None, STEP, masks)
    whole = step(method)
    ratios(timed(args, {"floor, weakclip": lambda: method.look(images, False), "training step without the CRF": step(without),
                        "training step": whole, "the CRF of both images": lambda: [weakclip.crf_target(*job) for job in jobs],
                        "prompts through the text tower": lambda: method.model.texts(method.clip)}), {})
    memory_line("training step, weakclip", whole, args.device, "4 GB")


def diffusion_of_full_size(device: torch.device):
    """Stable Diffusion 2.1-base's layout with random weights, on a GPU in half precision. None without diffusers."""
    try:
        diffusers = import_module("diffusers")
    except ImportError:
        return None
    unet = diffusers.UNet2DConditionModel(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024,
                                          use_linear_projection=True)
    vae = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4)
    found = diclip.FromDiffusion(unet, vae, torch.zeros(1, 77, 1024), 101, 0.893).eval().requires_grad_(False).to(device)
    return found.half() if device.type == "cuda" else found


def bench_diclip(args) -> None:
    """DiCLIP's step for a batch of 4 and its parts, in floors of CLIP alone; its attention source has a line of its own."""
    plain, batch = Batch(args), Batch(args, "diclip")
    method, generator, grid = batch.method, torch.Generator().manual_seed(5), (20, 20)
    values = torch.eye(1 + CLASSES).repeat_interleave(torch.tensor([25] + CLASSES * [10]), dim=0)
    method.model.take(torch.randn(225, 512, generator=generator) / 512 ** 0.5, values)
    batch.optimizer = train.make_optimizer(method.model.to(args.device).train(), method.cfg.lr)
    coarse, fine = (torch.randn(4, *shape, generator=generator).to(args.device) for shape in ((2, 400, 400), (1600, 1600)))
    said = diclip.Attention(coarse + 1, fine.softmax(dim=-1), (40, 40))
    method.source = lambda *_: said  # the step without the time of its source
    batch.stages()
    dino = diclip.FromDino(frozen("weclip+", args.device)["dino"])
    parts = {"  clusters and bias (ACR)": lambda: diclip.region_bias(said.coarse, grid),
             "  recursion (RAR)": lambda: diclip.rar(*said[1:], batch.rungs.flow, batch.pairs, method.cfg.rar_rounds)}
    times = timed(args, {"floor, CLIP alone": plain.floor, "training step without its source": batch.step, **parts,
                         "DINO asked": lambda: dino(batch.images, grid, None, None)})
    dino_asked = times.pop("DINO asked")
    times["  the rest"] = times["training step without its source"] - sum(times[name] for name in parts)
    ratios(times | {"DINO asked": dino_asked}, {})
    memory_line("training step without its source", batch.step, args.device, "3 GB")
    source = diffusion_of_full_size(args.device)
    if source is None:
        line("the diffusion model asked", "-", "pip install diffusers")
        return
    with torch.no_grad():  # one round: on a CPU it takes a minute
        asked = timed(argparse.Namespace(quick=True, device=args.device), {
            "floor, CLIP alone": plain.floor, "the diffusion model asked": lambda: source(batch.images, grid, None, None)})
    line("the diffusion model asked", f"{asked['the diffusion model asked'] / asked['floor, CLIP alone']:.2f}",
         f"{asked['the diffusion model asked']:8.3f} s   {'half' if args.device.type == 'cuda' else 'full'} precision")


def bench_grow(args) -> None:
    """What is linear? Floor and WeCLIP step in units of the floor of 4 images of 320 x 320; the step of its own floor."""
    base = Batch(args)
    for what, batch in ([(f"batch {n}", Batch(args, size=n)) for n in (1, 4, 16)]
                        + [(f"{k} classes", Batch(args, classes=k)) for k in (1, 2, 5)]
                        + [(f"crop {c}", Batch(args, crop=c)) for c in (320, 480)]):
        t = timed(args, {"base": base.floor, "floor": batch.floor, "step": batch.step})
        line(f"{what}: floor; step", f"{t['floor'] / t['base']:.2f}; {t['step'] / t['base']:.2f}",
             f"{t['step'] / t['floor']:.2f} of its own floor; {peak_extra(batch.step, args.device):.0f} MB")


def bench_infer(args) -> None:
    """A picture of 500 x 375 with its scales and mirrors, against plain forwards of the same sizes in the same batches."""
    for method in ("weclip", "weclip+"):
        batch = Batch(args, method)
        picture = torch.randn(3, 375, 500, generator=torch.Generator().manual_seed(5)).to(args.device)
        inputs = [torch.zeros(2, 3, int(384 * s), int(512 * s), device=args.device) for s in batch.method.cfg.scales]
        batch.method.model.eval()

        def infer():
            cam.enlarged_labels(batch.method.logits(picture), picture.shape[-2:])
        times = timed(args, {"floor": lambda: [plain_forward(batch.method, x) for x in inputs],
                             f"scales and mirrors, {method}": infer})
        ratios(times, {f"scales and mirrors, {method}": "wanted: 1.1"})
        memory_line(f"scales and mirrors, {method}", infer, args.device, "2 GB")


def bench_amp(args) -> None:
    """Half precision of the encoders: time, and how many pixels keep their pseudo label."""
    amp = backbone.half_precision(args.device)
    for method in ("weclip", "weclip+"):
        batch = Batch(args, method)
        labels = [batch.stages(x).rungs.labels for x in (None, amp)]
        line(f"pseudo labels equal with --amp ({amp}), {method}", f"{(labels[0] == labels[1]).float().mean():.2%}")
        ratios(timed(args, {f"floor, {method}": batch.floor,
                            "  floor with --amp": lambda: plain_forward(batch.method, batch.images, amp),
                            f"training step, {method}": batch.step, "  step with --amp": lambda: batch.step(amp=amp)}), {})


def bench_loader(args) -> None:
    """One loader process on JPEGs of 500 x 375, against WeCLIP's step."""
    batch, count = Batch(args), 100 if args.quick else 400
    with tempfile.TemporaryDirectory() as folder:
        for i in range(16):
            rough = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(rough).resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder) / f"{i}.jpg", quality=90)
        samples = [data.Sample(str(i), f"{folder}/{i}.jpg", None, (0,), "made") for i in range(16)]
        batches = train.draw_batches(0, count // 4 + 10, 4)
        loader = iter(DataLoader(train.TrainDataset(samples, CLASSES + 1, 320), batch_sampler=batches, num_workers=1))
        for _ in range(10):  # the worker starts, and fills its queue
            next(loader)
        loaded = count / seconds(lambda: [None for _ in loader], args.device)
    trained = 4 / timed(args, {"step": batch.step})["step"]
    line("images/s of one loader process, over those of the step", f"{loaded / trained:.1f}",
         f"{loaded:.0f} and {trained:.1f} images/s")


def _process(rank: int, world: int, args, results) -> None:
    torch.set_num_threads(max(1, args.threads // world))
    if args.device.type == "cuda":
        torch.cuda.set_device(rank)
        args.device = torch.device("cuda", rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    batch = Batch(args)
    batch.method.network = DistributedDataParallel(batch.method.model)
    took = timed(args, {"step": batch.step})["step"]
    if rank == 0:
        results.put(took)
    dist.destroy_process_group()


def bench_processes(args) -> None:
    """The same batch of 4 per process in one and in two processes, the same cores for both; on CUDA a GPU each."""
    if args.device.type == "cuda" and torch.cuda.device_count() < 2:
        line("two processes", "-", "one GPU only")
        return
    speeds = []
    for world in (1, 2):
        results = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(_process, (world, args, results), nprocs=world)
        speeds.append(4 * world / results.get())
    line("images/s of two processes, over those of one", f"{speeds[1] / speeds[0]:.2f}",
         f"{speeds[1]:.2f} and {speeds[0]:.2f} images/s")
    for method in ("weclip", "weclip+"):
        size = 4 * sum(p.numel() for p in Batch(args, method).method.model.parameters())
        line(f"gradients per step and GPU, {method}, on paper", f"{size / 2**20:.1f} MB",
             f"a ring of 8 GPUs sends 2 * 7/8 of it: {1.75 * size / 2**20:.1f} MB")


GROUPS = {name.removeprefix("bench_"): run for name, run in list(globals().items()) if name.startswith("bench_")}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    p.add_argument("--quick", action="store_true", help="one round instead of five")
    p.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    args = p.parse_args(argv)
    args.device = backbone.choose_device(args.device)
    torch.set_num_threads(args.threads)
    on_gpu = args.device.type == "cuda"
    name = torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine()
    print(f"{name}, {args.device}, {args.threads} threads, torch {torch.__version__}; median of {1 if args.quick else 5}")
    for group in args.only:
        print(f"\n{group}: {GROUPS[group].__doc__}")
        GROUPS[group](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
