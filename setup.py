"""What pyproject.toml cannot say: one of the dependencies lies in this folder."""

from pathlib import Path

from setuptools import setup

here = Path(__file__).parent.resolve()
lines = (here / "requirements.txt").read_text(encoding="utf-8").splitlines()
requirements = [line.split("#")[0].strip() for line in lines if line[0] != "#"]
setup(
    install_requires=[
        f"slsnet-pixels @ {(here / line).as_uri()}" if line.startswith("./") else line
        for line in requirements
    ]
)
