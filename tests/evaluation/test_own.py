"""Features of the user's own: a TorchScript file, against the same computed by hand."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmtool.data.drawing import png_bytes
from cmtool.errors import InputError, MissingError, UserError
from cmtool.evaluation.features import build_extractor
from cmtool.evaluation.measure import evaluate
from cmtool.evaluation.own import Own
from cmtool.system.files import file_sha256
from tests.cli.conftest import TINY, bare_runs, cmtool  # noqa: F401  # fixtures

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class Net(nn.Module):
    """Twelve features of images of any size; channels and rows count differently."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3, generator=generator))

    def forward(self, x):
        y = F.conv2d(x, self.weight, stride=2)
        return torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)


class Says(Net):
    input: str

    def __init__(self, said: str):
        super().__init__()
        self.input = said


class Flat(nn.Module):
    """It takes images of 12x12 alone."""

    def forward(self, x):
        return x.reshape(-1, 432)[:, :5]


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


def write(module, path, **extra):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path), _extra_files=extra)
    return path


def pictures(n, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture
def net(tmp_path):
    return write(Net(), tmp_path / "net.pt")


def by_hand(images, side=12):
    x = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True) / 255
    with torch.no_grad():
        return Net()((x - MEAN) / STD).double()


def distance(a, b):
    """The Frechet distance of two sets of features, by eigenvalues."""
    (p, q) = (torch.cov(t.T) for t in (a, b))
    roots = torch.linalg.eigvals(p @ q).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + p.trace() + q.trace() - 2 * roots)


def test_features_are_the_same_computed_by_hand(net):
    images = pictures(50)
    own = Own(net, "12,imagenet,bilinear", trust=True)
    extractor = build_extractor("own", own=own)
    torch.testing.assert_close(extractor(images).double(), by_hand(images), rtol=0, atol=1e-6)
    assert torch.equal(extractor(images[7:9]), extractor(images)[7:9])
    facts = extractor.facts
    assert facts["sha256"] == file_sha256(net)
    assert facts["input"] == "12x12,imagenet,bilinear"
    assert extractor.width == 12


def test_the_distance_is_the_same_computed_by_hand(net):
    made, real = pictures(60), pictures(60, seed=1) // 2
    said = {"features": net, "features_input": "12,imagenet,bilinear", "trust": True}
    found = evaluate(made, reference=real, **said)
    assert found["metric"] == "fd-own"
    assert found["value"] == pytest.approx(distance(by_hand(made), by_hand(real)), rel=1e-6)

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    x, y = by_hand(made), by_hand(real)
    off = 1 - torch.eye(60)
    kid = float(((kernel(x, x) + kernel(y, y)) * off).sum() / 3540 - 2 * kernel(x, y).mean())
    every = evaluate(made, "all", real, **said)["value"]
    assert every["kid"] == pytest.approx(kid, rel=1e-6)
    assert evaluate(made, "kid", real, **said)["value"] == pytest.approx(kid, rel=1e-6)
    score = evaluate(made, "is", **said)["value"]
    p = by_hand(made).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    whole = -(p.mean(0) * p.mean(0).log()).sum()
    assert score == pytest.approx(float((whole - entropy).exp()), rel=1e-6)


@pytest.mark.parametrize("way", ["file", "attribute"])
def test_a_file_may_say_what_it_takes_and_the_user_has_the_last_word(tmp_path, way):
    said = "12,imagenet,bilinear"
    path = tmp_path / "net.pt"
    if way == "file":
        write(Net(), path, input=said)
    else:
        write(Says(said), path)
    images = pictures(5)
    extractor = build_extractor("own", own=Own(path, trust=True))
    assert extractor.notes == ()
    torch.testing.assert_close(extractor(images).double(), by_hand(images), rtol=0, atol=1e-6)
    other = build_extractor("own", own=Own(path, "9", trust=True))
    torch.testing.assert_close(other(images).double(), by_hand(images, 9), rtol=0, atol=1e-6)


def test_without_a_word_images_are_of_their_own_size_in_minus_one_to_one(net):
    extractor, images = build_extractor("own", own=Own(net, trust=True)), pictures(4)
    with torch.no_grad():
        expected = Net()(images / 127.5 - 1)
    torch.testing.assert_close(extractor(images), expected)
    assert "does not say what it takes: it gets -1..1" in extractor.notes[0]
    assert (extractor.facts["input"], extractor.resize) == ("-1..1", "none")


def test_code_is_run_only_if_it_is_trusted_or_named_by_its_hash(net):
    with pytest.raises(MissingError, match="is code") as refused:
        build_extractor("own", own=Own(net))
    assert "--trust" in refused.value.hint
    assert file_sha256(net) in refused.value.hint
    build_extractor("own", own=Own(net, sha256=file_sha256(net)))
    with pytest.raises(MissingError, match="another file"):
        build_extractor("own", own=Own(net, sha256="0" * 64, trust=True))
    with pytest.raises(InputError, match="no such file"):
        build_extractor("own", own=Own(net.with_name("gone.pt"), trust=True))


