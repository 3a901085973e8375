"""Shared fixtures of the tests of adapters."""

import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of small random models of transformers, by family."""
    from tests.adapters import save_bases

    root = tmp_path_factory.mktemp("bases")
    save_bases(root)
    return root
