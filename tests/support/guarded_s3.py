"""moto's S3 server with authentication on: what a wrong key cannot do shows up in tests."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import boto3

from pipelines.local_s3 import local_s3

_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}],
}


@contextmanager
def guarded_s3(bucket: str) -> Iterator[dict[str, str]]:
    """Start the server, and lock it with a key of its own.

    Yields:
        The variables that lead to it; they are also in this process's environment.
    """
    with local_s3(bucket) as endpoint:
        iam = boto3.client("iam")
        iam.create_user(UserName="tests")
        iam.put_user_policy(
            UserName="tests", PolicyName="all-of-s3", PolicyDocument=json.dumps(_POLICY)
        )
        key = iam.create_access_key(UserName="tests")["AccessKey"]
        os.environ["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]  # local_s3 puts back what was there
        os.environ["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        lock = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(lock, timeout=30).close()
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
