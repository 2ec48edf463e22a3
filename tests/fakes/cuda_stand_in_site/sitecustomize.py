"""Python reads this at its start when the folder is on PYTHONPATH: install the stand-in for CUDA once torch is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class _AfterTorch(MetaPathFinder):
    """Finds torch as Python does, and adds a step to its import.

    It stays in its place: transformers looks torch up without importing it, long before anyone does.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return torch's spec with the added step; others are left to Python."""
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        import_torch = spec.loader.exec_module

        def import_torch_and_install(module: ModuleType) -> None:
            import_torch(module)
            _stand_in().install()

        spec.loader.exec_module = import_torch_and_install  # type: ignore[method-assign]  # of this one loader object
        return spec


def _stand_in() -> ModuleType:
    """Return the module by its file: the child may not have the tests on its path."""
    file = Path(__file__).parent.with_name("cuda_stand_in.py")
    spec = importlib.util.spec_from_file_location("cuda_stand_in", file)
    assert spec is not None and spec.loader is not None, f"{file} is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.meta_path.insert(0, _AfterTorch())
