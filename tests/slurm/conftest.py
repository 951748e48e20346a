"""One SLURM for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, skip_without_slurm, started


@pytest.fixture(scope="package")
def two_nodes() -> Iterator[Cluster]:
    """The cluster, as long as tests of this folder run."""
    skip_without_slurm()
    with started() as cluster:
        yield cluster


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """The cluster with an empty queue before and after."""
    assert two_nodes.queue() == ""
    yield two_nodes
    two_nodes.cancel_all()
