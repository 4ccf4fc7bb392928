"""Machines with and without other packages' kernels.

None of the packages runs without a GPU. The modules in stand_ins/ have their names and signatures and compute with
torch: what is tested by them is which of them is called, and with what.
"""

import sys
from pathlib import Path

import pytest

STAND_INS = Path(__file__).with_name("stand_ins")
NAMES = {path.stem for path in STAND_INS.iterdir()}


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


@pytest.fixture
def installed(monkeypatch):
    """Makes a folder the only place where the packages are; the stand-ins' at first."""
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in NAMES}

    def install(folder):
        forget()
        monkeypatch.syspath_prepend(str(folder))

    install(STAND_INS)
    yield install
    forget()
    sys.modules.update(others)


@pytest.fixture
def missing(monkeypatch):
    """A machine without the packages."""
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
