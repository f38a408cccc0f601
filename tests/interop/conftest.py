"""The shared gateways as strangers' programs meet them."""

from __future__ import annotations

import pytest
from programs import Site


@pytest.fixture(scope="session")
def site(gateway, tmp_path_factory):
    return Site(gateway, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def narrow_site(narrow_gateway, tmp_path_factory):
    """The site that speaks plain PSK to those that can do no more."""
    return Site(narrow_gateway, tmp_path_factory.mktemp("narrow-site"))
