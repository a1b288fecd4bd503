"""Packages that only some need: installed by an extra of the distribution, or missed in a sentence.

    s3          boto3: corpora and protectors at s3://
    jobs        Ray and the command line
    openvino    embeddings on CPUs at half the CPU time; part of jobs, too
    parquet     corpora of Parquet files: pyarrow
    clip        open_clip's encoders
    visibility  how different two pictures look: CIEDE2000, FLIP, SSIMULACRA2
    evaluate    adversaries, attacks and compared methods; the embedded corpora; visibility
    demo        a local S3 server, and what `one4all demo` needs besides
    formats     HEIC and JPEG XL; parts of both packages are under the GPL
    words       embeddings of words that the embedded text table does not hold
    cluster     the dashboard and the jobs API of a Ray cluster
    all         everything but formats, words and cluster

They are imported where they are used, after `require` has made sure of them.
"""

from __future__ import annotations

from importlib.util import find_spec

from one4all.errors import UsageError


def require(module: str, extra: str) -> None:
    """Make sure that an optional package is there, without importing it.

    Args:
        module: Name under which it is imported.
        extra: The extra that installs it.

    Raises:
        UsageError: It is not installed; the text has the command that installs it.
    """
    if not installed(module):
        raise UsageError(f"{module} is not installed: pip install 'one4all[{extra}]'")


def installed(module: str) -> bool:
    """Whether an optional package is there, without importing it."""
    return find_spec(module) is not None
