import contextlib
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from cmtool.errors import InputError
from cmtool.evaluation.gaussian import Gaussian
from cmtool.evaluation.sets import read_statistics, write_statistics

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
GAUSSIAN = Gaussian(torch.from_numpy(MU), torch.from_numpy(SIGMA), 7)


def test_what_was_written_is_read(tmp_path):
    path, rows = tmp_path / "a.npz", torch.randn(7, 3)
    write_statistics(path, GAUSSIAN, rows, {"protocol": "edm"})
    found = read_statistics(path)
    assert torch.equal(found.gaussian.mean, GAUSSIAN.mean)
    assert torch.equal(found.gaussian.covariance, GAUSSIAN.covariance)
    assert found.gaussian.num == 7
    assert torch.equal(found.rows, rows)
    assert found.about == {"protocol": "edm"}
    assert not found.has_images


@pytest.mark.filterwarnings("ignore")
def test_clean_fid_reads_ours_and_we_read_clean_fids(tmp_path, monkeypatch):
    import cleanfid
    from cleanfid.features import get_reference_statistics

    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats" / "mine_clean_custom_na.npz"  # where it looks for a custom set
    write_statistics(path, GAUSSIAN, None, {})
    mu, sigma = get_reference_statistics("mine", "na", mode="clean", split="custom")
    np.testing.assert_array_equal(mu, MU)
    np.testing.assert_array_equal(sigma, SIGMA)
    np.savez_compressed(path, mu=mu, sigma=sigma)  # as its make_custom_stats writes
    np.savez_compressed(tmp_path / "kid.npz", feats=np.ones((4, 3), np.float32))
    assert torch.equal(read_statistics(path).gaussian.covariance, GAUSSIAN.covariance)
    assert read_statistics(path).gaussian.num == 0  # it does not say
    kid = read_statistics(tmp_path / "kid.npz")
    assert kid.gaussian is None
    assert kid.rows.shape == (4, 3)
    np.savez(tmp_path / "both.npz", mu=mu, sigma=sigma, feats=np.ones((4, 3), np.float32))
    assert read_statistics(tmp_path / "both.npz").gaussian.num == 4


def test_edms_reader_reads_ours(tmp_path):
    write_statistics(tmp_path / "a.npz", GAUSSIAN, None, {})
    ref = dict(np.load(tmp_path / "a.npz"))  # all that its fid.py does; no pickle is allowed
    np.testing.assert_array_equal(ref["mu"], MU)
    np.testing.assert_array_equal(ref["sigma"], SIGMA)


def test_adms_layout_has_images_beside_its_statistics(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA)
    found = read_statistics(path)
    assert found.has_images
    assert torch.equal(found.gaussian.mean, GAUSSIAN.mean)
    np.savez(path, arr_0=images)
    assert read_statistics(path) is None  # images alone are no statistics


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_edm2s_pickle_is_read(tmp_path, protocol, order):
    path = tmp_path / "ref.pkl"
    sigma = np.asarray([[1.0, 2.0], [3.0, 4.0]], order=order)
    stats = {"mu": np.arange(2.0), "sigma": sigma}
    path.write_bytes(pickle.dumps({"fid": stats, "fd_dinov2": stats}, protocol))
    found = read_statistics(path).gaussian
    assert found.covariance.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("other", "message"),
    [({"mu": MU}, "has no dinov2 sigma"), ({"sigma": SIGMA}, "has no dinov2 mu"),
     ({"mu": MU, "sigma": SIGMA[:2]}, r"dinov2 mu has 3 features, dinov2 sigma is \(2, 3\)"),
     ({"mu": MU + np.inf, "sigma": SIGMA}, "dinov2 mu has values that are not finite")],
)  # fmt: skip
def test_edm2s_statistics_of_other_features_are_checked_too(tmp_path, other, message):
    stats = {"mu": MU, "sigma": SIGMA}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"fid": stats, "fd_dinov2": other}))
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "ref.pkl")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ref.pkl"
    for content in (Bomb(), {"mu": Bomb()}, {"fid": {"mu": MU, "sigma": Bomb()}}):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(InputError, match="no pickle of statistics"):
            read_statistics(path)
    assert not (tmp_path / "exploded").exists()


