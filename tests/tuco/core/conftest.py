"""Pairs of many kinds with padded inputs; modules that want others define their own."""

import pytest

from tests.tuco import random_models as rm
from tests.tuco.core.forms import PAIRS


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture(scope="module", params=["right", "left"])
def inputs(request):
    return rm.batch(side=request.param)
