"""Bundle a finished run: `python -m tests.assets.bundle runs/teacher digits-edm OUT.safetensors`.

Its kept weights go into one file in half precision, with what run.json says of how they were made.
How to sample it is taken from the preset named, as good levels are found after training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cmtool.formats.native import read_about, read_weights, write_weights
from cmtool.models import find_model
from cmtool.presets.toml import load_preset


def main(run: Path, preset: str, out: Path) -> None:
    """Write the run's weights EMA to `out` in float16."""
    source = find_model(run)[0].path
    made = json.loads((run / "run.json").read_text())
    words = made["arguments"]
    if "--out" in words:  # where it was made is nobody's business
        at = words.index("--out")
        made["arguments"] = words[:at] + words[at + 2 :]
    about = {**read_about(source), "made": made}
    about["preset"]["sample"] = load_preset(preset).sample.model_dump(mode="json")
    write_weights(out, {name: t.half() for name, t in read_weights(source).items()}, about)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
