from dataclasses import replace

from cmtool.evaluation.consistency import consistency
from cmtool.models import load_model


def test_paths_begin_at_the_most_noise_that_both_models_know():
    def most(model, sigma_max):
        noise = model.preset.noise.model_copy(update={"sigma_max": sigma_max})
        return replace(model, preset=model.preset.model_copy(update={"noise": noise}))

    model, teacher = load_model("digits-cd"), load_model("digits-edm")
    for pair in ((most(model, 5.0), teacher), (model, most(teacher, 5.0))):
        assert consistency(*pair, range(1), 2, 1, "cpu")[0].sigma == 5.0
