"""The root of every error that a user can cause; the command line prints these without a traceback."""


class ConvlstmVoError(Exception):
    """A mistake in input, options or files. The message names the file and line or key, the rule, the remedy."""
