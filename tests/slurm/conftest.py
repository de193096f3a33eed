"""A Slurm for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, require_slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """In the folder `cluster` of a folder of its own."""
    require_slurm()
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
