"""Is methods/diclip.py DiCLIP? The authors' code on the same pictures, weights and attention, stage by stage, as in
test_parity.py; and do the attention sources, the cache, 05 and 06 do what they say?

    python tests/test_diclip.py      # prints the largest error of each golden file, per stage
"""
import json
import math
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # pytest has conftest.py for that
import golden
import slow
import test_parity as parity
from tiny import CLASSES, arguments, logged, read

data = import_module("01_data")
backbone = import_module("02_backbone")
cam = import_module("03_cam")
decoder = import_module("04_decoder")
train = import_module("05_train")
infer = import_module("06_infer")
excel = import_module("methods.excel")
diclip = import_module("methods.diclip")

ROOT = Path(__file__).resolve().parents[1]

STAGES = {  # what an array belongs to, by its name; the first match counts
    "training": r"train_", "text and cache": r"text$|cache_keys", "bias": r"sd_",
          "two paths": r"block_|decoder_|attention_|patch_|infer_",
    "maps": r"text_map|cache_|static_|dynamic_|adapter_|cam_index", "decoder": r"fused|logits|attn_pred|param_names|layer_",
    "affinity": r".*_(affinity|transition|box|refined)$", "recursion": r"rar_T|.*_(rar_|map512|scores)",
    "labels": r".*label", "losses": r".*_losses", "gradients": r".*_grad_"}
HALF = r"half_"  # the released code's distances in float16: here in float32


def stage_of(key):
    return next((stage for stage, pattern in STAGES.items() if re.match(pattern, key.partition("__")[0])), None)


def tolerance(key):
    """Largest relative L2 error. A margin or a statistic is a difference of two nearly equal sums."""
    if key == "sd_cluster_margin":
        return 2e-3
    if key.startswith("train_"):
        return 1e-2 if key.endswith("_dot") else 1e-3
    return 1e-3 if key.endswith("_dot") else 1e-4


# ---------------------------------------------------------------------------------------------- the recipe of the attention

def queries_keys(tag, images, heads, side, gain, seed):
    """q and k (images, heads, side * side, 64) float64 of the golden files: smooth fields, and noise."""
    at = (np.arange(side) + 0.5) / side
    waves = [np.outer(np.cos(np.pi * u * at), np.cos(np.pi * v * at)).ravel() for u in range(4) for v in range(4)]
    basis, n = np.stack(waves, axis=1), {name: golden.noise("sd", f"{tag}.{name}", (images, heads, 16, 64), seed)
                                         for name in "wv"}
    grain = [golden.noise("sd", f"{tag}.{name}", (images, heads, side * side, 64), seed) for name in ("nq", "nk")]
    return [torch.from_numpy(gain * (basis @ (n["w"] + sign * 0.3 * n["v"]) + 0.5 * noise)) for sign,
            noise in zip((1, -1), grain)]


def recipe_attention(info, grid):
    """What the source would have said: `diclip.Attention`, and the attention of all heads of layer Q."""
    recipe, images = info["attention"], len(info["input"]["labels_0based"])
    (q, k), (q_fine, k_fine) = (queries_keys(layer["tag"], images, layer["heads"], layer["side"], layer["gain"],
                                             recipe["seed"])
                                for layer in (recipe["P"], recipe["Q"]))
    side = (recipe["P"]["side"],) * 2
    q, k = (nn.functional.interpolate(x.mT.flatten(0, 1).unflatten(2, side), size=grid, mode="bilinear").flatten(2).mT
            .unflatten(0, x.shape[:2]) for x in (q, k))
    coarse = (q @ k.mT).float()
    fine = (q_fine @ k_fine.mT / 8).softmax(-1).float()
    heads = list(diclip.HEADS)
    return diclip.Attention(coarse[:, heads], fine[:, heads].mean(1), (recipe["Q"]["side"],) * 2), fine


class Recipe(nn.Module):
    """An attention source that knows one batch."""

    field = "attention"

    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, images, grid, step, amp):
        return self.found


