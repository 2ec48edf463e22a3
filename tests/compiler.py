"""Where the C++ kernels must compile. Tests ask for the compiler, not for the library: one that cannot be built fails them."""

import shutil
import sys

import pytest

HAS_COMPILER = sys.platform == "linux" and any(map(shutil.which, ("g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
