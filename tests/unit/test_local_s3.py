"""The local S3 server keeps what conditional writes promise, which moto alone does not."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.local_s3 import conditions_in_turn


@pytest.mark.parametrize("header", ["HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"])
def test_of_writers_with_a_condition_one_wins(header):
    objects = []

    def look_then_write(server, environ, start_response):
        there = bool(objects)
        time.sleep(0.02)  # another thread has its turn
        if not there:
            objects.append(environ)
        return not there

    answer = conditions_in_turn(look_then_write)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: answer(None, {header: "x"}, None), range(8)))
    assert sum(won) == 1
