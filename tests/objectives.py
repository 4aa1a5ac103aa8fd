"""Training objectives for tests, by the name of a method and the choices it takes."""

import inspect
from functools import partial

from cmtool.core.distances import l2
from cmtool.core.losses import uniform_weight
from cmtool.core.methods import METHODS, Models
from cmtool.core.noise import NoiseRange, uniform
from cmtool.core.objective import make_objective
from cmtool.core.solvers import heun


def objective_of(
    name, levels=uniform, noise_range=NoiseRange(), teacher=None, augment=None, **choices
):
    """`make_objective` with l2, weight 1 and Heun's steps where nothing else is said.

    A module of the method's own is made anew.
    """
    choices = {
        "distance": l2, "weight": uniform_weight, "solver": heun, "noise_range": noise_range,
        "sigma_data": 0.5, "transition": 1.0, **choices,
    }  # fmt: skip
    loss = METHODS[name].loss
    taken = inspect.signature(loss).parameters
    method = partial(loss, **{key: value for key, value in choices.items() if key in taken})
    objective = make_objective(method, levels, noise_range, teacher=teacher, augment=augment)
    if METHODS[name].owns is None:
        return objective
    own = METHODS[name].owns()
    return lambda models, *given: objective(models._replace(own=own), *given)


def alone(student, name="", target=None):
    """The models of a student that is compared with itself, and what its method owns."""
    owns = METHODS[name].owns if name in METHODS else None
    return Models(student, target or student, own=owns() if owns else None)
