"""A minute of tests/fuzz.py, with fixed seeds."""

import pytest
from fuzz import check_image, check_shard, files, run, shards


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_no_mutation_of_an_image_breaks_a_promise(number, tmp_path):
    run(check_image, files(), number=number, examples=2000, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_no_mutation_of_a_shard_breaks_a_promise(number, tmp_path):
    run(check_shard, shards(), number=number, examples=250, folder=tmp_path)
