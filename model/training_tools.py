"""The commands that train import it before PyTorch. It says what to install if that is missing."""

import sys
from importlib.util import find_spec

if missing := [name for name in ("torch", "yaml", "safetensors", "kornia") if not find_spec(name)]:
    sys.exit(
        f"error: training needs {', '.join(missing)}, which serving does without: "
        "pip install -r requirements-train.txt"
    )
