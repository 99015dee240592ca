"""The one error that bad input leads to: a sentence for the person who must act, and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """The request was wrong: its text says what, where (file, line, key), what is allowed and what to do.

    The command line prints it without a traceback and exits with 2; the Python API raises it as it is.
    """