class Case:
    """One golden case: DiCLIP with the recipe's weights, cache and attention, and what it sees of the images."""

    def __init__(self, name):
        self.arrays, self.info = golden.load_case(name)
        self.names = data.dataset_info("voc")
        self.frozen = {"clip": parity.clip_tower(json.dumps({"clip": self.info["clip"]}))}
        self.images = torch.stack([data.normalize(image) for image in self.arrays["images_u8"]])
        self.pairs = torch.tensor([(i, c) for i, shown in enumerate(self.info["input"]["labels_0based"])
                                   for c in sorted(shown)])
        grid = tuple(side // self.info["clip"]["patch"] for side in self.info["input"]["size_hw"])
        self.attention, self.all_heads = recipe_attention(self.info, grid)
        self.method = self.fresh()
        self.seen = self.method.look(self.images, for_labels=True)

    def state(self):
        info, heads = self.info, self.info["heads"]
        embed, classes, hidden = info["clip"]["embed_dim"], self.names.num_classes, heads["adapter_hidden"]
        state = golden.head_state_dict(heads["seed"], info["clip"]["vwidth"], classes, heads["fused_layers"],
                                       depth=heads["layers"],
                                       pred_gain=heads["pred_gain"], pred_bias_offsets=heads["pred_bias_offsets"])
        made, counts = info["cache"], [info["cache"]["background_keys"]] + (classes - 1) * [info["cache"]["keys_per_class"]]
        keys = torch.from_numpy(golden.noise("cache", "keys", (sum(counts), embed), made["seed"]) / math.sqrt(embed)).float()
        values = nn.functional.one_hot(torch.arange(classes).repeat_interleave(torch.tensor(counts)), classes).float()
        for name, shape in {"fc1.weight": (hidden, embed), "fc1.bias": (hidden,), "fc2.weight": (classes, hidden),
                            "fc2.bias": (classes,)}.items():
            name = f"dynamic_adapter.{name}"
            n = golden.noise("head", name, shape, heads["seed"])
            state[name] = torch.from_numpy(0.02 * n if "bias" in name else n.clip(-2, 2)).float()
        state["dynamic_adapter.fc1.weight"][:len(keys)] = keys
        state["dynamic_adapter.fc2.weight"][:, :len(keys)] = values.T
        return state | {"keys": keys, "values": values, "source": torch.zeros(8, dtype=torch.uint8)}

    def fresh(self):
        method = diclip.DiCLIP(replace(diclip.DiCLIP.rows["voc"], long_side=self.info["input"]["size_hw"][0]), self.names,
                               self.frozen,
                               self.state())
        method.source = Recipe(self.attention)
        method.model.eval()
        return method


# ------------------------------------------------------------------------------ our side: every quantity of one case

def cluster_rounds(x, grid, rounds):
    """Nearest centres of each round as the reference counts them: among those centres that are still there."""
    found = [diclip.regions(x, grid, number) for number in range(1, 1 + rounds)]
    out = [found[0]]
    for before, now in zip(found, found[1:]):
        out.append(torch.stack([torch.searchsorted(b.unique(), n) for b, n in zip(before, now)]))
    return torch.stack(out, dim=1)


def first_members(nearest):
    """For each position the smallest one of its cluster: (B, N) -> (B, N)."""
    return (nearest[:, :, None] == nearest[:, None, :]).int().argmax(dim=2)


def margins(x, grid, rounds):
    """The smallest difference between the two nearest centres, per image and round."""
    out, distances = [], diclip.divergence

    def kept(centres, points):
        out.append(distances(centres, points))
        return out[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diclip, "divergence", kept)
        nearest = [diclip.regions(x, grid, number) for number in range(1, 1 + rounds)]
    last = out[-rounds:]
    for number in range(1, rounds):  # centres that are gone
        alive = nn.functional.one_hot(nearest[number - 1], last[0].shape[1]).sum(1) > 0
        last[number] = last[number].masked_fill(~alive[..., None], torch.inf)
    return torch.stack([(d.topk(2, dim=1, largest=False).values.diff(dim=1)[:, 0]).amin(dim=1) for d in last], dim=1)


def bias(case):
    grid = case.seen.grid
    clean = diclip.cleaned(case.attention.coarse)
    x = clean[:, 0] @ clean[:, 1]
    points = x.mT.masked_fill(x.mT == 0, 1e-6)
    return {"sd_logits_12": case.attention.coarse, "sd_attention_up3": case.all_heads, "sd_cleaned": clean, "sd_product": x,
            "sd_first_distance": diclip.divergence(points[:, diclip.start_places(grid)], points),
            "sd_cluster_rounds": cluster_rounds(x, grid, 5),
            "sd_cluster": first_members(diclip.regions(x, grid)), "sd_cluster_margin": margins(x, grid, 5),
            "sd_bias": diclip.region_bias(case.attention.coarse, grid), "rar_T": diclip.recursion_matrix(case.attention.fine)}


def two_paths(case):
    method, blocks = case.method, case.method.cfg.surgery_blocks
    true = excel.two_paths(method.clip, case.images, blocks, 12, aliased=False)
    plain = method.look(case.images, for_labels=False)
    return {"block_tokens": torch.stack(true.tokens), "decoder_features": torch.stack(case.seen.tokens),
            "attention_maps": true.maps.transpose(0, 1), "patch_features": case.seen.features,
            "infer_feature8": plain.tokens[8],
            "infer_logits": method.model(plain).logits}


def maps(case, prediction):
    method, seen, words = case.method, case.seen, len(case.names.classes)
    keys, values = method.model.keys, method.model.values
    weights = diclip.key_weights(keys, values, method.text_fg, method.text_bg)
    near = diclip.retrieved(seen.features, keys, weights)
    every = torch.tensor([(i, c) for i in range(len(case.images)) for c in range(words)])

    def all_maps(known):
        return method.cams(seen, known, every, 0)[0].flatten(1).view(len(case.images), words, -1).mT
    return {"text": torch.cat([method.text_fg, method.text_bg]), "cache_keys": keys, "cam_index": case.pairs,
            "text_map": excel.patch_word_maps(seen.features, method.words())[:, 1:, :words],
            "cache_w": excel.word_weights(seen.features[:, 0], keys)[:, None],
            "cache_sim": excel.similarity(seen.features, keys).relu(),
            "cache_V": weights, "cache_D_raw": near, "cache_D": diclip.stretched(near), "cache_map": diclip.cache_maps(near),
            "static_map": all_maps(None), "dynamic_map": all_maps(prediction), "adapter_out": prediction.adapted}


def refinement(case, prediction, prefix, step):
    """offline: nothing is learned, ten rounds."""
    method, size = case.method, case.images.shape[-2:]
    learned, cfg = prediction if prefix != "offline" else None, method.cfg
    method.cfg = replace(cfg, rar_rounds=10) if learned is None else cfg
    try:
        found = method.pseudo_labels(case.images, case.pairs, case.seen, learned, size, step)
        cams, attention_maps = method.cams(case.seen, learned, case.pairs, step)
        boxed = method.sources(cams, learned, case.pairs, step)
        affinity = method.affinity(attention_maps, learned, step)
    finally:
        rounds, method.cfg = method.cfg.rar_rounds, cfg
    fine, grid = case.attention.fine, case.attention.fine_grid
    matrix, start = diclip.recursion_matrix(fine), diclip.sum_to_one(cam.enlarge(found.flow, grid).flatten(1))
    out = {"affinity": affinity, "transition": found.transition, "refined": found.flow, "label": found.labels,
           "box": cam.box_masks(cams, cfg.box_fraction_free if learned is None else cfg.box_fraction), "rar_start": start,
           "rar_round1": diclip.recursed(matrix, start, case.pairs, 1),
           "rar_end": diclip.recursed(matrix, start, case.pairs, rounds),
           "map512": diclip.rar(fine, grid, found.flow, case.pairs, rounds),
           "scores": torch.cat([scores[:1 + n] for scores,
                                n in zip(found.scores, torch.bincount(case.pairs[:, 0]).tolist())])}
    assert torch.equal(boxed, cams * out["box"])
    return {f"{prefix}_{key}": value for key, value in out.items()}


def trained(model):
    """Parameters by name, in the reference's order: fuse head, decoder, adapter."""
    return dict(model.named_parameters())


def losses_and_gradients(case, labels, prefix, step):
    model = case.method.model
    losses = case.method.losses(model(case.seen), labels, step)
    model.zero_grad()
    losses["total"].backward()
    gradients = {name: p.grad.double().numpy() for name, p in trained(model).items()}
    return {f"{prefix}_losses": [losses[key].item() for key in ("seg", "aff", "adapter", "total")],
            f"{prefix}_grad_l2": [np.linalg.norm(g) for g in gradients.values()],
            f"{prefix}_grad_dot": [(g * golden.check_vector(name, g.shape)).sum() for name, g in gradients.items()]}


def steps(case):
    """Our training step on the one batch, from the recipe's weights, with the released schedule; dropout off."""
    training, method, rows = case.info["training"], case.fresh(), defaultdict(list)
    model, cfg = method.model, method.cfg
    assert (cfg.lr, cfg.max_iters, cfg.warmup) == (training["head_and_adapter_lr"], training["max_iter"],
                                                   training["warmup_iter"])
    optimizer = train.make_optimizer(model, cfg.lr, cfg.weight_decay)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    labels, made = torch.zeros(len(case.images), len(case.names.classes)), []
    labels[tuple(case.pairs.T)] = 1
    pseudo_labels = method.pseudo_labels
    method.pseudo_labels = lambda *args: made.append(pseudo_labels(*args)) or made[-1]
    for step in range(training["iterations"]):
        losses = train.train_step(method, optimizer, case.images, labels, step)
        rows["losses"].append([losses[key] for key in ("seg", "aff", "adapter", "total")])
        rows["lr"].append([optimizer.param_groups[0]["lr"]] * 2)
    for name, p in trained(model).items():
        delta = (p.detach() - before[name]).double().numpy()
        if name.endswith("in_proj_bias"):  # the key bias has gradient 0, and AdamW makes steps of its rounding noise
            delta[len(delta) // 3: 2 * len(delta) // 3] = 0
        rows["final_l2"].append(p.detach().double().norm())
        rows["delta_l2"].append(np.linalg.norm(delta))
        rows["delta_dot"].append((delta * golden.check_vector(name, p.shape)).sum())
    after = model(case.seen)
    rows |= {"logits_after": after.logits, "adapter_after": after.adapted, "label_final": made[-1].labels}
    return {f"train_{key}": value for key, value in rows.items()}


@cache
def ours(name):
    """Every quantity of a golden file from our functions, under the golden names, as arrays."""
    case = Case(name)
    method = case.method
    prediction = method.model(case.seen)
    out = bias(case) | two_paths(case) | maps(case, prediction)
    out |= {"fused": prediction.fused, "logits": prediction.logits, "attn_pred": method.learned(prediction, 0),
            "param_names": list(trained(method.model))}
    patches = case.seen.maps[:, -6:, 1:, 1:]
    mass = patches.double().sum(dim=(2, 3))
    out["layer_statistic"] = out["attn_pred"].double().sum(dim=(1, 2))[:, None] - mass
    out["layer_kept"] = mass >= mass.mean(dim=1, keepdim=True)
    for prefix, step in (("before", 0), ("after", method.cfg.dynamic_from), ("offline", None)):
        out |= refinement(case, prediction, prefix, step)
        if prefix != "offline":
            out |= losses_and_gradients(case, out[f"{prefix}_label"], prefix, step)
    out["affinity_label"] = decoder.affinity_label(out["before_label"], case.seen.grid, method.cfg.affinity_radius)
    return {key: parity.as_array(value) for key, value in (out | steps(case)).items()}


def thinned(ours, key, arrays):
    """Ours in the form in which the golden file keeps it."""
    name, _, form = key.partition("__")
    x = ours[name]
    if form[:1] == "s":
        return x[..., ::int(form[1:]), ::int(form[1:])]
    if form == "l2":
        lead = arrays[key].ndim
        return np.sqrt((x.reshape(*x.shape[:lead], -1) ** 2).sum(-1))
    return x.ravel()[arrays[f"{name}__index"]] if form == "values" else x


def errors(name):
    """{key: (error, allowed)} for every array of one golden file."""
    arrays, _ = golden.load_case(name)
    result = {}
    for key in compared(arrays):
        want, got = arrays[key], thinned(ours(name), key, arrays)
        assert got.shape == want.shape, f"{key}: ours {got.shape}, reference {want.shape}"
        labels = want.dtype.kind in "iubU"
        result[key] = parity.error(key, got, want), (1e-3 * ("label" in key) if labels else tolerance(key.partition("__")[0]))
    return result


def compared(arrays):
    return [key for key in golden.comparable(arrays) if not re.match(HALF, key)]


CASES = ["p6_diclip_tiny"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_the_released_code_gives_the_same(name, stage):
    of_stage = {key: pair for key, pair in errors(name).items() if stage_of(key) == stage}
    assert of_stage
    wrong = {key: f"{e:.2e} > {allowed:.0e}" for key, (e, allowed) in of_stage.items() if not e <= allowed}
    assert not wrong


@pytest.mark.parametrize("name", CASES)
def test_no_array_is_left_out(name):
    arrays, _ = golden.load_case(name)
    assert [key for key in compared(arrays) if stage_of(key) is None] == []


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_is_that_of_the_golden_file(name):
    """Sum, norm and first values of what the files were made of."""
    case = Case(name)
    recipe, wanted, state = case.info["attention"], case.info["recipe_check"], case.state()
    found = {f"{layer} {what}": x for layer in "PQ" for what, x in zip("qk", queries_keys(
        layer, len(case.images), recipe[layer]["heads"], recipe[layer]["side"], recipe[layer]["gain"], recipe["seed"]))}
    found |= {"cache keys": state["keys"], "cache values": state["values"], "Q attention": case.all_heads} | {
        name: x for name, x in state.items() if "adapter" in name}
    for key, x in found.items():
        assert list(x.shape) == wanted[key]["shape"], key
        assert float(x.double().norm()) == pytest.approx(wanted[key]["l2"], rel=1e-6), key


# ------------------------------------------------------------------------------------------------------- single functions

UNIT_INPUTS = (r"kl_[ab]|clean_in|blocks_in|rar_(value_in|cam)$|cache_(f|keys|values|texts)$|adapter_fc|attention_(x|bias)$"
               r"|label_(cams|image)|key_(features|mask)$|kmeans_points|lr_steps")
UNIT_DEVIATIONS = {  # what the released code does and ours does not
    "rar_zero_cam_label_reference": "NaN there, and the whole picture background",
    "denormalised_u8": "cut off there, rounded here"}


def unit_matrices(seed):
    """The inputs that the json describes: a smooth field of 20 x 20, and one of low contrast."""
    def noise(name, shape):
        return golden.noise("unit", name, shape, seed)
    at = (np.arange(20) + 0.5) / 20
    basis = np.stack([np.outer(np.cos(np.pi * u * at), np.cos(np.pi * v * at)).ravel() for u in range(4) for v in range(4)],
                     axis=1)
    z = basis @ noise("field", (16,)) + 0.05 * noise("field.noise", (400,))
    field = np.exp(-2 * (z[:, None] - z) ** 2) + 0.02 * np.abs(noise("field.X", (400, 400)))
    field[field < 0.15] = 0
    z = basis @ noise("flat.field", (16, 3))
    z = z / z.std(axis=0)
    near = z @ z.T / 3
    flat = np.maximum(0, 1 + near / np.abs(near).max() + 0.02 * noise("flat.X", (400, 400)))
    return [torch.from_numpy(x / x.sum(axis=1, keepdims=True)).float()[None] for x in (field, flat)]


def centres_per_round(x, grid):
    """How many start, and how many are left after each round."""
    return [len(diclip.start_places(grid)), *(len(diclip.regions(x, grid, rounds).unique()) for rounds in range(1, 6))]


@cache
def units():
    """Every array of p6_diclip_units from our functions, and the arrays themselves."""
    a, info = golden.load_case("p6_diclip_units")
    seed = int(re.search(r"seed (\d+)", info["random_numbers"])[1])
    t = {key: torch.from_numpy(x) for key, x in a.items() if x.dtype.kind in "iuf" and x.ndim}
    out = {f"anchors_{side}": diclip.start_places((side, side)) for side in (10, 14, 20, 24, 30)}
    out["kl_out"] = diclip.divergence(t["kl_a"][None], t["kl_b"][None])[0]
    out["clean_out"] = diclip.cleaned(t["clean_in"])
    out["clean_product"] = out["clean_out"][:, 1] @ out["clean_out"][:, 2]
    field, flat = unit_matrices(seed)
    for name, x, grid in (("cluster", field, (20, 20)), ("flat", flat, (20, 20)), ("blocks", t["blocks_in"][None], (6, 6))):
        nearest = diclip.regions(x, grid)
        means = diclip.region_means(x, nearest)[0]
        out |= {f"{name}_in": x[0], f"{name}_bias": means, f"{name}_first_member": first_members(nearest)[0],
                f"{name}_centres_per_round": centres_per_round(x, grid), f"{name}_rounds": cluster_rounds(x, grid, 5)[0],
                f"{name}_smallest_margin": margins(x, grid, 5)[0], f"{name}_bias_rowsum": means.sum(1)[::8]}

    q, k = queries_keys("U", 1, 3, 10, 1, seed)
    out["qk_logits"], q, k = diclip.logits_on(q.float(), k.float(), (10, 10), (20, 20)), q.float(), k.float()
    out["qk_probs"] = torch.stack([diclip.mean_attention(q[:, [i]], k[:, [i]])[0] for i in range(3)])[None]
    out["rar_value_out"] = diclip.contrasted(t["rar_value_in"])
    q, k = queries_keys("R", 1, 5, 12, 0.35, seed)
    out["rar_attention"] = torch.stack([diclip.mean_attention(q[:, [i]], k[:, [i]])[0] for i in range(5)])
    fine = out["rar_attention"][list(diclip.HEADS)].mean(0)[None]
    out["rar_transition"] = diclip.recursion_matrix(fine)[0]
    flow, pairs, size = t["rar_cam"].unflatten(1, (6, 6)), torch.tensor([[0, 3], [0, 14]]), (96, 80)
    out["rar_start"] = diclip.sum_to_one(cam.enlarge(flow, (12, 12)).flatten(1))

    def labelled(flow, pairs, rounds):
        maps = diclip.to_the_top(cam.enlarge(diclip.rar(fine, (12, 12), flow, pairs, rounds), size))
        return *cam.stack_scores(maps, pairs, 1)[:1], cam.best_label(*cam.stack_scores(maps, pairs, 1))[0]
    for rounds in (1, 5, 10):
        out[f"rar_round_{rounds}"] = diclip.recursed(out["rar_transition"][None], out["rar_start"], pairs, rounds)
        scores, out[f"rar_label_{rounds}"] = labelled(flow, pairs, rounds)
        out[f"rar_scores_{rounds}"] = scores[0]
    out["rar_one_class_label"] = labelled(flow[:1], pairs[:1], 5)[1]
    out["rar_label_beside_an_empty_map"] = labelled(flow * torch.tensor([1.0, 0])[:, None, None], pairs, 5)[1]

    f, keys, values = t["cache_f"], t["cache_keys"], t["cache_values"]
    text_fg, text_bg = t["cache_texts"].split([3, 2])
    weights = diclip.key_weights(keys, values, text_fg, text_bg)
    near = diclip.retrieved(f, keys, weights)
    words = excel.patch_word_maps(f, t["cache_texts"])
    adapter = diclip.Adapter(keys, values)
    out["adapter_copied"] = [float((adapter.fc1.weight[:9] - keys).norm()),
                             float((adapter.fc2.weight[:, :9] - values.T).norm())]
    adapter.fc1, adapter.fc2 = nn.Linear(16, 12), nn.Linear(12, 4)
    adapter.load_state_dict({f"{layer}.{what}": t[f"adapter_{layer}_{what}"] for layer in ("fc1", "fc2")
                             for what in ("weight", "bias")})
    adapted = adapter.eval()(f[:, 1:]).detach()
    out |= {"cache_w": excel.word_weights(f[:, 0], keys)[:, None], "cache_sim": excel.similarity(f, keys).relu(),
            "cache_V": weights,
            "cache_D_raw": near, "cache_D": diclip.stretched(near), "cache_map": diclip.cache_maps(near),
            "text_map_all": words,
            "static_map": diclip.stretched(0.5 * diclip.cache_maps(near) + words[:, 1:, :3]), "adapter_out": adapted,
            "dynamic_map": diclip.stretched(0.1 * adapted[..., 1:].relu() + words[:, 1:, :3])}

    mha, weights = nn.MultiheadAttention(128, 2, batch_first=True), {}
    for name, shape in {"qkv.weight": (384, 128), "qkv.bias": (384,), "proj.weight": (128, 128), "proj.bias": (128,)}.items():
        gain = 0.02 if "bias" in name else (1.5 if "qkv" in name else 1) / 128 ** 0.5
        weights[name] = torch.from_numpy(gain * golden.noise("unit", f"att.{name}", shape, seed)).float()
    mha.load_state_dict({"in_proj_weight": weights["qkv.weight"], "in_proj_bias": weights["qkv.bias"],
                         "out_proj.weight": weights["proj.weight"], "out_proj.bias": weights["proj.bias"]})
    q, k, v = backbone.queries_keys_values(mha.requires_grad_(False), t["attention_x"])
    out["attention_original"], mean_map = backbone.answer(mha, q, k, v, with_map=True)
    said = v.transpose(1, 2).flatten(2) @ mha.out_proj.weight.T
    plain = excel.likeness(q, k, v, (1, 2, 0)) @ said + mha.out_proj.bias
    out |= {"attention_returned": 2 * mean_map, "attention_plain_new": plain,
            "attention_biased_new": excel.biased(plain, 2 * said, t["attention_bias"][:, 0])}

    shown = t["label_image_labels"][0].nonzero()[:, 0]
    scores, ids = cam.stack_scores(diclip.to_the_top(t["label_cams"][0, shown]), torch.stack([0 * shown, shown], dim=1), 1)
    out["label_scores"] = torch.zeros(1, 5, *scores.shape[2:]).index_copy(1, ids[0], scores)
    out["label_out"] = cam.best_label(scores, ids)
    out["key_object"], out["key_background"] = diclip.object_and_ground(t["key_features"][0], t["key_mask"], (4, 4))
    places = torch.eye(16)  # each patch its own channel: which ones are inside?
    out["key_mask_small"] = diclip.object_and_ground(torch.cat([places[:1], places]), t["key_mask"], (4, 4))[0][0] > 0
    centres = excel.k_means(t["kmeans_points"], 4)
    out["kmeans_centres"] = centres[centres[:, 0].argsort()]
    for dataset in ("voc", "coco"):
        cfg = diclip.DiCLIP.rows[dataset]
        out[f"lr_{dataset}"] = [train.learning_rate(int(step), cfg.lr, cfg.max_iters, cfg.warmup) for step in a["lr_steps"]]
    return a, {key: parity.as_array(value) for key, value in out.items()}


def test_single_functions_of_the_released_code_give_the_same():
    arrays, found = units()
    keys = [key for key in compared(arrays) if key not in UNIT_DEVIATIONS and not re.match(UNIT_INPUTS, key)
            and not key.startswith("sd_")]
    wrong = {}
    for key in keys:
        got, want = thinned(found, key, arrays), arrays[key]
        assert got.shape == want.shape, f"{key}: ours {got.shape}, reference {want.shape}"
        e = parity.error(key, got, want)
        if not e <= ((2e-3 if "margin" in key else 1e-5) if want.dtype.kind == "f" else 0):
            wrong[key] = e
    assert not wrong and len(keys) == 61


def test_the_label_map_beside_a_class_without_activation_is_that_without_it():
    """In the released code all of it becomes background: NaN."""
    arrays, found = units()
    assert np.array_equal(found["rar_label_beside_an_empty_map"], arrays["rar_one_class_label"])
    assert found["rar_one_class_label"].any() and arrays["rar_zero_cam_label_reference"].nonzero()[0].tolist() == [0]


# --------------------------------------------------------------------------------------------------- bias, cache, recursion

TOY = data.DatasetInfo("toy", ("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e"), ("x", "y", "z"))


def made(tower, names=TOY, cache=True, source=None, **numbers):
    """DiCLIP on a small tower, with lively random weights, a random cache of two keys for each class, and a source."""
    row = diclip.DiCLIPConfig(surgery_blocks=2, static_maps=3, dynamic_maps=3, depth=1, affinity_radius=2, long_side=32,
                              attention=None)
    method = diclip.DiCLIP(replace(row, **numbers), names, {"clip": tower})
    if cache:
        generator = torch.Generator().manual_seed(5)
        values = torch.eye(names.num_classes).repeat_interleave(2, dim=0)
        torch.manual_seed(0)  # of the adapter's other rows
        method.model.take(torch.randn(len(values), 32, generator=generator) / 32 ** 0.5, values)
    lively = {name: torch.from_numpy(golden.affine(name, golden.noise("test", name, p.shape, seed=0))).float()
              for name, p in method.model.named_parameters() if "adapter" not in name}
    method.model.load_state_dict(method.model.state_dict() | lively)
    method.model.eval()
    method.source = source
    return method


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def patchwork(grid=(4, 6)):
    """Two halves that attend to themselves alone: logits (1, 2, N, N), and which half a patch belongs to (N,)."""
    half = (torch.arange(grid[0] * grid[1]) % grid[1] >= grid[1] // 2)
    return 10 * (half[:, None] == half).float().expand(1, 2, -1, -1), half


def test_what_counts_of_the_attention_is_a_fifth_of_the_maximum_of_its_column():
    """By hand: what is less is none; then rows sum to 1. A column that is negative throughout turns round."""
    logits = torch.tensor([[10.0, 1.1, -4], [1.9, 5, -2], [2.1, 0.9, -8]])
    columns = torch.tensor([[1, 0.22, 2], [0, 1, 1], [0.21, 0, 4]])
    slow.close(diclip.cleaned(logits), columns / columns.sum(dim=1, keepdim=True), 1e-4)


def test_the_contrast_of_the_recursion_is_a_soft_threshold():
    values = torch.tensor([0.0, 0.02, 0.1, 0.5, 1])
    expected = [0, 0, 0.1 + 0.02 * (math.log10(0.1) + math.log10(math.e)), 0.5 + 0.02 * math.log10(math.e / 2),
                1 + 0.02 * math.log10(math.e)]
    slow.close(diclip.contrasted(values), torch.tensor(expected))


def test_the_bias_of_two_halves_is_their_mean():
    """What attends to the same patches becomes one region; a row becomes the mean row of its region, and sums to 1."""
    logits, half = patchwork()
    bias, nearest = diclip.region_bias(logits, (4, 6)), diclip.regions(logits[:, 0], (4, 6))
    assert all(len(nearest[0, half == side].unique()) == 1 for side in (False, True)) and len(nearest.unique()) == 2
    slow.close(bias.sum(dim=2), torch.ones(1, 24), 1e-4)
    for side in (False, True):
        rows = bias[0, half == side]
        slow.close(rows, rows[:1].expand_as(rows))
        assert (rows[:, half != side] == 0).all()


def test_images_of_a_batch_do_not_see_one_another():
    """Clusters, bias and recursion, each image alone: one may have lost centres that the other still has."""
    other = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(3)) + 1
    both = torch.cat([patchwork()[0], other])
    slow.close(diclip.region_bias(both, (4, 6)), torch.cat([diclip.region_bias(x[None], (4, 6)) for x in both]))
    fine, flow = both[:, 0].softmax(-1), torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(4))
    pairs = torch.tensor([[0, 1], [0, 4], [0, 7], [1, 1], [1, 2]])
    alone = [diclip.rar(fine[[image]], (4, 6), flow[[p]], torch.tensor([[0, 0]]), 3) for p,
             image in enumerate(pairs[:, 0].tolist())]
    slow.close(diclip.rar(fine, (4, 6), flow, pairs, 3), torch.cat(alone))
    only_second = diclip.rar(fine, (4, 6), flow[3:], pairs[3:], 3)
    slow.close(only_second, torch.cat(alone[3:]))
    assert diclip.rar(fine, (4, 6), flow[:0], pairs[:0], 3).shape == (0, 512, 512)


def test_regions_are_those_of_slow_loops():
    """Any grid: start places, five rounds, centres that vanish; the first of equal ones wins."""
    grid, generator = (5, 7), torch.Generator().manual_seed(6)
    x = torch.randn(35, 35, generator=generator).mul(2).softmax(-1)
    x[x < 0.02] = 0
    points = [column.where(column > 0, 1e-6) + 1e-5 for column in x.T]
    centres = [x.T[y * 7 + left].where(x.T[y * 7 + left] > 0, 1e-6) for y in range(0, 5, 1) for left in range(0, 7, 2)]
    for _ in range(5):
        safe = [centre + 1e-5 for centre in centres]
        nearest = [min(range(len(safe)), key=lambda k: float(((safe[k] - p) * (safe[k].log() - p.log())).sum()))
                   for p in points]
        groups = [[points[i] - 1e-5 for i in range(35) if nearest[i] == k] for k in range(len(centres))]
        centres = [torch.stack(group).mean(0) for group in groups if group]
    ours = first_members(diclip.regions(x[None], grid))[0].tolist()
    assert ours == [nearest.index(number) for number in nearest]


def test_a_map_stays_in_the_region_that_it_lights_up_in():
    """The recursion carries it over the places that attend to one another, and not beyond."""
    fine = patchwork()[0][:, 0]
    flow = torch.zeros(1, 4, 6)
    flow[0, 1, 1] = 1
    spread = diclip.recursed(diclip.recursion_matrix(fine), diclip.sum_to_one(flow.flatten(1)), torch.tensor([[0, 0]]), 1)
    assert (spread.view(4, 6)[:, :3] > 0).sum() >= 11 and (spread.view(4, 6)[:, 3:] == 0).all()


def test_maps_without_activation_and_empty_rows_stay_zero():
    """Where the released code divides by zero."""
    assert not diclip.sum_to_one(torch.ones(2, 5)).any() and not diclip.stretched(torch.ones(2, 5, 3)).any()
    assert not diclip.to_the_top(torch.full((2, 4, 4), 3.0)).any()
    fine = torch.full((1, 4, 4), 0.01)
    fine[0, 0] = 1  # all others are below the threshold of their column
    matrix = diclip.recursion_matrix(fine)
    assert matrix.isfinite().all() and not matrix[0, 1:].any()
    assert diclip.recursion_matrix(torch.zeros(1, 4, 4)).isfinite().all()
    assert not diclip.rar(torch.rand(1, 4, 4), (2, 2), torch.zeros(1, 3, 3), torch.tensor([[0, 0]]), 2).any()


def test_a_class_without_a_box_leaves_the_others_their_labels(tower, images):
    """Its strongest spot lies in the last row: its refined map is zero. The released code labels all of the picture
    background."""
    fine = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(2))
    seen = made(tower).look(images[:1], True)._replace(fine=fine, fine_grid=(4, 5))
    flow = torch.stack([torch.rand(4, 5, generator=torch.Generator().manual_seed(3)), torch.zeros(4, 5)])
    method, pairs = made(tower), torch.tensor([[0, 1], [0, 3]])
    maps, scores, labels = method.label(images[:1], seen, flow, pairs, (32, 40))
    assert all(x.isfinite().all() for x in (maps, scores)) and set(labels.unique().tolist()) == {0, 2}
    assert torch.equal(labels, method.label(images[:1], seen, flow[:1], pairs[:1], (32, 40))[2])


def test_a_class_averages_over_its_own_keys_the_nearer_to_its_word_the_more():
    keys, values = torch.eye(4), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    words, background = torch.tensor([[0, 2.0, 1, 5], [0, 0, 0, 1]]), torch.rand(3, 4)
    e = math.e
    expected = torch.tensor([[1, 0, 0], [0, e / (1 + e), 0], [0, 1 / (1 + e), 0], [0, 0, 1]])
    slow.close(diclip.key_weights(keys, values, words, background), expected)


@pytest.mark.parametrize("dataset, expected", [
    # steps, rate, warm-up, keys, hidden, box, scoring, filter from, adapter from, own affinity from, rounds, logits, mirror,
    # trained parameters of the adapter and of all
    ("voc", (20_000, 2e-3, 50, 225, 312, 0.79, 0.79, 4_000, 0, None, 5, 0.4, False, 166_629, 6_479_866)),
    ("coco", (100_000, 1e-3, 200, 425, 512, 0.88, 0.88, 40_000, 60_000, 80_000, 10, 0.2, True, 304_209, 6_632_866))])
def test_the_rows_are_the_released_numbers(dataset, expected):
    cfg, names = diclip.DiCLIP.rows[dataset], data.DATASETS[dataset]
    keys = cfg.background_keys + len(names.classes) * cfg.keys_per_class
    head = diclip.HeadWithAdapter(names.num_classes, 768, 12, cfg.depth, torch.zeros(keys, 512),
                                  torch.zeros(keys, names.num_classes))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (head.dynamic_adapter, head)]
    assert expected == (cfg.max_iters, cfg.lr, cfg.warmup, keys, head.dynamic_adapter.fc1.out_features, cfg.box_fraction,
                        cfg.box_fraction_scoring, cfg.dynamic_from, cfg.adapter_from, cfg.own_affinity_from, cfg.rar_rounds,
                        cfg.logits_scale, cfg.mirror_at_1, *sizes)
    shared = {"batch_size": 4, "weight_decay": 0.01, "crop_size": 320, "long_side": 320, "scales": (0.7, 1, 1.2, 1.5),
              "surgery_blocks": 3, "static_maps": 6, "dynamic_maps": 6, "box_fraction_free": 0.88, "cache_rounds": 10,
              "crf_gaussian": (1, 3), "crf_bilateral": (67, 3, 4), "aliased": True, "summed_maps": True, "depth": 3}
    assert {name: getattr(cfg, name) for name in shared} == shared


