"""The real models as fixtures; a run builds each at most once, and later runs read it from the cache."""

import pytest

from tests.models import zoo


@pytest.fixture(scope="session")
def minilm() -> zoo.RealModel:
    return zoo.minilm()


@pytest.fixture(scope="session")
def effnet() -> zoo.RealModel:
    return zoo.effnet()


@pytest.fixture(scope="session")
def pprec() -> zoo.RealModel:
    return zoo.pprec()
