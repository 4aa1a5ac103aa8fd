"""Numbers equal to clean-fid's own, in any number of processes, in bounded memory."""

import json
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy
import torch
from packaging import version

from cmtool.data.archives import write_npz
from cmtool.data.drawing import png_bytes
from cmtool.data.images import to_uint8
from cmtool.errors import UserError
from cmtool.evaluation.features import Extractor, build_extractor
from cmtool.evaluation.gaussian import Gaussian, GaussianSums, frechet_distance
from cmtool.evaluation.measure import drawn_batches, evaluate
from cmtool.evaluation.metrics import BOTH, Features, fid, kid
from cmtool.evaluation.sets import Setup, collect, open_set
from cmtool.system.dist import Group

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "mode"), [("clean", "clean"), ("edm", "legacy_tensorflow")])
def test_fid_and_kid_are_those_of_clean_fid(weights, folders, protocol, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid as clean_fid
        from cleanfid.inception_torchscript import InceptionV3W

        network = InceptionV3W(
            str(weights.parent), download=False, resize_inside=mode == "legacy_tensorflow"
        )
        made, real = (
            clean_fid.get_folder_features(
                str(folders / name), network, num_workers=0, device=torch.device("cpu"),
                mode=mode, verbose=False,
            )
            for name in "ab"
        )  # fmt: skip
    extractor = build_extractor(protocol, file=weights, trust=True)
    setup = Setup(protocol, extractor, batch=16)
    ours, reference = (collect(open_set(folders / name), BOTH, setup) for name in "ab")
    found = fid(ours, reference, extractor) | kid(ours, reference, extractor)

    def by_ours(theirs, rows):  # clean-fid draws by place: in the order of ours
        order = torch.cdist(rows, torch.from_numpy(theirs)).argmin(1)
        assert sorted(order.tolist()) == list(range(len(rows)))
        return theirs[order.numpy()].astype(np.float64)  # in float32 its sums are off by 1e-6

    np.random.seed(0)  # noqa: NPY002
    theirs = clean_fid.kernel_distance(by_ours(real, reference.rows), by_ours(made, ours.rows))
    assert found["kid"].value == pytest.approx(theirs, rel=1e-6)
    a, b = (
        torch.from_numpy(rows - rows.mean(0)).double() / (len(rows) - 1) ** 0.5
        for rows in (made, real)
    )
    shift = torch.from_numpy(made.mean(0) - real.mean(0)).double()
    exact = shift.square().sum() + a.square().sum() + b.square().sum()
    exact -= 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert found["fid"].value == pytest.approx(float(exact), rel=1e-6)
    has_root = version.parse(scipy.__version__) < version.parse("1.18")  # it asks for what went
    if has_root and mode == "clean":  # ten seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = clean_fid.fid_from_feats(made, real)
        assert found["fid"].value == pytest.approx(theirs, rel=1e-6)


def test_evaluate_is_the_eval_command_for_notebooks(tmp_path):
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    content = evaluate(images)
    assert (content["metric"], content["num_images"]) == ("fd-digits", 30)
    assert content["reference"]["images"] == 11536
    same = evaluate(to_uint8(images), reference=images, protocol="digits")
    assert same["value"] == pytest.approx(0, abs=1e-6)
    write_npz(tmp_path / "a.npz", iter(to_uint8(images)), 30, None)
    said = run(["all", "a.npz", "--reference", "digits:held-out", "--device", "cpu"], tmp_path)
    ours = evaluate(to_uint8(images), "all", "digits:held-out")
    theirs = json.loads(said.stdout)
    assert theirs.pop("images")["name"] == "a.npz"
    assert ours.pop("images")["name"] == "tensor"
    assert ours.pop("value") == pytest.approx(theirs.pop("value"), rel=1e-6)
    errors = [each["standard_error"].pop("kid") for each in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)  # its threads may be others
    assert ours == theirs
    with pytest.raises(UserError, match="metric 'fud'"):
        evaluate(images, "fud")


@pytest.fixture
def means(monkeypatch):
    """A feature network that takes no time: the mean of each channel."""
    network = Extractor("means", "", 3, lambda x: x.float().mean((2, 3)), None, 8192, "cpu")
    monkeypatch.setattr("cmtool.evaluation.measure.build_extractor", lambda *_, **__: network)


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize("num", [49_999, 50_000])
def test_a_number_of_fewer_than_50_000_images_is_a_proxy(num, monkeypatch):
    gaussian = Gaussian(torch.zeros(3).double(), torch.eye(3).double(), num)
    many = Features(gaussian, num=num)
    monkeypatch.setattr("cmtool.evaluation.measure.collect", lambda *_, **__: many)
    images = torch.zeros(2, 3, 1, 1)
    assert evaluate(images, reference=images)["proxy"] == (num == 49_999)


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize(("num", "reference"), [(3, 9), (9, 3), (4, 9), (9, 4)])
def test_a_covariance_of_no_more_images_than_features_is_singular(num, reference):
    images = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    content = evaluate(images[:num], reference=images[:reference])
    assert content["rank_deficient"] == (min(num, reference) <= 3)


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize(("num", "reference"), [(20, 30), (30, 20)])
def test_subsets_are_told_as_large_as_the_smaller_set(num, reference):
    images = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    content = evaluate(images[:num], "kid", images[:reference])
    assert content["settings"] == {"subsets": 100, "size": 20, "seed": 0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_processes_draw_equally_many_and_together_every_seed_once(world_size, monkeypatch):
    calls, asked = [], []

    def generate(f, preset, chosen, seeds, *, labels, batch, device, on_drawn):
        assert labels is None  # drawn from the seeds
        calls.append(-(-len(seeds) // batch))
        for first in range(0, len(seeds), batch):
            yield torch.zeros(len(seeds[first : first + batch]), 1, 1, 1)
        asked.extend(seeds)

    monkeypatch.setattr("cmtool.evaluation.measure.generate", generate)
    drawn = 0
    for rank in range(world_size):
        own = drawn_batches(
            None, None, None, range(5, 12), batch=2, device="cpu", group=Group(rank, world_size)
        )
        drawn += sum(map(len, own))
    assert drawn == 7
    assert len(set(calls)) == 1
    assert set(range(5, 12)) <= set(asked)


def run(arguments, cwd, processes=1, stdin=None):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), "-m"]
    return subprocess.run(
        [*launcher, "cmtool", "eval", *arguments], cwd=cwd, env=ENVIRONMENT, input=stdin,
        capture_output=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    drawn = ["all", "-c", "digits-cd", "--num-images", "75", "--batch", "16", "--device", "cpu"]
    options = ["--reference", "digits:held-out", "--json"]
    one, two = (run([*drawn, *options], tmp_path, n) for n in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr.decode()
    assert two.stdout == one.stdout  # to the last digit, and said once
    assert len(json.loads(two.stdout)["value"]) == 5


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that lets go of a tensor while Python ends aborts the process."""
    program = tmp_path / "told.py"
    program.write_text(
        "import atexit, os, pathlib\n"
        "from cmtool.cli import main\n"
        "def tell():\n"
        "    names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    said = b'gloo\\n' if 'gloo' in ''.join(names) else b'alone\\n'\n"
        "    os.write(2, said)\n"  # a line in one write: two processes tell at once
        "atexit.register(tell)\n"
        "main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    drawn = ["eval", "all", "-c", "digits-cd", "--num-images", "8", "--device", "cpu"]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", program, *drawn], cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert ended.stderr.splitlines().count(b"alone") == 2


@pytest.mark.slow
def test_a_damaged_image_in_another_processes_share_is_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(8):
        image = torch.full((3, 8, 8), i * 30, dtype=torch.uint8)
        (folder / f"{i}.png").write_bytes(png_bytes(image))
    (folder / "3.png").write_bytes(b"\x89PNG cut")
    listed = "".join(f"set/{i}.png\n" for i in range(8)).encode()  # read by one
    ended = run(["fid", "-", "--batch", "2", "--device", "cpu"], tmp_path, 2, stdin=listed)
    assert ended.returncode != 0
    assert ended.stdout == b""
    assert "set/3.png" in ended.stderr.decode()
    assert "cmtool/measure.py" not in ended.stderr.decode()  # no traceback but torchrun's own


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    path, count = tmp_path / "many.npz", 60_000
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    write_npz(path, (picture + i % 251 for i in range(count)), count, None)
    code = (
        "import resource; from cmtool.cli import main\n"
        "try: main(['eval', 'fid', 'many.npz', '--num', '{}', '--workers', '0'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for num in (2_000, count):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(num)], cwd=tmp_path, env=ENVIRONMENT,
            capture_output=True, timeout=240,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr.decode()
        peaks.append(int(ended.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 20  # MiB


@pytest.mark.slow
def test_sums_of_2048_features_take_bounded_memory():
    generator = torch.Generator().manual_seed(0)
    sums = GaussianSums(2048)
    batch = torch.rand(256, 2048, generator=generator)
    sums.add(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(8):
        sums.add(batch)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    gaussian = sums.gaussian()
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-6)
