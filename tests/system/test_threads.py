"""Work side by side: the same answers in the same order, and one thread each."""

import threading
import time

import pytest
import torch

from cmtool.system.threads import side_by_side


@pytest.fixture
def threads():
    """Two threads of torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_answers_come_in_order_and_two_at_once(threads):
    meet = threading.Barrier(2, timeout=30)

    def work(number):
        meet.wait()  # nobody gets past it alone
        time.sleep(0.01 * (number % 2))
        return number, torch.get_num_threads()

    assert side_by_side(work, [(n,) for n in range(6)]) == [(n, 1) for n in range(6)]
    assert torch.get_num_threads() == threads


def test_gradients_are_as_outside(threads):
    def wants(_):
        return torch.is_grad_enabled()

    assert side_by_side(wants, [(0,), (1,)]) == [True, True]
    with torch.no_grad():
        assert side_by_side(wants, [(0,), (1,)]) == [False, False]


@pytest.mark.parametrize(("is_light", "expected"), [(True, 1), (False, 2)])
def test_a_part_alone_has_all_threads_unless_it_is_light(is_light, expected, threads):
    def count(_):
        return torch.get_num_threads()

    assert side_by_side(count, [(0,)], is_light=is_light) == [expected]
    assert torch.get_num_threads() == threads


def test_a_failure_comes_through_and_the_rest_is_left(threads):
    done = []

    def work(number):
        if number == 0:
            raise ValueError("no")
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(ValueError, match="no"):
        side_by_side(work, [(n,) for n in range(50)])
    assert len(done) < 40
    assert torch.get_num_threads() == threads


def test_images_are_the_same_on_any_number_of_threads(model, threads):
    """Each of a batch, and of one alone, to the last bit."""
    from cmtool.sampling import sample

    both = sample(model, range(40))
    torch.set_num_threads(1)
    assert torch.equal(sample(model, range(40)), both)
    assert torch.equal(sample(model, [39]), both[39:])