def test_a_fresh_adapter_knows_the_cache_and_beside_it_random_rows_of_size_one():
    torch.manual_seed(0)
    keys, values = torch.randn(225, 64) / 8, torch.eye(21).repeat_interleave(torch.tensor([25] + 20 * [10]), dim=0)
    adapter = diclip.Adapter(keys, values)
    assert torch.equal(adapter.fc1.weight[:225], keys) and torch.equal(adapter.fc2.weight[:, :225], values.T)
    for rest in (adapter.fc1.weight[225:], adapter.fc2.weight[:, 225:]):
        assert rest.shape[0] * rest.shape[1] == 87 * (64 if rest.shape[0] == 87 else 21)
        assert rest.abs().max() <= 2 and rest.std().item() == pytest.approx(0.88, abs=0.05)  # a normal cut at two


# ---------------------------------------------------------------------------------------------------------------- the stages

def test_the_second_path_has_queries_once_keys_twice_and_the_bias_in_every_head(tower, images):
    """One block, one head after the other: the same matrix multiplies the values of all heads; CLS sees no bias."""
    method = made(tower, surgery_blocks=1, attention="dino", source=Counting())
    said = method.source(images, (4, 5), None, None)
    bias, block = diclip.region_bias(said.coarse, (4, 5)), tower.visual.transformer.resblocks[-1]
    x = excel.two_paths(tower, images, 0).tokens[-2]
    q, k, v = backbone.queries_keys_values(block.attn, block.ln_1(x))
    alike = 0
    for head in range(2):
        ways = [(y[:, head] @ y[:, head].mT / y.shape[-1] ** 0.5).softmax(-1) for y in (q, k)]
        alike = alike + ways[0] + 2 * ways[1]
        alike[:, 1:, 1:] += bias
    new = x + block.attn.out_proj(torch.cat([alike @ v[:, head] for head in range(2)], dim=-1))
    slow.close(method.look(images, True).tokens[2][:, 1:], new[:, 1:])


