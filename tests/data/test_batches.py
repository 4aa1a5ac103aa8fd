import pytest
import torch

from cmtool.core.types import NO_CLASS
from cmtool.data.batches import PickerAhead, batches
from cmtool.data.datasets import Dataset, digits, load_dataset
from cmtool.data.drawing import png_bytes
from cmtool.data.images import from_uint8
from cmtool.errors import InputError


def test_digits_are_what_they_were():
    train, held_out = digits("train"), digits("held-out")
    assert train.images.shape == (11536, 3, 8, 8)
    assert held_out.images.shape == (2840, 3, 8, 8)
    assert train.fingerprint() == "3f88216483b88251"
    assert held_out.fingerprint() == "915555431be2f4ff"


def test_the_split_is_disjoint_and_balanced():
    train, held_out = digits("train"), digits("held-out")
    counts = held_out.labels.bincount()
    assert counts.min() >= 0.9 * counts.max()
    shapes = {ink(image) for image in train.images}
    assert sum(ink(image) in shapes for image in held_out.images) == 0


def ink(image):
    grey = image.float().sum(0)
    level = (grey - grey.min()) / (grey.max() - grey.min())
    return tuple((level * 8).round().int().flatten().tolist())


def test_sigma_data_fits():
    assert float(from_uint8(digits().images).std()) == pytest.approx(0.5, abs=0.02)


def tiny(n=10):
    images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)
    return Dataset("tiny", images, torch.arange(n), n)


def epoch(step_fn, steps):
    return torch.cat([step_fn(step, 0)[1] for step in range(steps)])


def test_an_epoch_sees_each_image_once_and_the_next_in_another_order():
    labels = epoch(batches(tiny(), batch=5, shards=1, seed=0, device="cpu"), 4)
    assert sorted(labels[:10].tolist()) == sorted(labels[10:].tolist()) == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()


def test_batches_may_cross_the_end_of_an_epoch():
    labels = epoch(batches(tiny(), batch=4, shards=1, seed=0, device="cpu"), 5)
    assert sorted(labels[:10].tolist()) == sorted(labels[10:].tolist()) == list(range(10))


def test_a_batch_may_hold_several_epochs():
    labels = batches(tiny(), batch=25, shards=1, seed=0, device="cpu")(0, 0)[1]
    assert sorted(labels[:20].tolist()) == sorted([*range(10), *range(10)])
    ones = epoch(batches(tiny(), batch=1, shards=1, seed=0, device="cpu"), 25)
    assert torch.equal(ones, labels)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="without a GPU there is no memory of one to keep images in",
)
@pytest.mark.parametrize("flip", [False, True])
def test_images_kept_on_a_gpu_are_those_kept_in_memory(flip):
    here, there = (
        batches(digits(), batch=64, shards=2, seed=0, device=device, flip=flip)
        for device in ("cpu", "cuda")
    )
    for step in (0, 1, 400):
        for shard in range(2):
            for a, b in zip(here(step, shard), there(step, shard), strict=True):
                assert b.is_cuda
                assert torch.equal(a, b.cpu())


def test_a_share_of_the_labels_is_dropped_and_the_others_stay():
    given = {"batch": 4096, "seed": 0, "device": "cpu"}
    plain = batches(digits(), shards=2, **given)
    some = batches(digits(), shards=2, label_dropout=0.1, **given)
    for step in (0, 7):
        before, after = (torch.cat([f(step, shard)[1] for shard in (0, 1)]) for f in (plain, some))
        dropped = after == NO_CLASS
        assert torch.equal(after[~dropped], before[~dropped])
        assert float(dropped.float().mean()) == pytest.approx(0.1, abs=5 * 0.3 / 64)
        halves = dropped.view(2, -1)
        assert not torch.equal(halves[0], halves[1])
    assert torch.equal(plain(3, 1)[0], some(3, 1)[0])


def uneven(counts=(1, 50, 0, 7)):
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return Dataset("uneven", images, labels, len(counts))


