"Package metadata: every value lives in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
spdx = {"apache2": "Apache-2.0"}[cfg["license"]]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "docs", "ray")}
extras["dev"] += extras["docs"]  # the test command builds the pages too

setup(
    name=cfg["name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license_expression=spdx,
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={"Repository": cfg["git_url"]},
    keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["data/*", "templates/*", "toy_model/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
