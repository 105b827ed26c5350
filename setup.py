"""Maps the two source folders onto one installed package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

PACKAGE_DIR = {"inception_fast": "inception_fast", "inception_fast.kernels": "kernels"}
DATA = ["py.typed", "*.pyi", "*.json", "*.yaml"]


def packages() -> list[str]:
    """Both packages and every package inside them, by their installed names."""
    return [
        name
        for root, folder in PACKAGE_DIR.items()
        for name in (root, *(f"{root}.{inner}" for inner in find_packages(folder)))
    ]


setup(
    cmake_source_dir=".",
    package_dir=PACKAGE_DIR,
    packages=packages(),
    package_data={name: DATA for name in packages()},
    include_package_data=False,
)
