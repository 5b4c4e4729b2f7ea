"""Does each part of 02 do what its docstring says? Each is held against something written in another way.

The oracles are torch's own modules, the clip package and slow loops (slow.py). No file outside this folder is read; the
numbers of the authors' code are in test_parity.py.
"""
import hashlib
from importlib import import_module

import clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import golden
from slow import close, cubic, linear, resize_grid

data = import_module("01_data")
backbone = import_module("02_backbone")


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------------- CLIP

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
    seen = backbone.look(tower, images)
    assert len(seen.tokens) == 3 and seen.grid == (4, 4)  # all blocks but the last
    for got, expected in zip(seen.tokens, inputs[1:], strict=True):
        close(got, expected)


def test_attention_maps_are_those_of_torchs_own_attention(tower, images):
    """nn.MultiheadAttention can return its weights, averaged over heads; rows are queries."""
    _, attention_inputs = record_blocks(tower, images)
    maps = backbone.look(tower, images, num_maps=3).maps
    assert maps.shape == (2, 3, 17, 17)  # the last block's own map is made in 03
    for i, x in enumerate(attention_inputs[:-1]):
        x = x.transpose(0, 1)  # (T, B, D)
        close(maps[:, i], tower.visual.transformer.resblocks[i].attn(x, x, x)[1])


def test_fewer_maps_are_the_last_ones_and_change_no_token(tower, images):
    """With and without its map the attention of a block is computed in two ways."""
    seen, fewer, none = (backbone.look(tower, images, num_maps=count) for count in (3, 1, 0))
    close(fewer.maps, seen.maps[:, -1:])
    assert none.maps.shape == (2, 0, 17, 17)
    for other in (fewer, none):
        close(other.tokens[-1], seen.tokens[-1])


def test_pixels_beyond_the_last_whole_patch_do_not_matter(tower):
    """Sizes need not be multiples of the patch: the convolution drops the rest, the grid is floor(H/p) x floor(W/p)."""
    images = torch.randn(1, 3, 35, 47, generator=torch.Generator().manual_seed(1))
    seen = backbone.look(tower, images)
    assert seen.grid == (4, 5) and seen.tokens[0].shape == (1, 1 + 4 * 5, 128)
    close(seen.tokens[-1], backbone.look(tower, images[:, :, :32, :40]).tokens[-1])


def test_a_picture_at_its_long_side_keeps_its_shape_and_leaves_a_patch():
    """27 * 40 / 33 is 32.7 and truncated; of 2 x 90 pixels no side may be less than asked for."""
    picture = torch.randn(3, 27, 33, generator=torch.Generator().manual_seed(5))
    resized = backbone.at_long_side(picture, 40, shortest=8)
    expected = resize_grid(picture[1], (32, 40), (32 / 27, 40 / 33), kernel=linear, support=1)
    assert resized.shape == (1, 3, 32, 40)
    close(resized[0, 1], expected)
    assert backbone.at_long_side(torch.zeros(3, 2, 90), 40, shortest=8).shape == (1, 3, 8, 40)


def test_clip_positions_are_resized_bilinearly_without_the_class_entry():
    embedding = torch.randn(1 + 4 * 4, 1, generator=torch.Generator().manual_seed(2))
    resized = backbone.clip_position_embedding(embedding, (3, 7))
    expected = resize_grid(embedding[1:, 0].reshape(4, 4), (3, 7), (3 / 4, 7 / 4), kernel=linear, support=1)
    close(resized[0], embedding[0])
    close(resized[1:, 0].reshape(3, 7), expected)
    close(backbone.clip_position_embedding(embedding, (4, 4)), embedding)


def test_text_features_are_unit_vectors_of_the_filled_in_template(tower):
    features = backbone.text_features(tower, ("cat", "chair seat"))
    expected = tower.encode_text(clip.tokenize(["a clean origami cat.", "a clean origami chair seat."]))
    close(features, expected / expected.norm(dim=1, keepdim=True))


# -------------------------------------------------------------------------------------------------------------- DINO