def test_balanced_batches_show_classes_equally_often_and_their_images_too():
    data = uneven()
    draw = batches(data, batch=15, shards=1, seed=0, device="cpu", balanced=True)
    drawn = [draw(step, 0) for step in range(200)]
    images = torch.cat([from_uint8(data.images[i : i + 1]) for i in range(58)]).flatten()
    for _, labels in drawn:
        assert labels.bincount(minlength=4).tolist() == [5, 5, 0, 5]
    seen = torch.cat([(x0.flatten()[:, None] == images).float().argmax(1) for x0, _ in drawn])
    assert torch.equal(data.labels[seen], torch.cat([labels for _, labels in drawn]))
    for label, times in ((0, 1000), (1, 20), (3, 142)):  # 1,000 of a class: whole epochs of it
        counts = seen.bincount(minlength=58)[data.labels == label]
        assert counts.min() >= times
        assert counts.max() <= times + 1
    first, second = (torch.cat([x for x, y in drawn[a : a + 50]]).flatten() for a in (0, 50))
    assert not torch.equal(first, second)


def test_balanced_batches_are_the_same_however_they_are_split():
    whole = batches(uneven(), batch=12, shards=1, seed=3, device="cpu", balanced=True)
    parts = batches(uneven(), batch=12, shards=3, seed=3, device="cpu", balanced=True)
    for step in (0, 5, 1000):
        split = torch.cat([parts(step, shard)[0] for shard in range(3)])
        assert torch.equal(whole(step, 0)[0], split)


def test_images_without_classes_cannot_be_balanced():
    data = Dataset("plain", torch.zeros(4, 1, 1, 1, dtype=torch.uint8), None, 0)
    with pytest.raises(InputError, match="plain has no classes"):
        batches(data, batch=2, shards=1, seed=0, device="cpu", balanced=True)


def test_half_of_the_images_are_mirrored_from_left_to_right():
    n = 10_000
    image = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)
    data = Dataset("one", image.expand(n, 1, 2, 2), None, 0)
    draw = batches(data, batch=2 * n, shards=2, seed=0, device="cpu", flip=True)
    both = [draw(0, shard)[0] for shard in range(2)]
    mirrored = [(x == from_uint8(image.flip(1))).flatten(1).all(1) for x in both]
    plain = (both[0] == from_uint8(image)).flatten(1).all(1)
    assert torch.equal(plain, ~mirrored[0])
    assert float(torch.cat(mirrored).float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 141)
    alike = float((mirrored[0] == mirrored[1]).float().mean())  # a shard has draws of its own
    assert alike == pytest.approx(0.5, abs=5 * 0.5 / 100)


def test_shards_are_the_parts_of_the_same_batch():
    whole = batches(tiny(), batch=6, shards=1, seed=3, device="cpu")
    parts = batches(tiny(), batch=6, shards=3, seed=3, device="cpu")
    for step in range(5):
        together = torch.cat([parts(step, shard)[0] for shard in range(3)])
        assert torch.equal(together, whole(step, 0)[0])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch of 6 cannot be split into 4"):
        batches(tiny(), batch=6, shards=4, seed=0, device="cpu")


def test_a_folder_takes_its_classes_from_sub_folders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture = torch.full((3, 4, 6), 10 * i, dtype=torch.uint8)
            (tmp_path / name / f"{i}.png").write_bytes(png_bytes(picture))
    data = load_dataset(str(tmp_path))
    assert data.images.shape == (4, 3, 4, 6)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.num_classes == 2
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 0, 10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no images in"),
        (lambda p: (p / "a.png").write_bytes(b"not a picture"), "a.png is not an image"),
        (
            lambda p: [
                (p / f"{n}.png").write_bytes(png_bytes(torch.zeros(3, n, n, dtype=torch.uint8)))
                for n in (4, 5)
            ],
            "5.png is 5x5 but .*4.png is 4x4",
        ),
    ],
)
def test_a_bad_folder_names_the_file(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        load_dataset(str(tmp_path))


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(InputError, match="no data set or folder 'digts'") as caught:
        load_dataset("digts")
    assert "did you mean 'digits'" in caught.value.hint


def test_a_process_may_ask_for_the_part_of_another_one(tmp_path):
    """ADCM makes its grid by the first part, in all processes."""

    def pick(step, shard):
        return torch.tensor([step, shard]), None

    ahead = PickerAhead(pick, 1, range(1, 4, 2), 60.0)
    asked = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1)]
    assert [ahead(*each)[0].tolist() for each in asked] == [list(each) for each in asked]