def test_the_adapter_takes_the_place_of_the_cache_when_it_has_learned(tower, images):
    """From adapter_from in training, always when scoring; with nothing learned the cache, without a cache words alone."""
    pairs, method = torch.tensor([[0, 1], [1, 3]]), made(tower, adapter_from=5)
    seen = method.look(images, True)
    with torch.no_grad():
        prediction = method.model(seen)
    maps = {step: method.cams(seen, prediction, pairs, step)[0] for step in (4, 5, None)}
    static = method.cams(seen, None, pairs, None)[0]
    assert torch.equal(maps[4], static) and torch.equal(maps[5], maps[None]) and (maps[4] - maps[5]).abs().max() > 1e-3
    words = excel.patch_word_maps(seen.features, method.words())[:, 1:, :5]
    weights = diclip.key_weights(method.model.keys, method.model.values, method.text_fg, method.text_bg)
    half = 0.5 * diclip.cache_maps(diclip.retrieved(seen.features, method.model.keys, weights))
    tenth = 0.1 * prediction.adapted[:, 1:].flatten(2).mT.relu()
    for expected, got in ((words + half, static), (words + tenth, maps[5]), (words, made(tower, cache=False).cams(seen, None, pairs)[0])):
        column = torch.stack([expected[0, :, 1], expected[1, :, 3]]).view(2, 4, 5)
        low, high = column.amin((1, 2), keepdim=True), column.amax((1, 2), keepdim=True)
        slow.close(got, (column - low) / (high - low))


