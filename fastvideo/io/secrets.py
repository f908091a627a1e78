"""Keeps passwords and keys out of files, logs and messages."""

import os
import re

HIDDEN = "***"

# In `https://user:password@host/path?api_key=...#token=...` all between `://` and the last @ of the address is a login.
# A password may hold an unescaped slash: then what follows the first colon is no port. In a path, :// is :/ only.
_LOGIN = re.compile(
    r"""(?:(?<=://)|(?<=\bhttp:/)|(?<=\bhttps:/))"""
    r"""(?:[^/\s,'"?#]*@|(?!\[)[^/\s,'"@:]+:(?!\d*(?:[/\s,'"?#]|$))[^\s,'"]*@)"""
)
# A proxy may be given without a scheme, as `user:password@host`.
_BARE_LOGIN = re.compile(r"""(?<![^\s,='"])[^/\s,='":@]+:[^/\s,'"]+@(?=[\w.\[-])""")
_QUERY = re.compile(r"""(?<=[?&;#])([\w.~%\[\]-]+)=[^&;\s,'"#<>]*[^&;\s,'"#<>:.]""")
# Variables that hold a secret, by their names.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_\w*)?$", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value may be an ordinary word of the text


def redact(text: str) -> str:
    """The text without logins in URLs, values in their queries, and values of secret environment variables.

    Use it for everything that comes from a command line, a setting or an exception and goes into a file or a message.
    """
    text = _LOGIN.sub("", text)
    text = _BARE_LOGIN.sub("", text)
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    for name, value in os.environ.items():
        value = value.strip()  # a line break at its end isn't shown as it is
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not os.path.exists(value):
            text = text.replace(value, HIDDEN)
    return text


def one_line(error: BaseException) -> str:
    """`Type: message` in one line, without secrets."""
    return " ".join(redact(f"{type(error).__name__}: {error}").split())
