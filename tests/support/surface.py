"""TensorRT's modules as they are: classes that have exactly the attributes of the real ones.

The surfaces were recorded from the bindings of NVIDIA's wheels (`dir()` of each class). Whatever
the builder or the runtime touches that a version does not have, fails here as it would there.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, cast

SURFACES = Path(__file__).parent / "surfaces"


def classes(surface: str) -> dict[str, frozenset[str]]:
    """The public names of each class of that version."""
    recorded = json.loads((SURFACES / f"{surface}.json").read_text())["classes"]
    return {name: frozenset(members) for name, members in recorded.items()}


def module(surface: str) -> Any:
    """A module of that version, without behaviour: each member is its own name."""
    kind = surface.rpartition("-")[0].replace("-", "_")
    found = cast("Any", ModuleType(kind if kind == "tensorrt" else f"{kind}_bindings"))
    found.__version__ = json.loads((SURFACES / f"{surface}.json").read_text())["version"]
    for class_name, members in classes(surface).items():
        setattr(found, class_name, type(class_name, (), {member: member for member in members}))
    for class_name in {"BuilderFlag", "NetworkDefinitionCreationFlag"} & classes(surface).keys():
        values = {member: i for i, member in enumerate(sorted(classes(surface)[class_name]))}
        setattr(found, class_name, type(class_name, (), values))
    return found
