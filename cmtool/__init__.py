"""cmtool: consistency models from the command line, and in Python.

    import cmtool

    model = cmtool.load_model("digits-cd")
    images = cmtool.sample(model, range(16), steps=2)          # (16, 3, 8, 8) in [-1, 1]
    wide = cmtool.edit.superres(model, images[:, :, ::2, ::2], factor=2)
    cmtool.evaluate(images, metric="fid", reference="digits")

`import cmtool` is cheap: a name is imported when it is asked for. The images of a seed are those
that `cmtool sample` draws, and the edits are those of `cmtool edit`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmtool import editing as edit
    from cmtool.evaluation.measure import evaluate
    from cmtool.models import Model, load_model
    from cmtool.sampling import sample

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "edit", "evaluate", "load_model", "sample"]

_HOMES = {
    "Model": "cmtool.models",
    "edit": "cmtool.editing",
    "evaluate": "cmtool.evaluation.measure",
    "load_model": "cmtool.models",
    "sample": "cmtool.sampling",
}
"""The module of each name; `edit` is its module itself."""


def __getattr__(name: str) -> Any:
    """Import a name of the Python API."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cmtool' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name == "edit" else getattr(module, name)


def __dir__() -> list[str]:
    """Return the names of the Python API beside those of every module."""
    return sorted({*globals(), *__all__})