def test_the_loss_of_the_adapter_counts_a_tenth(tower, images):
    method = made(tower)
    prediction = method.model(method.look(images, True))
    labels = torch.randint(0, 6, (2, 32, 40), generator=torch.Generator().manual_seed(2))
    losses = method.losses(prediction, labels, 0)
    large = nn.functional.interpolate(prediction.adapted, (32, 40), mode="bilinear", align_corners=False)
    slow.close(losses["adapter"], decoder.seg_loss(large, labels))
    slow.close(losses["total"], losses["seg"] + 0.1 * losses["aff"] + 0.1 * losses["adapter"])
    assert list(losses) == ["seg", "aff", "adapter", "total"]
    without = made(tower, cache=False)
    assert list(without.losses(without.model(without.look(images, True)), labels, 0)) == ["seg", "aff", "total"]


class Counting(nn.Module):
    """A source that counts its calls."""

    field = "attention"

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images, grid, step, amp):
        self.calls.append(step)
        generator, n = torch.Generator().manual_seed(len(images)), grid[0] * grid[1]
        return diclip.Attention(torch.rand(len(images), 2, n, n, generator=generator),
                                torch.rand(len(images), 9, 9, generator=generator), (3, 3))


def test_only_labels_ask_the_source(tower, images):
    """Segmentation and the maps of a decoder that learns from masks do without, unless the bias is wanted there."""
    source = Counting()
    method = made(tower, attention="dino", source=source)
    eager = made(tower, attention="dino", source=source, biased_inference=True)
    plain, asked = method.look(images, False), len(source.calls)
    method.logits(images[0])
    assert asked == len(source.calls) == 0
    labelled = method.look(images, True, 7)
    biased = eager.look(images, False)
    assert source.calls == [7, None]
    assert (plain.tokens[1] - labelled.tokens[1]).abs().max() > 1e-3
    slow.close(biased.tokens[1], labelled.tokens[1])
    slow.close(plain.tokens[0], labelled.tokens[0])
    assert plain.features is biased.features is plain.fine is biased.fine is None and labelled.fine.shape == (2, 9, 9)


def test_bias_and_recursion_can_be_switched_off_alone(tower, images):
    pairs = torch.tensor([[0, 1], [1, 3]])

    def found(**numbers):
        method = made(tower, attention="dino", source=Counting(), **numbers)
        return method.pseudo_labels(images, pairs, method.look(images, True), None, (32, 40))
    both, no_bias, no_rounds, neither = found(), found(bias=False), found(rar_rounds=0), found(bias=False, rar_rounds=0)
    none = made(tower)
    plain = none.pseudo_labels(images, pairs, none.look(images, True), None, (32, 40))
    assert all(torch.equal(*pair) for pair in zip(plain, neither))
    assert torch.equal(both.cams, no_rounds.cams) and torch.equal(no_bias.cams, plain.cams)
    assert not torch.equal(both.cams, plain.cams)
    assert torch.equal(both.maps, no_rounds.maps) and not torch.equal(both.scores, no_rounds.scores)
    assert not torch.equal(no_bias.scores, plain.scores)


def test_numbers_that_make_no_sense_are_refused(tower):
    row = diclip.DiCLIP.rows["voc"]
    for numbers, said in (({"lvc": True}, "--lvc and --clusters are ExCEL's"),
                          ({"clusters": 20}, "--lvc and --clusters are ExCEL's"),
                          ({"keys_per_class": 0}, "--keys-per-class, .*wanted numbers above 0")):
        with pytest.raises(data.DataError, match=said):
            replace(row, **numbers)
    with pytest.raises(data.DataError, match="--surgery-blocks 4: CLIP has 4 blocks, and the first is ordinary"):
        made(tower, surgery_blocks=4)


# ------------------------------------------------------------------------------------------------------ the attention sources

