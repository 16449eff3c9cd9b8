"""The CPU kernels in C, built where there is a compiler; everything else is in pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

FOLDER = Path("kernels/cpu")
FLAGS = "-std=gnu11 -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra".split()
X86 = {
    "base": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def libraries() -> list[Extension]:
    if sys.platform == "win32":  # no POSIX threads; backend "torch" runs there
        return []
    builds = X86 if platform.machine() in ("x86_64", "AMD64") else {"base": []}
    return [
        Extension(
            f"chunked_ce.backends.cpu_{name}",
            sources=sorted(str(p) for p in FOLDER.glob("*.c")),
            depends=sorted(str(p) for p in FOLDER.glob("*.h")),
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,  # without a compiler the install succeeds all the same
        )
        for name, flags in builds.items()
    ]


class Build(build_ext):
    """Plain shared libraries: nothing of Python is in them, so none is named like a module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".bin"


class Wheel(bdist_wheel):
    """One wheel for every Python, and for the platforms that the libraries are of."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=libraries(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
