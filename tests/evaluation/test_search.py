import pytest
import torch

from cmtool.errors import UserError
from cmtool.evaluation.search import search_indices, ternary_search

TRACE = {5: 3.649, 9: 3.319, 10: 3.051, 11: 2.928, 12: 3.049, 13: 3.277, 14: 3.460}
"""FIDs of the published CIFAR-10 model by the second index of 18, from the release's notebook."""


@pytest.mark.parametrize("high", range(2, 40))
def test_the_bottom_of_a_valley_is_found_in_few_steps(high):
    for bottom in range(1, high):
        asked = []

        def value(i, bottom=bottom, asked=asked):
            asked.append(i)
            return abs(i - bottom)

        assert ternary_search(value, 0, high) == bottom
        assert len(asked) == len(set(asked))
        assert len(asked) <= 14


def test_the_published_search_ends_where_it_ended():
    asked = []

    def fid(i):
        asked.append(i)
        return TRACE[i]

    assert ternary_search(fid, 0, 17) == 11
    assert set(asked) == TRACE.keys()


def test_the_best_of_all_that_were_asked_is_returned():
    values = {1: 0.0, 2: 9.0, 3: 5.0, 4: 4.0, 5: 5.0, 6: 9.0, 7: 9.0}  # two valleys
    asked = []

    def value(i):
        asked.append(i)
        return values[i]

    found = ternary_search(value, 0, 8)
    assert values[found] == min(values[i] for i in asked)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_is_returned_of_scores_without_order(seed):
    scores = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()
    asked = []
    found = ternary_search(lambda i: asked.append(i) or scores[i], 0, 29)
    assert scores[found] == min(scores[i] for i in asked)


def test_an_interval_of_three_levels_is_halved_before_all_are_asked():
    asked = []
    assert ternary_search(lambda i: asked.append(i) or i, 0, 4) == 1
    assert asked == [1, 2]


@pytest.mark.parametrize("high", range(2, 40))
def test_of_equal_scores_the_search_goes_on_towards_the_end(high):
    """Where the score is flat but for the lowest level of all, that one is found."""
    assert ternary_search(lambda i: i < high - 1, 0, high) == high - 1


def test_of_equal_best_scores_the_first_is_taken():
    assert ternary_search(lambda i: abs(i - 5) > 1, 0, 9) == 4
    asked = []
    found = ternary_search(lambda i: asked.append(i) or 0.0, 0, 30)
    assert found == min(asked)


def test_levels_are_added_one_at_a_time():
    asked = []

    def score(indices):
        asked.append(indices)
        return sum(abs(i - best) for i, best in zip(indices, (0, 7, 12), strict=False))

    assert search_indices(score, 3, 18) == (0, 7, 12)
    assert {len(i) for i in asked} == {2, 3}
    assert all(i[-2] < i[-1] < 17 for i in asked)
    assert all(i[:2] == (0, 7) for i in asked if len(i) == 3)


def test_no_room_for_a_level_is_told():
    with pytest.raises(UserError, match="no level between 0 and 1"):
        search_indices(lambda _: 0.0, 2, 2)
