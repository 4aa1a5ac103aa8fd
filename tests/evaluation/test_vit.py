"""DINOv2's and CLIP's transformers, against the same computed by hand from random weights."""

import math

import pytest
import torch
from torch.nn import functional as F

from cmtool.errors import MissingError
from cmtool.evaluation.features import build_extractor, vit_extractor
from cmtool.evaluation.vit import clip_image, dinov2, placed

WIDTH, DEPTH, HEADS = 128, 2, 2


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}


def dino_weights(side=37):
    """Random tensors with the names and forms of dinov2_vitl14_pretrain.pth, but smaller."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + side**2, WIDTH),
              "mask_token": (1, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
              "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,),
              "norm.bias": (WIDTH,)}  # fmt: skip
    for i in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
                  "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}  # fmt: skip
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma",
                     "ls2.gamma"):  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
    return tensors(shapes)


def norm(x, w, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def attended(x, weight, bias, out_weight, out_bias):
    """Attention in the order of the files: queries, keys and values, each in heads."""
    parts = (x @ weight.T + bias).split(WIDTH, -1)
    heads = []
    for h in range(HEADS):
        q, k, v = (part[..., 64 * h : 64 * (h + 1)] for part in parts)
        heads.append((q @ k.mT / math.sqrt(64)).softmax(-1) @ v)
    return torch.cat(heads, -1) @ out_weight.T + out_bias


def by_hand(w, x):
    """The class token of DINOv2 for normalised images of 224x224, in float64."""
    w = {name: t.double() for name, t in w.items()}
    patches = x.double().unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, 16, 16, 14, 14)
    kernel = w["patch_embed.proj.weight"]
    tokens = torch.einsum("bcijkl,dckl->bijd", patches, kernel) + w["patch_embed.proj.bias"]
    grid = w["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    tokens = (tokens + grid.permute(0, 2, 3, 1)).flatten(1, 2)
    first = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), 1, WIDTH)
    x = torch.cat([first, tokens], 1)
    for i in range(DEPTH):
        b = {n.removeprefix(f"blocks.{i}."): t for n, t in w.items() if f"blocks.{i}." in n}
        y = attended(norm(x, b, "norm1", 1e-6), b["attn.qkv.weight"], b["attn.qkv.bias"],
                     b["attn.proj.weight"], b["attn.proj.bias"])  # fmt: skip
        x = x + b["ls1.gamma"] * y
        y = norm(x, b, "norm2", 1e-6) @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + b["ls2.gamma"] * (y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    return norm(x, w, "norm", 1e-6)[:, 0]


def pictures(n, side, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("side", [32, 300])
def test_dinov2s_features_are_those_of_edm2s_pipeline(tmp_path, side):
    """calculate_metrics.py of EDM2: resize, then the range, then the class token."""
    weights, images = dino_weights(), pictures(3, side)
    torch.save(weights, tmp_path / "dino.pth")
    x = F.interpolate(images.to(torch.float32), (224, 224), mode="bicubic", antialias=True)
    x = x.to(torch.float32) / 255
    x = x - torch.tensor([0.485, 0.456, 0.406]).reshape(1, -1, 1, 1)
    x = x / torch.tensor([0.229, 0.224, 0.225]).reshape(1, -1, 1, 1)
    expected = by_hand(weights, x)
    extractor = build_extractor("dinov2", file=tmp_path / "dino.pth", trust=True)
    found = extractor(images).double()
    assert found.shape == (3, WIDTH)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert extractor.facts["resize"] == "224x224,imagenet,bicubic"
    assert len(extractor.sha256) == 64


def test_the_embedding_of_places_is_itself_on_its_own_grid_and_goes_with_rows_and_columns():
    embedding = dino_weights(5)["pos_embed"]
    assert placed(embedding, (5, 5)) is embedding
    wide = placed(embedding, (3, 7))
    assert wide.shape == (1, 22, WIDTH)
    rows = embedding[:, 1:].reshape(1, 5, 5, WIDTH).transpose(1, 2).flatten(1, 2)
    turned = placed(torch.cat([embedding[:, :1], rows], 1), (7, 3))[:, 1:]
    tall = turned.reshape(1, 7, 3, WIDTH).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(wide[:, 1:], tall)
    assert torch.equal(wide[:, 0], embedding[:, 0])


def clip_weights():
    """Random tensors with the names and forms of CLIP's ViT-B-32.pt, but smaller."""
    shapes = {"class_embedding": (WIDTH,), "positional_embedding": (50, WIDTH),
              "conv1.weight": (WIDTH, 3, 32, 32), "proj": (WIDTH, 24)}  # fmt: skip
    blocks = [f"transformer.resblocks.{i}" for i in range(DEPTH)]
    for name in ("ln_pre", "ln_post", *(f"{b}.ln_{k}" for b in blocks for k in (1, 2))):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for b in blocks:
        shapes |= {
            f"{b}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{b}.attn.in_proj_bias": (3 * WIDTH,),
            f"{b}.attn.out_proj.weight": (WIDTH, WIDTH), f"{b}.attn.out_proj.bias": (WIDTH,),
            f"{b}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{b}.mlp.c_fc.bias": (4 * WIDTH,),
            f"{b}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{b}.mlp.c_proj.bias": (WIDTH,),
        }  # fmt: skip
    found = {f"visual.{name}": t for name, t in tensors(shapes, seed=2).items()}
    return {**found, "logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(3, 2)}


def clip_by_hand(stored, x):
    """The image features of CLIP for normalised images of 224x224, in float64."""
    w = {n.removeprefix("visual."): t.double() for n, t in stored.items() if "visual." in n}
    x = F.conv2d(x.double(), w["conv1.weight"], stride=32).flatten(2).mT
    first = w["class_embedding"].expand(len(x), 1, WIDTH)
    x = norm(torch.cat([first, x], 1) + w["positional_embedding"], w, "ln_pre", 1e-5)
    for i in range(DEPTH):
        at = f"transformer.resblocks.{i}."
        b = {n.removeprefix(at): t for n, t in w.items() if n.startswith(at)}
        y = norm(x, b, "ln_1", 1e-5)
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=y.dtype)
        attention.load_state_dict(
            {n.removeprefix("attn."): t for n, t in b.items() if n.startswith("attn.")}
        )
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, b, "ln_2", 1e-5) @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"]
        y = y / (1 + (-1.702 * y).exp())
        x = x + y @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    return norm(x[:, 0], w, "ln_post", 1e-5) @ w["proj"]


