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
from cmtool.data.images import png_bytes
from cmtool.evaluation.measure import BOTH, Setting, measured, set_of
from cmtool.evaluation.metrics import GaussianSums, frechet_distance
from cmtool.evaluation.protocols import build_extractor
from cmtool.system.dist import ALONE
from tests.published import write_detector

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    write_detector(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures that differ in contrast."""
    root, generator = tmp_path_factory.mktemp("sets"), torch.Generator().manual_seed(0)
    for name, count, contrast in (("a", 24, 255), ("b", 20, 150)):
        (root / name).mkdir()
        for i in range(count):
            image = torch.rand(3, 20, 24, generator=generator) * contrast
            (root / name / f"{i}.png").write_bytes(png_bytes(image.to(torch.uint8)))
    return root


@pytest.mark.parametrize(("protocol", "mode"), [("clean", "clean"), ("edm", "legacy_tensorflow")])
def test_fid_and_kid_are_those_of_clean_fid(weights, folders, protocol, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid import fid
        from cleanfid.inception_torchscript import InceptionV3W

        network = InceptionV3W(
            str(weights.parent), download=False, resize_inside=mode == "legacy_tensorflow"
        )
        made, real = (
            fid.get_folder_features(
                str(folders / name), network, num_workers=0, device=torch.device("cpu"),
                mode=mode, verbose=False,
            )
            for name in "ab"
        )  # fmt: skip
    extractor = build_extractor(protocol, file=weights, trust=True)
    setting = Setting(protocol, extractor, 16, 0, ALONE)
    ours, reference = (set_of(str(folders / name), BOTH, setting)[0] for name in "ab")
    found = {name: measured(name, ours, reference, setting)[name].value for name in ("fid", "kid")}

    def by_ours(theirs, rows):  # clean-fid draws by place: in the order of ours
        order = torch.cdist(rows, torch.from_numpy(theirs)).argmin(1)
        assert sorted(order.tolist()) == list(range(len(rows)))
        return theirs[order.numpy()].astype(np.float64)  # in float32 its sums are off by 1e-6

    np.random.seed(0)  # noqa: NPY002
    theirs = fid.kernel_distance(by_ours(real, reference.rows), by_ours(made, ours.rows))
    assert found["kid"] == pytest.approx(theirs, rel=1e-6)
    a, b = (
        torch.from_numpy(rows - rows.mean(0)).double() / (len(rows) - 1) ** 0.5
        for rows in (made, real)
    )
    shift = torch.from_numpy(made.mean(0) - real.mean(0)).double()
    exact = shift.square().sum() + a.square().sum() + b.square().sum()
    exact -= 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert found["fid"] == pytest.approx(float(exact), rel=1e-6)
    has_root = version.parse(scipy.__version__) < version.parse("1.18")  # it asks for what went
    if has_root and mode == "clean":  # ten seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = fid.fid_from_feats(made, real)
        assert found["fid"] == pytest.approx(theirs, rel=1e-6)


def run(arguments, cwd, processes=1, stdin=None):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes), "-m"]
    return subprocess.run(
        [*launcher, "cmtool", "eval", *arguments], cwd=cwd, env=ENVIRONMENT, input=stdin,
        capture_output=True, timeout=240,
    )  # fmt: skip


def test_two_processes_find_what_one_finds(tmp_path):
    drawn = ["all", "-c", "digits-cd", "--num-images", "75", "--batch", "16", "--device", "cpu"]
    options = ["--reference", "digits:held-out", "--json"]
    one, two = (run([*drawn, *options], tmp_path, n) for n in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr.decode()
    assert two.stdout == one.stdout  # to the last digit, and said once
    assert len(json.loads(two.stdout)["value"]) == 5


def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that lets go of a tensor while Python ends aborts the process."""
    program = tmp_path / "told.py"
    program.write_text(
        "import atexit, pathlib, sys\n"
        "from cmtool.cli import main\n"
        "def tell():\n"
        "    names = [p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    print('gloo' in ''.join(names), file=sys.stderr)\n"
        "atexit.register(tell)\n"
        "main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    drawn = ["eval", "all", "-c", "digits-cd", "--num-images", "8", "--device", "cpu"]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", program, *drawn], cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert ended.stderr.splitlines().count(b"False") == 2


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