def test_what_is_no_feature_network_is_named(tmp_path):
    flat = write(Flat(), tmp_path / "flat.pt")
    with pytest.raises(InputError, match="an image of 64x64 ends in an error"):
        build_extractor("own", own=Own(flat, trust=True))
    assert build_extractor("own", own=Own(flat, "12", trust=True)).width == 5
    assert build_extractor("own", own=Own(flat, trust=True, size=(12, 12))).width == 5
    with pytest.raises(InputError, match=r"of 2 images it makes \(\)"):
        build_extractor("own", own=Own(write(Sum(), tmp_path / "sum.pt"), trust=True))
    (tmp_path / "page.pt").write_bytes(b"<html>")
    torch.save(Net().state_dict(), tmp_path / "state.pt")
    for name in ("page.pt", "state.pt"):
        with pytest.raises(InputError, match=f"{name} is not a TorchScript file") as refused:
            build_extractor("own", own=Own(tmp_path / name, trust=True))
        assert refused.value.hint == "save the network with torch.jit.save"
    with pytest.raises(UserError, match="names no network"):
        build_extractor("own")
    with pytest.raises(UserError, match="with --protocol edm"):
        build_extractor("edm", own=Own(flat))


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(20, seed=seed)):
            (tmp_path / name / f"{i:02}.png").write_bytes(png_bytes(image))
    return tmp_path


def value(result):
    assert result.code == 0, result.err
    return json.loads(result.text)


def test_the_command_says_all_that_the_number_depends_on(cmtool, net, folders):  # noqa: F811
    fid = ["eval", "fid", "a", "--reference", "b", "--features", "net.pt", "--workers", "0"]
    refused = cmtool(*fid)
    assert (refused.code, "--trust" in refused.err) == (4, True)
    found = value(cmtool(*fid, "--features-input", "12,imagenet,bilinear", "--trust"))
    a, b = (by_hand(pictures(20, seed=seed)) for seed in (0, 1))
    assert found["value"] == pytest.approx(distance(a, b), rel=1e-6)
    assert found["features"] == {
        "name": "own", "sha256": file_sha256(net), "width": 12, "resize": "bilinear",
        "precision": "fp32", "input": "12x12,imagenet,bilinear",
    }  # fmt: skip
    assert (found["metric"], found["protocol"]) == ("fd-own", "own")
    plain = cmtool(*fid, "--trust")
    assert "note: net.pt does not say what it takes" in plain.err
    for wrong in (["--protocol", "edm"], ["--feature-weights", "net.pt"], ["--cross-check"],
                  ["--feature-precision", "bf16"], ["--features-input", "12,imagnet"]):  # fmt: skip
        assert cmtool(*fid, "--trust", *wrong).code == 2
    assert cmtool("eval", "fid", "a", "--reference", "b", "--features-input", "12").code == 2
    assert cmtool("eval", "fid", "a", "--reference", "b", "--protocol", "own").code == 2


def test_statistics_belong_to_the_file_and_to_what_it_takes(cmtool, net, folders):  # noqa: F811
    trusted = ["--workers", "0", "--features", "net.pt", "--trust", "--features-input"]
    made = cmtool("eval", "reference", "b", "-o", "b.npz", *trusted, "12,imagenet,bilinear")
    assert made.code == 0, made.err
    fid = ["eval", "fid", "a", "--reference", "b.npz", *trusted]
    stored = value(cmtool(*fid, "imagenet,12,bilinear"))
    direct = value(cmtool("eval", "fid", "a", "--reference", "b", *trusted, "12,imagenet,bilinear"))
    assert stored["value"] == direct["value"]
    other = cmtool(*fid, "12,0..1,bilinear")
    assert (other.code, "was made with input '12x12,imagenet,bilinear'" in other.err) == (3, True)
    with torch.no_grad():
        module = Net()
        module.weight += 1
    write(module, net)
    changed = cmtool(*fid, "12,imagenet,bilinear")
    assert (changed.code, "was made with sha256" in changed.err) == (3, True)
    alone = cmtool("eval", "fid", "a", "--reference", "b.npz")
    assert (alone.code, "--features FILE.pt" in alone.err) == (2, True)


SMALL = ["--preset", "digits-ct", *TINY, "--set", "train.steps=2", "--set", "run.eval_num=20",
         "--set", "run.sample_grid=4", "--set", "data.fit=box", "--eval-every", "1"]  # fmt: skip


