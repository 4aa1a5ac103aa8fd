"""Two models made one: a teacher, and a weaker one that guides it (Karras et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cmtool.core.networks.guided import Guided
from cmtool.errors import InputError
from cmtool.models import TRAINING_ONLY, Model
from cmtool.presets.build import build_denoiser, check_guided
from cmtool.presets.schema import ModelSection


def guided_model(main: Model, guide: Model, weight: float, *, hears_class: bool = True) -> Model:
    """Return the teacher `main`, whose x0 is moved by `weight` away from that of `guide`.

    x0 = x0_guide + weight (x0_main - x0_guide). The guide is a teacher of the same architecture and
    images, trained for less long. If not `hears_class`, it answers for images of no class.
    Raises InputError for models that do not go together, UserError for a guide that never learned
    images of no class.
    """
    for model in (main, guide):
        if model.kind != "teacher":
            hint = "guide its teacher, and distill that"
            raise InputError(f"{model.source} is a {model.kind} model", hint)
        if model.preset.model.guidance is not None:
            raise InputError(f"{model.source} is guided already", "give the model it was made of")
    ours, theirs = _facts(main.preset.model), _facts(guide.preset.model)
    for key, value in ours.items():
        if theirs.get(key) != value:
            what = f"{guide.source} has {key} = {theirs.get(key)}, {main.source} {value}"
            hint = "give an earlier checkpoint of the teacher, or one trained with its preset"
            raise InputError(what, hint)
    if not hears_class:
        check_guided(guide.preset, f"{guide.source} without a class", "leave --no-class out")
    update = {"guidance": weight, "guide_hears_class": hears_class}
    card = main.preset.model_copy(update={"model": main.preset.model.model_copy(update=update)})
    network = Guided(main.f.network, guide.f.network, weight, hears_class=hears_class)
    return replace(main, f=build_denoiser(card, network).eval(), preset=card)


def _facts(model: ModelSection) -> dict[str, Any]:
    """Return what two models must share: the network, the images, and how x0 is made of F."""
    options = model.network.options.items()
    return {
        **{f"model.network.{k}": v for k, v in options if k not in TRAINING_ONLY},
        **{f"model.{k}": v for k, v in model.model_dump().items() if k != "network"},
        "model.network": model.network.name,
    }
