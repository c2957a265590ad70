"Which tests run: `--slow`, `--cuda` and `--hub` add those that are marked so."
import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when datasets is imported: no test asks the hub unasked

import pytest

FLAGS = {"slow": "takes long", "cuda": "needs a GPU", "hub": "needs the Hugging Face hub"}


def pytest_addoption(parser):
    for flag, why in FLAGS.items(): parser.addoption(f"--{flag}", action="store_true", help=f"run tests marked {flag}: {why}")


def pytest_collection_modifyitems(config, items):
    skips = {flag: f"{why}: run with --{flag}" for flag, why in FLAGS.items() if not config.getoption(f"--{flag}")}
    if importlib.util.find_spec("nbdev") is None: skips["nbdev"] = "nbdev is not installed"
    for item in items:
        for flag in skips.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=skips[flag]))