@pytest.mark.parametrize("registers", [0, 4])
def test_dino_positions_follow_the_two_conventions_of_the_official_models(registers):
    """Plain models stretch by (n + 0.1) / G, register models by n / G with antialiasing; both are bicubic."""
    model = backbone.DINOv2(width=1, depth=0, heads=1, grid=9, registers=registers)
    nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(3))
    grid = model.pos_embed.detach()[0, 1:, 0].reshape(9, 9)
    if registers:
        expected = resize_grid(grid, (4, 6), (4 / 9, 6 / 9), kernel=cubic(-0.5), support=2, antialias=True)
    else:
        expected = resize_grid(grid, (4, 6), (4.1 / 9, 6.1 / 9), kernel=cubic(-0.75), support=2)
    resized = model.position_embedding(4, 6).detach()
    close(resized[0, 1:, 0].reshape(4, 6), expected)
    close(resized[:, 0], model.pos_embed.detach()[:, 0])
    assert model.position_embedding(9, 9) is model.pos_embed


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


# ------------------------------------------------------------------------------------------------------------- files

@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")  # OpenAI's form is an old one
def test_backbones_survive_a_file_under_their_official_names(clip_state, tmp_path, monkeypatch):
    state = golden.dino_state_dict(dict(width=64, layers=1), seed=5, registers=4)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    model = backbone.load_dino(str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())

    torch.save(clip_state, tmp_path / "plain.pt")
    plain = backbone.load_clip(str(tmp_path / "plain.pt"))
    trace_inputs = torch.zeros(1, 3, 32, 32), clip.tokenize(["a cat"])
    torch.jit.save(torch.jit.trace(plain, trace_inputs, check_trace=False), tmp_path / "ViT-B-16.pt")  # OpenAI's form
    assert len(backbone.openai_sha256()) >= 9 and all(len(digits) == 64 for digits in backbone.openai_sha256())
    digits = hashlib.sha256((tmp_path / "ViT-B-16.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(backbone, "openai_sha256", lambda: {digits})
    archive = backbone.load_clip(str(tmp_path / "ViT-B-16.pt"))
    for model in (plain, archive):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert all(p.dtype == torch.float32 for p in model.parameters())
        for key, value in clip_state.items():
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


def test_weights_of_others_are_named_for_what_they_are(clip_state, tmp_path, capsys):
    """OpenAI's names with other weights are read, and said not to be OpenAI's; other names say what was found and wanted."""
    data.remark.cache_clear()
    torch.save(clip_state, tmp_path / "like.pt")
    backbone.load_clip(str(tmp_path / "like.pt"))
    assert "like.pt: not one of OpenAI's files by its hash; taken to be built like them (QuickGELU" in capsys.readouterr().err
    others = {"epoch": 3, "state_dict": clip_state}, {f"vision_model.{key}": x for key, x in clip_state.items()}, [1], 5
    for number, other in enumerate(others):
        torch.save(other, tmp_path / f"{number}.pt")
        for load in (backbone.load_clip, backbone.load_dino):
            with pytest.raises(data.DataError, match=rf"{number}\.pt: not a .* found (epoch|vision_model|a list|a int).* wanted"):
                load(str(tmp_path / f"{number}.pt"))


def test_a_file_that_could_run_code_is_refused_without_advice_to_run_it(tmp_path):
    """torch's own text says how to load it all the same."""
    torch.save({"x": tmp_path}, tmp_path / "evil.pt")  # a Path is made by a call
    for load in (backbone.load_clip, backbone.load_dino):
        with pytest.raises(data.DataError, match="evil.pt.*more than tensors") as caught:
            load(str(tmp_path / "evil.pt"))
        assert "weights_only" not in str(caught.value)


def test_words_that_the_toy_has_never_read_are_named(capsys):
    """It knows a zoo and a few grounds; for other words its maps are as confident, and mean nothing."""
    data.remark.cache_clear()
    toy = backbone.load_clip("shapes")
    backbone.text_features(toy, ("cat", "sofa", "trebuchet"))
    assert "never read, what it shows for them means nothing: sofa, trebuchet\n" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--classes", "cat", "sofa.jpg"], ["--classes", "pictures/cat"]])
def test_a_path_among_the_words_is_refused(argv):
    """`03_cam.py --classes cat sofa.jpg` takes the path for a word and would show a toy picture instead."""
    with pytest.raises(data.DataError, match="a path among the words"):
        backbone.demo_pictures(backbone.demo_options("").parse_args(argv))
