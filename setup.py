"""Only the C parts are declared here; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "core/native/build.py:ffibuilder",
        "sidecars/native/build.py:blk",
        "sidecars/native/build.py:net",
        "sidecars/native/build.py:serial",
        "sidecars/native/build.py:pager",
        "sidecars/native/build.py:queue",
        "sidecars/native/build.py:vhost",
        "sidecars/native/build.py:seccomp",
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # so are the C parts built: one wheel for 3.11 and later
)
