from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from cmtool.errors import ResourceError, UserError
from cmtool.presets.toml import load_preset
from cmtool.system.alike import MAX_SHOWN, check_apart, check_over_store, difference
from cmtool.training.same import start_facts


def outcomes(*facts):
    """What each process hears that says these facts over a store."""
    store = HashStore()

    def say(rank):
        try:
            return check_over_store(store, rank, len(facts), facts[rank])
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(say, range(len(facts)), timeout=20))


def test_processes_that_say_the_same_go_on():
    facts = {"train.lr": 0.1, "sigmas": (80.0, 1.0), "teacher": None}
    assert outcomes(facts, {**facts, "sigmas": [80, 1.0]} | facts, facts) == [None] * 3


def test_all_processes_hear_which_key_differs_and_who_has_what():
    found = outcomes(
        {"a": 1, "train.lr": 0.1}, {"a": 1, "train.lr": 0.5}, {"a": 1, "train.lr": 0.1}
    )
    told = "the processes differ in train.lr: 0.1 in ranks 0, 2, 0.5 in rank 1"
    assert [error.what for error in found] == [told] * 3
    assert {error.exit_code for error in found} == {2}
    assert all(error.rank is None for error in found)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"a": 1}, {}, "a: 1 in rank 0, null in rank 1"),
        ({"a": 1}, {"a": True}, "a: 1 in rank 0, true in rank 1"),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}, ""),
        ({"a": "x" * 500}, {"a": "y"}, 'in rank 0, "y" in rank 1'),
    ],
)
def test_differences_are_of_values(ours, theirs, told):
    found = difference([ours, theirs])
    assert found.endswith(told)
    assert bool(found) == bool(told)
    assert len(found) < 200


def test_a_long_list_of_differences_is_counted():
    found = difference([dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1)])
    assert found.endswith(f"; and {6 - MAX_SHOWN} more")


@pytest.mark.parametrize(
    ("override", "is_told"),
    [("train.lr", True), ("run.log_every", True), ("data.path", False), ("data.workers", False)],
)
def test_where_a_process_has_its_data_is_its_own_business(override, is_told):
    value = {"data.path": "/elsewhere"}.get(override, 7)
    presets = [load_preset("digits-ct", over) for over in ({}, {override: value})]
    facts = [start_facts(p, None, None, f"cuda:{n}", resume=False, overwrite=False)
             for n, p in enumerate(presets)]  # fmt: skip
    assert (override in difference(facts)) == is_told
    assert bool(difference(facts)) == is_told


def gpus_of(*names):
    """What each process hears that says its GPU has this name."""
    store = HashStore()

    def say(rank):
        try:
            return check_apart(store, rank, len(names), names[rank])
        except ResourceError as error:
            return error

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(say, range(len(names)), timeout=20))


def test_processes_that_got_one_gpu_are_told():
    found = gpus_of("host/0/a", "host/0/b", "host/0/a", "host/1/b", "host/0/b")
    told = "one GPU serves ranks 0, 2 and one serves ranks 1, 4"
    assert [error.what for error in found] == [told] * 5
    assert "fewer processes" in found[0].hint


@pytest.mark.parametrize("names", [("", "", ""), ("host/0/a", "host/1/a", "other/0/a")])
def test_processes_on_cpus_or_on_gpus_of_their_own_go_on(names):
    assert gpus_of(*names) == [None] * 3