def test_an_npz_with_objects_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", mu=np.array([Bomb()], dtype=object), sigma=SIGMA)
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path / "a.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU * np.nan, "sigma": SIGMA}, "mu has values that are not finite"),
        ({"mu": MU, "sigma": SIGMA + np.inf}, "sigma has values that are not finite"),
        ({"mu": MU}, "has no sigma"),
        ({"mu": MU[:2], "sigma": SIGMA}, "mu has 2 features"),
        ({"mu": MU, "sigma": MU}, "sigma is float64"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "mu is int64"),
        ({"feats": MU}, "feats is float64"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array("{")}, "no JSON"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array("[1, 2]")}, "no JSON object"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array("3")}, "no JSON object"),
        ({"mu": MU, "sigma": SIGMA, "num": np.arange(3)}, r"num is \[0 1 2\]"),
        ({"mu": MU, "sigma": SIGMA, "num": np.array("many")}, "num is many"),
        ({"mu": MU, "sigma": SIGMA, "num": np.array(-1)}, "num is -1"),
        ({"mu": MU, "sigma": SIGMA * 1e200}, "not finite"),
        ({"mu": MU, "sigma": SIGMA, "feats": np.ones((4, 2))}, "mu has 3 features, feats 2"),
        ({"feats": np.full((4, 3), 1e300)}, "feats has values that are not finite"),
        ({"mu": MU.astype(complex), "sigma": SIGMA}, "mu is complex128"),
        ({"mu": SIGMA, "sigma": MU}, "mu is float64"),
        ({"mu": MU[None], "sigma": SIGMA}, "mu is float64"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array(b"{}")}, "no JSON object"),
        ({"mu": MU, "sigma": SIGMA, "about": np.array(["{}", "{}"])}, "no JSON object"),
        ({"mu": MU, "sigma": SIGMA, "num": np.array(9.0)}, "num is 9.0"),
        ({"feats": np.zeros((4, 3), int)}, "feats is int64"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        read_statistics(path)


@pytest.mark.parametrize("kind", [">f8", "f2", "longdouble"])
def test_statistics_in_floats_of_other_machines_are_read(tmp_path, kind):
    np.savez(tmp_path / "a.npz", mu=MU.astype(kind), sigma=np.asfortranarray(SIGMA.astype(kind)))
    found = read_statistics(tmp_path / "a.npz").gaussian
    assert (found.mean.tolist(), found.covariance.tolist()) == (MU.tolist(), SIGMA.tolist())


@pytest.mark.parametrize(
    "content",
    [[MU, SIGMA], (MU, SIGMA), {"fid": None}, {"mu": MU.tolist(), "sigma": SIGMA.tolist()},
     {"mu": MU[0], "sigma": SIGMA}, {"mu": MU.astype("f2"), "sigma": SIGMA}],
    ids=repr,
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"a\.pkl is no pickle of statistics"):
        read_statistics(tmp_path / "a.pkl")


def test_what_unpacks_to_far_more_than_it_is_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", mu=MU, sigma=np.zeros((1 << 12, 1 << 9)))
    with pytest.raises(InputError, match="sigma unpacks from"):
        read_statistics(tmp_path / "bomb.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_any_damage_of_a_packed_file_is_an_input_error(tmp_path, method):
    path, content = tmp_path / "a.npz", io.BytesIO()
    with zipfile.ZipFile(path, "w", method) as archive:
        np.lib.format.write_array(content, MU)
        archive.writestr("mu.npy", content.getvalue())
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(InputError):  # where the damage is seen
            read_statistics(path)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.npz"
    write_statistics(path, GAUSSIAN, None, {})
    content = path.read_bytes()
    for cut in (0, 10, len(content) // 2):
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"a.npz cannot be read"):
            read_statistics(path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"mu": MU, "sigma": SIGMA}, 4)[:-40])
    with pytest.raises(InputError, match=r"a\.pkl"):
        read_statistics(tmp_path / "a.pkl")