@pytest.fixture(scope="session")
def diffusion(tmp_path_factory):
    """A small Stable Diffusion of the same layout with random weights, as diffusers saves it."""
    why = "pip install diffusers transformers to test the diffusion model's path"
    diffusers, transformers = (pytest.importorskip(name, reason=why) for name in ("diffusers", "transformers"))
    root = tmp_path_factory.mktemp("stable diffusion")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        block_out_channels=(24, 48, 96, 96), attention_head_dim=[3, 6, 12, 12], cross_attention_dim=32, norm_num_groups=8,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), use_linear_projection=True, sample_size=8,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).save_pretrained(root / "unet")
    diffusers.AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
                            latent_channels=4,
                            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4).save_pretrained(root / "vae")
    diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                            steps_offset=1).save_pretrained(root / "scheduler")
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1,
        eos_token_id=2)).save_pretrained(root / "text_encoder")
    words = root / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    (words / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!", "model_max_length": 77}))
    return root


def manually(source, images, grid, noise):
    """What `source` should say: diffusers' own pipeline up to the layers, which are asked by a processor of ours that
    attends itself."""
    kept, unet, vae = {}, source.unet, source.vae
    layers = [unet.up_blocks[1].attentions[2].transformer_blocks[0].attn1,
              unet.up_blocks[3].attentions[1].transformer_blocks[0].attn1]

    class Attends:
        def __init__(self, number):
            self.number = number

        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **_):
            q, k, v = (attn.head_to_batch_dim(linear(x)) for linear in (attn.to_q, attn.to_k, attn.to_v))
            weights = attn.get_attention_scores(q, k)
            kept[self.number] = q, k, weights
            return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(weights @ v)))
    before = [layer.processor for layer in layers]
    for number, layer in enumerate(layers):
        layer.set_processor(Attends(number))
    import diffusers
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        pixels = torch.stack([torch.from_numpy(x) for x in images]).permute(0, 3, 1, 2) / 127.5 - 1
        latent = 0.18215 * vae.encode(pixels).latent_dist.mean
        time = scheduler.timesteps[45]
        unet(scheduler.add_noise(latent, noise, time), time, encoder_hidden_states=source.prompt.expand(len(latent), -1, -1))
    for layer, processor in zip(layers, before):
        layer.set_processor(processor)
    q, k = (x.unflatten(0, (len(images), -1)) for x in kept[0][:2])  # (B, heads, tokens, d)
    coarse = []
    for x in (q, k):
        side = tuple(-(-length // 4) for length in latent.shape[-2:])
        maps = x.flatten(0, 1).mT.unflatten(2, side)
        coarse.append(nn.functional.interpolate(maps, size=grid, mode="bilinear",
                                                align_corners=False).flatten(2).unflatten(0, x.shape[:2]))
    return (coarse[0].mT @ coarse[1])[:, 1:3], kept[1][2].unflatten(0, (len(images), -1))[:, 1:3].mean(dim=1)


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_the_diffusion_model_is_asked_as_in_the_released_code(diffusion, size):
    """Latent, noise, time step and heads, against diffusers' scheduler and a processor in the place of our hooks."""
    source = diclip.load_diffusion(str(diffusion)).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    images, grid = torch.stack([data.normalize(picture) for picture in pictures]), tuple(side // 16 for side in size)
    with torch.no_grad():
        found = source(images, grid, None, None)
        noise = torch.randn(4, *(side // 8 for side in size), generator=torch.Generator().manual_seed(diclip.SCORING_NOISE))
        expected = manually(source, pictures, grid, noise.expand(2, -1, -1, -1))
        slow.close(found.coarse, expected[0], 1e-4)
        slow.close(found.fine, expected[1], 1e-4)
        assert found.fine_grid == tuple(side // 8 for side in size) and found.coarse.shape == (2, 2, *[math.prod(grid)] * 2)
        torch.manual_seed(4)
        noise = torch.randn(2, 4, *(side // 8 for side in size))
        torch.manual_seed(4)
        slow.close(source(images, grid, 12, None).coarse, manually(source, pictures, grid, noise)[0], 1e-4)


def test_the_noise_is_the_steps_in_training_and_the_same_whenever_scored(diffusion):
    source = diclip.load_diffusion(str(diffusion)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def asked(step, seed, images=images):
        torch.manual_seed(seed)
        with torch.no_grad():
            return source(images, (4, 4), step, None).coarse
    assert torch.equal(asked(3, 1), asked(3, 1)) and not torch.equal(asked(3, 1), asked(3, 2))
    assert torch.equal(asked(None, 1), asked(None, 2))
    slow.close(asked(None, 1, images[1:]), asked(None, 1)[1:], 1e-4)  # whatever else is in the batch
    state = torch.random.get_rng_state()
    with torch.no_grad():
        source(images, (4, 4), None, None)
    assert torch.equal(torch.random.get_rng_state(), state)  # scoring leaves the training's random numbers alone


def test_the_time_step_and_its_noise_are_those_of_the_released_code(diffusion):
    arrays, _ = golden.load_case("p6_diclip_units")
    source = diclip.load_diffusion(str(diffusion))
    alpha_bar = source.alpha_bar
    assert source.time == arrays["sd_timesteps"][45] == 101
    assert [alpha_bar, alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5] == pytest.approx(arrays["sd_noise"].tolist(), rel=1e-5)


def test_pixels_reach_the_diffusion_model_as_they_are_in_the_file(diffusion, monkeypatch):
    """The released code cuts them off after the way there and back: some come back one lower, none otherwise."""
    source, seen = diclip.load_diffusion(str(diffusion)), []
    monkeypatch.setattr(source.vae, "encode", lambda x: seen.append(x) or pytest.skip.Exception)
    every = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)[:, None]  # (256, 1, 3)
    with pytest.raises(AttributeError):
        source.latents(data.normalize(every)[None])
    back = ((seen[0][0, :, :, 0] + 1) * 127.5).round()
    assert torch.equal(back, torch.arange(256.0).expand(3, -1))
    slow.close(seen[0][0, :, :, 0], torch.arange(256.0).expand(3, -1) / 127.5 - 1)
    arrays, _ = golden.load_case("p6_diclip_units")
    released = torch.from_numpy(arrays["denormalised_u8"].astype(np.float32))
    assert [(row != mine).sum().item() for row, mine in zip(released, back)] == [4, 1, 2] and ((back - released) <= 1).all()


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    return tmp_path / "sd"


@pytest.mark.parametrize("damage", [
    lambda root: shutil.rmtree(root / "vae"),
    lambda root: (root / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights"),
    lambda root: (root / "unet" / "diffusion_pytorch_model.safetensors").rename(root / "unet/diffusion_pytorch_model.bin"),
    lambda root: (root / "text_encoder" / "model.safetensors").rename(root / "text_encoder" / "pytorch_model.bin"),
    lambda root: (root / "unet" / "config.json").write_text("{"),
    lambda root: shutil.rmtree(root)])
def test_a_folder_that_is_no_stable_diffusion_is_refused_and_no_pickle_is_opened(diffusion, tmp_path, damage, monkeypatch):
    root = copied(diffusion, tmp_path)
    damage(root)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickled file was opened"))
    said = f"--attention {root}: no Stable Diffusion 2.1 in diffusers' format with safetensors, or out of reach ("
    with pytest.raises(data.DataError, match=re.escape(said)):
        diclip.load_diffusion(str(root))


def test_a_unet_of_another_layout_is_refused(diffusion, tmp_path):
    diffusers, root = import_module("diffusers"), copied(diffusion, tmp_path)
    diffusers.UNet2DConditionModel(block_out_channels=(8, 16), attention_head_dim=8, cross_attention_dim=32,
                                   norm_num_groups=8,
                                   down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
                                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).save_pretrained(root / "unet")
    with pytest.raises(data.DataError, match="no Stable Diffusion 2.1"):
        diclip.load_diffusion(str(root))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    for missing in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(data.DataError, match="needs two more packages: `pip install diffusers transformers`; or take "
                                                 "--attention dino, or none"):
            diclip.load_diffusion("anything")
        monkeypatch.delitem(sys.modules, missing)


def test_weights_have_one_fingerprint_in_half_precision_and_in_full(diffusion):
    """A checkpoint moves between a GPU and a CPU."""
    source = diclip.load_diffusion(str(diffusion))
    fingerprint = backbone.fingerprint(source)
    assert fingerprint == backbone.fingerprint(source.half()) and source.prompt.dtype == torch.float16


def test_dino_stands_in_with_the_cosines_of_its_features(world):
    """On CLIP's grid and on its own; what looks alike attends."""
    dino = backbone.load_dino(str(world / "dino.pth"))
    images = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    found = diclip.FromDino(dino)(images, (4, 5), None, None)
    features = backbone.dino_features(dino, images)
    assert found.fine_grid == tuple(features.shape[-2:]) == (4, 5) and torch.equal(found.coarse[:, 0], found.coarse[:, 1])
    a, b = features[0, :, 1, 2], features[0, :, 3, 4]
    slow.close(found.coarse[0, 0, 7, 19], a @ b / (a.norm() * b.norm()), 1e-4)
    slow.close(found.fine[0, 7], (10 * found.coarse[0, 0, 7]).softmax(0), 1e-4)
    assert diclip.FromDino(dino)(images, (8, 10), None, None).coarse.shape == (1, 2, 80, 80)


# ----------------------------------------------------------------------------------------------------------------- the cache

SMALL = ("--keys-per-class", 2, "--background-keys", 3)


def draw(path, rng):
    """A picture of large spots that nobody has seen before."""
    Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((70, 84)).save(path)


@pytest.fixture(scope="module")
def world(world, tmp_path_factory):
    """The tiny world with four more training pictures of each class: in some a mask is empty."""
    root, rng = tmp_path_factory.mktemp("wide") / "pictures", np.random.default_rng(7)
    shutil.copytree(world, root)
    lines = (root / "labels.csv").read_text(encoding="utf-8").splitlines()
    for number in range(12):
        draw(root / "images" / f"more{number}.png", rng)
        shutil.copy(root / "masks" / f"{number % 3}.png", root / "masks" / f"more{number}.png")
        lines.append(f"more{number}.png,{CLASSES[number % 3]},train")
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


def making(world, *more):
    """The command line that makes a small cache."""
    return [*map(str, ("cache", world, "--clip", world / "clip.pt", "--attention", "none", "--long-side", 64, "--device",
                       "cpu", *SMALL, *more))]


def settings_of(path):
    return torch.load(path, weights_only=True)["settings"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which runs/ appears."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_cache_is_k_means_of_features_inside_and_outside_of_training_free_masks(world, here, capsys):
    """Against slow loops over the pictures; in a file of plain tensors, names and fingerprints."""
    assert diclip.main(making(world, "--output", here / "cache.pt")) == 0
    said, stored = capsys.readouterr().out, torch.load(here / "cache.pt", weights_only=True)
    assert "cache.pt: 9 keys, background 3, cat 2, sofa 2, tree house 2\nnext: " in said and "--cache cache.pt" in said
    tower = backbone.load_clip(str(world / "clip.pt"))
    assert stored["classes"] == list(CLASSES) and stored["clip"] == backbone.fingerprint(tower)
    assert stored["values"].argmax(1).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3] and not (here / "cache.part").exists()
    info = data.dataset_info(str(world))
    row = replace(diclip.DiCLIP.rows["voc"], clip=str(world / "clip.pt"), attention=None, cache=None, long_side=64,
                  rar_rounds=10,
                  box_fraction_free=0.79)
    frozen = diclip.DiCLIP.load(row, "cpu")
    method = diclip.DiCLIP(diclip.DiCLIP.suited(row, frozen), info, frozen)
    method.model.eval()
    found = {number: [] for number in range(4)}
    for sample in sorted(data.list_samples(info, world, "train"), key=lambda sample: sample.labels):
        image = data.load_image(sample.image)
        item = data.as_item(sample, image, None, 4)
        label = method.ladder(item["image"], item["labels"], trained=False).labels["pseudo label"]
        features = method.look(method.network_image(item["image"]), True).features[0, 1:]
        rows, columns = ([i * length // 4 for i in range(4)] for length in label.shape)
        small = label[rows][:, columns].flatten()
        if small.any():
            found[1 + sample.labels[0]].append(features[small > 0].mean(0))
            found[0] += [features[small == 0].mean(0)] if (small == 0).any() else []
    for number, points in found.items():
        keys = stored["keys"][stored["values"][:, number] == 1]
        slow.close(keys, excel.k_means(torch.stack(points), len(keys)), 1e-4)


def test_a_cache_that_was_stopped_goes_on_where_it_was(world, here, monkeypatch):
    """Every picture is looked at once."""
    looked = []
    diclip.main(making(world, "--output", here / "whole.pt"))
    load, stop = data.load_image, 5

    def until(path, as_displayed=False):
        if len(looked) == stop:
            raise KeyboardInterrupt
        looked.append(path)
        return load(path, as_displayed)
    monkeypatch.setattr(data, "load_image", until)
    with pytest.raises(KeyboardInterrupt):
        diclip.main(making(world, "--output", here / "stopped.pt"))
    assert (here / "stopped.part").exists() and not (here / "stopped.pt").exists()
    stop = None
    diclip.main(making(world, "--output", here / "stopped.pt"))
    assert len(looked) == len(set(looked)) == 20
    a, b = (torch.load(here / name, weights_only=True) for name in ("whole.pt", "stopped.pt"))
    assert torch.equal(a["keys"], b["keys"]) and torch.equal(a["values"], b["values"]) and a["settings"] == b["settings"]
    torch.save({"settings": {}, "done": 3}, here / "other.part")  # of something else: begun anew
    diclip.main(making(world, "--output", here / "other.pt"))
    assert torch.equal(torch.load(here / "other.pt", weights_only=True)["keys"], a["keys"])


def test_classes_with_too_few_pictures_are_named(world, here):
    with pytest.raises(data.DataError, match=r"a cache of 7 keys for each class: too few pictures with a single label of "
                                             r"tree house \(6\); add some, or take --keys-per-class N, or --cache none"):
        diclip.main(making(world, "--keys-per-class", 7))
    with pytest.raises(data.DataError, match=r"a cache of 99 keys for the background: the pictures have \d+ different ones"):
        diclip.main(making(world, "--background-keys", 99))
    root = shutil.copytree(world, here / "own")
    for name in ("3", "6", "more0", "more3", "more6", "more9"):  # the cats are all the same picture
        shutil.copy(root / "images" / "0.png", root / "images" / f"{name}.png")
    with pytest.raises(data.DataError, match=r"too few different pictures with something found in them of cat \([01]\)"):
        diclip.main(making(root))
    assert not list((here / "runs").rglob("*.pt"))


def test_pictures_of_a_folder_are_a_cache_for_classes_of_their_names(world, here):
    """In any order; a class that the data set lacks is named, one that has no pictures as well."""
    rng = np.random.default_rng(3)
    for name in ("sofa", "cat", "tree house"):
        (here / "made" / name).mkdir(parents=True)
        for number in range(4):
            draw(here / "made" / name / f"{number}.png", rng)
    diclip.main(making(world, "--pictures", here / "made", "--output", here / "cache.pt"))
    stored = torch.load(here / "cache.pt", weights_only=True)
    assert stored["classes"] == list(CLASSES) and len(stored["keys"]) == 9
    (here / "made" / "sofa").rename(here / "made" / "settee")
    with pytest.raises(data.DataError, match="made: settee no class of folder; wanted cat, sofa, tree house"):
        diclip.main(making(world, "--pictures", here / "made"))
    shutil.rmtree(here / "made" / "settee")
    with pytest.raises(data.DataError, match=r"too few pictures with a single label of sofa \(0\)"):
        diclip.main(making(world, "--pictures", here / "made"))


def test_so_many_pictures_of_a_class_are_taken_from_all_over_it():
    samples = [data.Sample(str(i), "", None, labels, "csv") for i,
               labels in enumerate([(0,)] * 9 + [(0, 1), (), (1,), (1,), (1,)])]
    info, cfg = data.with_prompts("two", ("a", "b"), ()), replace(diclip.DiCLIP.rows["voc"], keys_per_class=2,
                                                                  cache_pictures=3)
    assert [sample.name for sample in diclip.of_one_class(samples, info, cfg)] == ["0", "4", "8", "11", "12", "13"]


@pytest.mark.parametrize("change, said", [
    (lambda cache: cache.update(classes=["cow", "cat"]),
     r"cache.pt: a cache of the classes \['cow', 'cat'\], wanted \['cat', "),
    (lambda cache: cache.update(clip="0123"), r"cache.pt: a cache of another CLIP \(0123\) than this one"),
    (lambda cache: cache.pop("keys"), "cache.pt: its cache is missing, damaged, or not of 3 classes and a CLIP of width 32"),
    (lambda cache: cache.update(keys=[1]), "cache.pt: its cache is missing, damaged"),
    (lambda cache: cache["keys"].fill_(torch.nan), "cache.pt: its cache is missing, damaged"),
    (lambda cache: cache["values"].fill_(0), "cache.pt: its cache is missing, damaged"),
    (lambda cache: cache["values"].copy_(torch.eye(4)[[0]].expand(9, -1)), "cache.pt: its cache is missing, damaged"),
    (lambda cache: cache.clear(), "cache.pt: its cache is missing, damaged")])
def test_a_file_that_is_no_cache_for_this_is_refused(world, here, change, said):
    diclip.main(making(world, "--output", here / "cache.pt"))
    cache = torch.load(here / "cache.pt", weights_only=True)
    change(cache)
    torch.save(cache, here / "cache.pt")
    with pytest.raises(data.DataError, match=said):
        train.main(arguments(world, here / "run", "--method", "diclip", "--cache", here / "cache.pt"))


def test_foreign_files_are_not_opened_as_caches(world, here):
    for name, content in (("text.pt", b"no cache"), ("pickle.pt", pickle.dumps(Path))):
        (here / name).write_bytes(content)
        with pytest.raises(data.DataError, match=f"{name}: its cache is missing, damaged"):
            train.main(arguments(world, here / "run", "--method", "diclip", "--cache", here / name))
        with pytest.raises(data.DataError, match=f"{name} holds something else; delete it, or choose another --output"):
            diclip.main(making(world, "--output", here / name))
    with pytest.raises(data.DataError, match="none.pt: no such cache; make one with"):
        train.main(arguments(world, here / "run", "--method", "diclip", "--cache", here / "none.pt"))


# --------------------------------------------------------------------------------------------------------------- 05 and 06

RUN = ("--method", "diclip", "--dynamic-from", 2, "--max-iters", 4, "--eval-every", 100)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A training with DINO and a cache of its own pictures, not stopped."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(arguments(world, folder / "whole", *RUN, "--cache", "made", *SMALL)) == 0
    return folder / "whole"


def test_a_run_stopped_anywhere_ends_like_one_that_was_not(world, whole, here, monkeypatch):
    """Its cache is made once; where its file is gone, it is made again and the run keeps its own."""
    shutil.copytree(whole.parent / "runs", here / "runs")
    monkeypatch.setattr(diclip, "gathered", lambda *_: pytest.fail("the cache was made again"))
    for stop in (1, 3):
        train.main(arguments(world, here / str(stop), *RUN, "--cache", "made", *SMALL, "--max-iters", stop))
        assert train.main(["--resume", str(here / str(stop)), "--max-iters", "4", "--print-freq", "1"]) == 0
        assert logged(here / str(stop)) == logged(whole)
        ours, theirs = read(here / str(stop))["model"], read(whole)["model"]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    shutil.rmtree(here / "runs")
    assert train.main(["--resume", str(here / "3"), "--max-iters", "5", "--print-freq", "1"]) == 0
    assert torch.equal(read(here / "3")["model"]["keys"], read(whole)["model"]["keys"])


def test_the_command_and_05_make_the_same_cache(world, whole, here, capsys):
    """In the same place; neither makes it twice."""
    line = arguments(world, here / "run", *RUN)[1:]
    asked = dict(zip(line[::2], line[1::2]))
    diclip.main(["cache", str(world), *(x for what in ("--clip", "--dino", "--attention", "--long-side")
                                        for x in (what, asked[what])),
                 "--device", "cpu", *map(str, SMALL)])
    made_by_05, made_here = (sorted(path.name for path in (folder / "runs" / "cache").glob("*"))
                             for folder in (whole.parent, here))
    assert made_by_05 == made_here and len(made_here) == 1
    stored = torch.load(here / "runs" / "cache" / made_here[0], weights_only=True)
    assert torch.equal(stored["keys"], read(whole)["model"]["keys"])
    assert "DINO stands in for the diffusion model; a variant, not the paper's" in capsys.readouterr().out


def test_06_loads_no_attention_source_to_segment_a_picture(world, whole, tmp_path, monkeypatch, capsys):
    """Nor a cache. For CAMs and pseudo labels it does, and only the one of the training will do."""
    monkeypatch.setattr(diclip, "load_source", lambda *_: pytest.fail("the source was loaded"))
    monkeypatch.setattr(diclip, "read_cache", lambda *_: pytest.fail("a cache was read"))
    argv = [str(whole / "best.pt"), "--device", "cpu"]
    assert infer.main([*argv, str(world / "images" / "1.png"), "--output-dir", str(tmp_path)]) == 0
    assert infer.main([*argv, "--data-path", str(world), "--output-dir", str(tmp_path / "val")]) == 0
    with pytest.raises(pytest.fail.Exception, match="source was loaded"):
        infer.main([*argv, "--data-path", str(world), "--cams", "--output-dir", str(tmp_path / "cams")])
    monkeypatch.undo()
    capsys.readouterr()
    assert infer.main([*argv, "--data-path", str(world), "--cams", "--output-dir", str(tmp_path / "cams")]) == 0
    said = capsys.readouterr().out
    assert "diclip, trained on folder for 4 steps" in said and "pseudo label" in said and "DINO stands in" in said
    torch.save(golden.dino_state_dict(golden.DINO_LAYOUTS["tiny"], seed=9), tmp_path / "other.pth")
    with pytest.raises(data.DataError, match=r"trained with another dino than .*other.pth \([0-9a-f]{16}\): with "
                                             "[0-9a-f]{16}; give that one with --dino"):
        infer.main([*argv, "--data-path", str(world), "--cams", "--output-dir", str(tmp_path / "other"), "--dino",
                    str(tmp_path / "other.pth")])


def test_pseudo_labels_are_the_same_whenever_they_are_written(world, whole, tmp_path):
    for name in ("a", "b"):
        infer.main([str(whole / "best.pt"), "--device", "cpu", "--data-path", str(world), "--cams", "--output-dir",
                    str(tmp_path / name)])
    files = sorted((tmp_path / "a" / "pseudo_label").glob("*.png"))
    assert len(files) == 4 and all(path.read_bytes() == (tmp_path / "b" / "pseudo_label" / path.name).read_bytes()
                                   for path in files)


@pytest.mark.parametrize("damage", [
    lambda model: model.pop("keys"), lambda model: model["keys"].fill_(torch.nan),
    lambda model: model.update(values=torch.rand(9, 4)),
    lambda model: model.update(keys=torch.rand(9, 31)), lambda model: model.pop("source"),
    lambda model: model.pop("dynamic_adapter.fc1.weight"), lambda model: model.update(source=torch.zeros(9))])
def test_a_damaged_checkpoint_is_refused(world, whole, tmp_path, damage):
    checkpoint = read(whole)
    damage(checkpoint["model"])
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(data.DataError, match="last.pt: its weights do not fit its own config and backbones"):
        infer.main([str(tmp_path / "last.pt"), "--data-path", str(world), "--device", "cpu"])


@pytest.mark.parametrize("more", [
    ("--amp",), ("--attention", "none"), ("--no-aliased", "--no-summed-maps", "--surgery-blocks", 0),
    ("--biased-inference", "--no-bias"),
    ("--biased-inference",), ("--rar-rounds", 0, "--own-affinity-from", 2, "--adapter-from", 3)])
def test_it_trains_with_amp_and_with_parts_switched_off(world, here, more):
    assert train.main(arguments(world, here / "run", *RUN, "--cache", "made", *SMALL, *more)) == 0
    rows = logged(here / "run")
    assert len(rows) == 4 and all(np.isfinite(float(value)) for row in rows
                                  for value in row.values()) and "adapter" in rows[0]


def test_with_masks_neither_source_nor_cache_is_asked_for(world, here, monkeypatch):
    monkeypatch.setattr(diclip, "load_source", lambda *_: pytest.fail("the source was loaded"))
    monkeypatch.setattr(diclip, "made_cache", lambda *_: pytest.fail("a cache was made"))
    assert train.main(arguments(world, here / "run", *RUN, "--masks", "truth", "--cache", "made", "--own-affinity-from",
                                1)) == 0
    config = read(here / "run")["config"]
    assert (config["attention"], config["cache"], config["own_affinity_from"]) == (None, None, None)
    assert "adapter" not in logged(here / "run")[0]
    assert infer.main([str(here / "run" / "best.pt"), "--data-path", str(world), "--device", "cpu"]) == 0


def test_it_trains_stops_and_segments_with_a_diffusion_model(world, diffusion, here, monkeypatch, capsys):
    """Resumed from another place of the same weights; two runs agree, with its noise; 06 --attention says where it is by
    then."""
    line = (*RUN, "--attention", diffusion, "--cache", "made", *SMALL)
    assert train.main(arguments(world, here / "whole", *line)) == 0
    assert train.main(arguments(world, here / "run", *line, "--max-iters", 2)) == 0
    frozen = read(here / "run")["frozen"]
    assert frozen["attention"]["name"] == str(diffusion) and set(frozen) == {"clip", "attention"}
    moved = copied(diffusion, here)
    assert train.main(["--resume", str(here / "run"), "--max-iters", "4", "--print-freq", "1", "--attention",
                       str(moved)]) == 0
    assert logged(here / "run") == logged(here / "whole")
    ours, theirs = read(here / "run")["model"], read(here / "whole")["model"]
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    capsys.readouterr()
    argv = [str(here / "run" / "best.pt"), "--device", "cpu", "--data-path", str(world), "--cams", "--attention",
            str(diffusion)]
    assert infer.main(argv) == 0
    assert "variant" not in capsys.readouterr().out
    with pytest.raises(data.DataError, match="last.pt: attention is .* this run has "):
        weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
        safetensors = import_module("safetensors.torch")
        safetensors.save_file({name: x + 1 for name, x in safetensors.load_file(weights).items()}, weights, {"format": "pt"})
        train.main(["--resume", str(here / "run"), "--max-iters", "5", "--attention", str(moved)])
    with pytest.raises(data.DataError, match="trained with another attention than .*; give that one with --attention"):
        infer.main([*argv[:-1], str(moved), "--output-dir", str(here / "moved")])


# --------------------------------------------------------------------------------------------------------- several processes

def steps_of_a_half(rank, world_size, method, images, labels, folder):
    """What each of two processes does: steps before and after the filter; then its share of an odd number of pictures."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meeting", world_size), rank=rank,
                                world_size=world_size)
        method.network = nn.parallel.DistributedDataParallel(method.model)
    mine, losses, gradients = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size), [], []
    optimizer = train.make_optimizer(method.model, method.cfg.lr)
    for step in (0, 1):
        losses.append(train.train_step(method, optimizer, images[mine], labels[mine], step))
        gradients.append({name: p.grad.clone() for name, p in method.model.named_parameters()})
    rng, samples = np.random.default_rng(8), []
    for number, label in enumerate(labels[:3]):
        picture, mask = f"{folder}/{rank}_{number}.png", f"{folder}/{rank}_{number}_mask.png"
        Image.fromarray(rng.integers(0, 256, (20 + 3 * number, 32, 3), dtype=np.uint8)).save(picture)
        data.save_mask(mask, rng.integers(0, 6, (20 + 3 * number, 32)))
        samples.append(data.Sample(str(number), picture, mask, tuple(label.nonzero()[:, 0].tolist()), "made"))
    matrices = train.evaluate(method, samples)
    if rank == 0:
        torch.save({"losses": losses, "gradients": gradients, "matrices": matrices}, f"{folder}/{world_size}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_are_one(tower, world, tmp_path):
    """Losses and gradients of the whole batch, the adapter's too. Three pictures among two: one scores twice and waits for
    nobody."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    images[2:] += 3 * torch.randn(1, 3, 1, 1, generator=generator)  # the halves differ
    labels = (torch.eye(5)[[0, 1, 2, 4]] + torch.eye(5)[[3, 3, 0, 4]] > 0).float()
    runs = {}
    for world_size in (1, 2):
        method = made(tower, source=diclip.FromDino(backbone.load_dino(str(world / "dino.pth"))), attention="dino",
                      dynamic_from=1, warmup=0,
                      lr=1e-12)  # weights stay
        given = (world_size, method, images, labels, str(tmp_path))
        if world_size == 1:
            steps_of_a_half(0, *given)
        else:
            torch.multiprocessing.spawn(steps_of_a_half, given, nprocs=world_size)
        runs[world_size] = torch.load(tmp_path / f"{world_size}.pt", weights_only=True)
    one, two = runs[1], runs[2]
    for ours, theirs in zip(two["losses"], one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
        largest = max(gradient.abs().max() for gradient in theirs.values())
        assert all((ours[name] - gradient).abs().max() < 1e-5 * largest for name, gradient in theirs.items())
    assert all(torch.equal(two["matrices"][rung], matrix) for rung, matrix in one["matrices"].items())


def test_two_processes_of_torchrun_share_one_cache(world, here):
    """One of them makes it, the other reads it; then they train."""
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    free = port.getsockname()[1]
    port.close()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free}",
                           str(ROOT / "05_train.py"), *arguments(world, here / "run", *RUN, "--cache", "made", *SMALL, "-b",
                                                                 1)],
                          capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DINO stands in") == 1 and len(list((here / "runs" / "cache").glob("*"))) == 1
    assert len(logged(here / "run")) == 4 and len(read(here / "run")["model"]["keys"]) == 9


def main():
    print("| stage |", " | ".join(CASES), "|\n" + "|---" * (1 + len(CASES)) + "|")
    for stage in STAGES:
        worst = [[(e, key) for key, (e, _) in errors(name).items() if stage_of(key) == stage] for name in CASES]
        print(f"| {stage} |", " | ".join(f"{max(found)[0]:.0e} {max(found)[1]}" for found in worst), "|")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
