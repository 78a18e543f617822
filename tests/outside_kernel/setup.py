from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

import tersor

setup(
    ext_modules=[
        Pybind11Extension(
            "outside_kernel",
            ["outside_kernel.cpp"],
            include_dirs=[tersor.get_include()],
            cxx_std=17,
        )
    ]
)