def evaluations(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [line["eval"] for line in map(json.loads, lines) if line.get("eval")]


@pytest.mark.usefixtures("bare_runs")
def test_a_preset_names_the_network_of_its_run_by_its_hash(cmtool, net, tmp_path):  # noqa: F811
    run = ["train", *SMALL, "--features", "net.pt", "--features-input", "12,imagenet,bilinear"]
    assert cmtool(*run, "--out", "r").code == 4
    made = cmtool(*run, "--trust", "--out", "r")
    assert made.code == 0, made.err
    found = evaluations(tmp_path / "r")[-1]
    same = value(cmtool("eval", "fid", "-c", "r", "--num", "20", "--reference", "digits",
                        *run[-4:], "--trust", "--device", "cpu"))  # fmt: skip
    assert found["value"] == pytest.approx(same["value"], rel=1e-9)
    assert found["metric"].startswith("fd-own-")
    stored = (tmp_path / "r/preset.toml").read_text()
    assert f'sha256 = "{file_sha256(net)}"' in stored
    longer = ["train", "--resume", "--out", "r", "--device", "cpu"]
    assert cmtool(*longer).code == 0
    with torch.no_grad():
        module = Net()
        module.weight += 1
    write(module, net)
    changed = cmtool(*longer)
    assert (changed.code, "is another file than is named" in changed.err) == (4, True)


def test_a_preset_may_name_it_and_dry_run_checks_what_it_says(cmtool, net):  # noqa: F811
    dry = ["train", *SMALL, "--dry-run"]
    kid = ["--features", "net.pt", "--trust", "--set", "run.eval_metric=kid"]
    shown = cmtool(*dry, *kid)
    assert shown.code == 0, shown.err
    assert 'name = "kid"' in shown.text
    for wrong in (["--features-input", "12"], ["--trust"], [*kid[:3], "--features-input", "12,x"],
                  [*kid[:4], "run.eval_metric=fd-digits"], ["--set", "run.eval_metric=fd-own"],
                  ["--set", "run.eval_metric={name='kid',sha256='0'}"]):  # fmt: skip
        refused = cmtool(*dry, *wrong)
        assert (refused.code, refused.out) == (2, b""), wrong


@pytest.mark.usefixtures("bare_runs")
def test_a_resumed_run_may_have_another_metric(cmtool, net, tmp_path):  # noqa: F811
    assert cmtool("train", *SMALL, "--out", "r", "--max-time", "0").code == 75
    more = cmtool("train", "--resume", "--out", "r", "--device", "cpu", "--features", "net.pt",
                  "--trust")  # fmt: skip
    assert more.code == 0, more.err
    names = [each["metric"].partition("-own")[0] for each in evaluations(tmp_path / "r")]
    assert names[-1] == "fd"
    back = cmtool("train", "--resume", "--out", "r", "--device", "cpu", "--set",
                  "run.eval_metric=fd-pixels")  # fmt: skip
    assert back.code == 0, back.err


def test_a_search_goes_by_it(cmtool, net, tmp_path):  # noqa: F811
    search = ["search", "-c", "digits-cd", "--steps", "2", "--num", "8", "--grid", "4", "--device",
              "cpu", "--out", "found.json"]  # fmt: skip
    for wrong in (["--trust"], ["--features", "net.pt", "--trust", "--metric", "fd-digits"]):
        assert cmtool(*search, *wrong).code == 2
    assert cmtool(*search, "--features", "net.pt").code == 4
    made = cmtool(*search, "--features", "net.pt", "--trust", "--json")
    assert made.code == 0, made.err
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["metric"].startswith("fd-own-")
    sigmas = json.loads(made.text)["sigmas"]
    key = ",".join(f"{s:.6g}" for s in sigmas)
    content = value(cmtool("eval", "fid", "-c", "digits-cd", "--sigmas", key, "--num", "8",
                           "--features", "net.pt", "--trust", "--device", "cpu"))  # fmt: skip
    assert kept["evaluations"][key] == pytest.approx(content["value"], rel=1e-5)


def test_all_leaves_the_score_out_where_there_are_no_classes():
    made, real = pictures(30), pictures(30, seed=1)
    found = evaluate(made, "all", real, protocol="pixels")["value"]
    assert found.keys() == {"fid", "kid", "precision", "recall"}
    with pytest.raises(UserError, match="has no classes"):
        evaluate(made, "is", protocol="pixels")


def test_edm2s_statistics_have_a_gaussian_for_each_protocol(tmp_path):
    """The pickle of calculate_metrics.py: {"num_images", "fid": {...}, "fd_dinov2": {...}}."""
    import pickle

    from cmtool.evaluation.metrics import GAUSSIAN
    from cmtool.evaluation.sets import Setup, collect, read_statistics

    def table(width):
        return {"mu": np.full(width, width / 10), "sigma": np.eye(width)}

    content = {"num_images": 5, "fid": table(4), "fd_dinov2": table(6)}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    stored = read_statistics(tmp_path / "ref.pkl")
    for protocol, width in (("edm", 4), ("dinov2", 6)):
        extractor = build_extractor("pixels")._replace(width=width)
        found = collect(stored, GAUSSIAN, Setup(protocol, extractor)).gaussian
        assert found.mean.tolist() == pytest.approx([width / 10] * width)
