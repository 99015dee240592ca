"""Which environment variables hold secrets, by their names: no value of theirs may get into an experiment or its Plan,
which stand in files that others read.
"""

from __future__ import annotations

import re

_LAST_WORDS = "TOKEN|API_?KEY|SECRET|SECRET_KEY|PASSWORD|PASSWD|PASSPHRASE|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS"
_OF_TEXT = "BOS|EOS|EOT|PAD|UNK|SEP|CLS|MASK|START|STOP|END|IMAGE|THINK"
"""Tokens of a tokenizer, which are no secrets."""
_SECRET = re.compile(rf"(?!(?:\w*_)?(?:{_OF_TEXT})_TOKEN$)(?:\w*_)?(?:{_LAST_WORDS})", re.IGNORECASE)
_FROM_ENVIRONMENT = re.compile(r"""(?<!\\)(?:\\\\)*\$\{\s*oc\.env\s*:\s*["']?(\w+)""")
"""Not after a lone backslash: that is left for NeMo Gym, which reads it on the nodes."""
_SET_BY_SHELL = re.compile(r"(?:^|[\s;&])(\w+)=(?![\s;&]|$)")

ADVICE = "name it under secrets and export it before the submit: it then travels in a 0600 file"


def is_secret(variable: str) -> bool:
    """Whether a variable of this name holds a secret, as HF_TOKEN does and HF_TOKEN_PATH does not."""
    return _SECRET.fullmatch(variable) is not None


def read_by(text: str) -> list[str]:
    """Variables with secrets that the interpolations of a text read."""
    return [name for name in _FROM_ENVIRONMENT.findall(text) if is_secret(name)]


def set_by(line: str) -> list[str]:
    """Variables with secrets that a line of shell sets."""
    return [name for name in _SET_BY_SHELL.findall(line) if is_secret(name)]
