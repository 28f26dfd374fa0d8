"""The C++ extension. It is optional: where there is no compiler, the package is installed without it."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pytorch2jax._native",
            sources=["native/handler.cpp"],
            include_dirs=["native/third_party"],
            depends=["native/third_party/dlpack/dlpack.h", "native/third_party/xla/ffi/api/c_api.h"],
            extra_compile_args=["-std=c++17", "-O2"],
            language="c++",
            optional=True,
        )
    ]
)