@torch.no_grad()
def test_clips_features_are_those_of_its_image_encoder(tmp_path):
    weights, images = clip_weights(), pictures(2, 224)  # as large as it takes: nothing is resized
    torch.save(weights, tmp_path / "clip.pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    expected = clip_by_hand(weights, (images / 255.0 - mean) / std)
    found = build_extractor("clip", file=tmp_path / "clip.pt", trust=True)(images).double()
    assert found.shape == (2, 24)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    half = {name: t.half() for name, t in weights.items()}  # as the published file is
    assert all(t.dtype == torch.float32 for t in clip_image(half).state_dict().values())


def test_a_file_of_another_network_is_named(tmp_path):
    whole = dino_weights(5)
    without = {n: t for n, t in whole.items() if n != "blocks.1.norm2.bias"}
    wide = {**whole, "norm.bias": torch.zeros(3)}
    for bad in (without, wide, {"a": torch.zeros(2)}, clip_weights()):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(MissingError, match="is no network of dinov2"):
            vit_extractor("dinov2", tmp_path / "bad.pth", "")
    torch.save(whole, tmp_path / "bad.pth")
    with pytest.raises(MissingError, match="is no network of clip"):
        vit_extractor("clip", tmp_path / "bad.pth", "")
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    with pytest.raises(MissingError, match="damaged"):
        vit_extractor("dinov2", tmp_path / "bad.pth", "")


@pytest.mark.parametrize("wrap", [lambda t: {"state_dict": t}, lambda t: {**t, 3: t["cls_token"]}])
def test_a_checkpoint_that_is_not_a_table_of_tensors_is_named(tmp_path, wrap):
    torch.save(wrap(dino_weights(5)), tmp_path / "bad.pth")
    for protocol in ("dinov2", "clip", "edm"):
        with pytest.raises(MissingError, match=r"bad\.pth is not a state dict: its") as refused:
            build_extractor(protocol, file=tmp_path / "bad.pth", trust=True)
        assert "give another file with --feature-weights" in refused.value.hint


@pytest.mark.parametrize(
    "change",
    [{"cls_token": torch.zeros(())}, {"pos_embed": torch.zeros(1, 1, WIDTH)},
     {"pos_embed": torch.zeros(26)}, {"blocks.0.mlp.fc1.weight": torch.zeros(())}],
)  # fmt: skip
def test_tensors_of_odd_forms_are_no_network(tmp_path, change):
    torch.save({**dino_weights(5), **change}, tmp_path / "bad.pth")
    with pytest.raises(MissingError, match="is no network of dinov2"):
        vit_extractor("dinov2", tmp_path / "bad.pth", "")


def test_the_network_has_the_names_of_the_published_file():
    assert dinov2(dino_weights(5)).state_dict().keys() == dino_weights(5).keys() - {"mask_token"}
