"""What is told while images are drawn."""

import pytest
import torch

from cmtool.models import load_model
from cmtool.presets.schema import Choice
from cmtool.sampling import generate, plan


@pytest.mark.parametrize(
    ("name", "sampler", "num", "batch"),
    [("digits-cd", "multistep", 5, 256), ("digits-cd", "multistep", 35, 17),
     ("digits-edm", "heun", 3, 2), ("digits-edm", "dpmpp_2m", 3, 3)],
)  # fmt: skip
def test_progress_goes_from_none_to_all_and_changes_no_image(name, sampler, num, batch):
    model, seen = load_model(name), []
    chosen = plan(model.preset, 2, sampler=Choice(name=sampler))

    def images(**options):
        return torch.cat(list(generate(
            model.f, model.preset, chosen, range(num), batch=batch, **options
        )))  # fmt: skip

    told = images(on_drawn=lambda done, total: seen.append((done, total)))
    assert torch.equal(told, images())
    assert seen[0] == (0, num)
    assert seen[-1] == (num, num)
    assert seen == sorted(set(seen))
    assert len(seen) > chosen.evaluations
