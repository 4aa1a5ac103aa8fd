import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.core.edits import inpaint
from cmtool.core.samplers import multistep
from cmtool.errors import InputError
from tests.problems import Gaussian, randn_like_from


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), b=st.integers(1, 3), seed=st.integers(0, 99))
def test_projection_is_idempotent_affine_and_keeps_what_was_given(h, w, b, seed):
    g = torch.Generator().manual_seed(seed)
    reference, x, y = torch.randn(3, b, 3, h, w, generator=g)
    known = torch.rand(1, 1, h, w, generator=g) < 0.5
    project = inpaint(reference, known).project
    torch.testing.assert_close(project(project(x)), project(x))
    middle = project(0.3 * x + 0.7 * y)
    torch.testing.assert_close(middle, 0.3 * project(x) + 0.7 * project(y))
    where = known.expand_as(x)
    assert torch.equal(project(x)[where], reference[where])
    assert torch.equal(project(x)[~where], x[~where])


def test_the_start_does_not_see_the_hole():
    reference = torch.full((1, 3, 2, 2), 0.9)
    known = torch.tensor([[[[True, False], [False, True]]]])
    edit = inpaint(reference, known)
    assert torch.equal(edit.init, torch.where(known, 0.9, 0.0).expand(1, 3, 2, 2))


def test_inpainting_keeps_known_pixels_through_sampling():
    reference = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    known = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    edit, problem = inpaint(reference, known), Gaussian()
    x0 = multistep(
        problem.consistency, edit.init, [80.0, 2.0, 0.5], randn_like_from(0),
        sigma_min=problem.eps, project=edit.project,
    )  # fmt: skip
    where = known.expand_as(x0)
    assert torch.equal(x0[where], reference[where])
    assert not torch.equal(x0[~where], reference[~where])


def test_a_mask_of_another_size_names_both():
    with pytest.raises(InputError, match="mask is 4x5 but the image is 6x7"):
        inpaint(torch.zeros(1, 3, 7, 6), torch.ones(1, 1, 5, 4, dtype=torch.bool))
