"""Secrets among the words of a command, which whoever sees a cluster's dashboard can read.

Names and shapes follow the rules of gitleaks and detect-secrets, as far as they rest on a name, a
prefix or a grammar. How random a word looks is not asked: hashes and names of shards look random.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

# Ends of words, as in PGPASSWORD; whole words; and pairs of words, as in SSH_PRIVATE_KEY.
_ENDINGS = ("secret", "token", "password", "passwd", "passphrase", "apikey", "privatekey")
_WORDS = {"pass", "dbpass", "pwd", "passcode", "pat", "jwt", "bearer"}
_WORDS |= {"secrets", "credential", "credentials", "creds", "accesskey", "secretkey"}
_KEYS = {"api", "private", "access", "secret", "account", "signing", "encryption", "master", "auth"}
_KEYS |= {"ssh", "deploy", "service", "license"}
# The last word of what tells of a secret and is none.
_NO_SECRET = {"file", "path", "dir", "url", "uri", "mode", "sock", "id", "name", "type", "ttl"}
_NO_SECRET |= {"host", "port", "user", "expiration", "expiry", "seconds", "endpoint"}
_WORKING_FOLDERS = {"PWD", "OLDPWD"}
_SHORTEST, _SHORTEST_KEY = 8, 16  # values of variables that are looked for; _KEY alone says little

_SHAPES = {
    "an AWS key": r"\b(?:A3T[A-Z0-9]|AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\bgh[pousr]_\w{10,}|\bgithub_pat_\w{10,}",
    "a GitLab token": r"\bgl(?:pat|ptt|rt|dt|cbt|soat|ft|imt|agent|oas)-[\w-]{10,}",
    "a Hugging Face token": r"\b(?:hf_|api_org_)\w{10,}",
    "an API key": r"\bsk-(?:[A-Za-z0-9]{20,}|(?:proj|svcacct|admin|ant|or|lf)-[\w-]{16,})"
    r"|\b[sr]k_(?:live|test|prod)_\w{10,}|\bAIza[\w-]{30,}|\bSG\.[\w-]{16,}\.",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}|\bxapp-[\w-]{10,}|hooks\.slack\.com/services/\w",
    "a token of a package registry": r"\bnpm_\w{30,}|\bpypi-\w{30,}",
    "a token": r"\b(?:ya29\.|do[opr]_v1_|dapi(?=[0-9a-f]{32})|hvs\.|shp(?:at|ss)_)[\w-]{20,}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}|\beyJ[\w-]{40,}",
    "an authorization header": r"(?i:\b(?:bearer|basic)\s+[\w.+/=~-]{16,})",
    "a signed URL": r"(?i:[?&](?:X-(?:Amz|Goog)-(?:Signature|Security-Token)|sig|signature)=)",
    "a storage key": r"(?i:\b(?:AccountKey|SharedAccessSignature)=)",
    "a password in a URL": r"://[^/@\s]*:[^/@\s]+@",
    "a private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|\bAGE-SECRET-KEY-1",
}
_ASSIGNMENT = re.compile(r"([A-Za-z][\w.-]*)\s*[=:]\s*(?=\S)")
_OPTION = re.compile(r"--?([A-Za-z][\w.-]*)")


def names_a_secret(name: str) -> bool:
    """Whether something of this name is a secret: ``DB_PASS``, ``githubPat``, ``ray.token``."""
    words = _words(name)
    if not words or words[-1] in _NO_SECRET or name in _WORKING_FOLDERS:
        return False
    return any(word.endswith(_ENDINGS) or word in _WORDS for word in words) or any(
        first in _KEYS and second in ("key", "keys") for first, second in pairwise(words)
    )


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def find_secret(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str] | None:
    """The first argument that looks like a secret, or holds one of this machine.

    Args:
        arguments: Words of a command.
        environment: Variables of this machine; the value of one that is named like a secret is one.

    Returns:
        Position from 1 and what it looks like, without the secret itself; None if there is none.
    """
    ours = {value: name for name, value in environment.items() if _is_secret_variable(name, value)}
    for position, argument in enumerate(arguments, start=1):
        if kind := _look(argument, ours):
            return position, kind
        option = _OPTION.fullmatch(arguments[position - 2]) if position > 1 else None
        if option and names_a_secret(option[1]) and not argument.startswith("-"):
            return position, f"the value of {option[0]}"
    return None


def _is_secret_variable(name: str, value: str) -> bool:
    if os.path.exists(value):  # GOOGLE_APPLICATION_CREDENTIALS and the like
        return False
    if names_a_secret(name):
        return len(value) >= _SHORTEST
    return _words(name)[-1:] == ["key"] and len(value) >= _SHORTEST_KEY


def _look(argument: str, ours: Mapping[str, str]) -> str:
    for value, name in ours.items():
        if value in argument:
            return f"the value of ${name} on this machine"
    for kind, shape in _SHAPES.items():
        if re.search(shape, argument):
            return kind
    for name in _ASSIGNMENT.findall(argument):
        if names_a_secret(name):
            return f"the value of {name}"
    return ""
