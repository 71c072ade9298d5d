"""Everything static is in pyproject.toml; native extensions are declared here."""

from setuptools import setup

setup()
