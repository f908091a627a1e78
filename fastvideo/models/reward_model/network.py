"""Requests to servers: their addresses, a client, and one question asked until some server answers."""

import ipaddress
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastvideo.cli import FlagError
from fastvideo.io.secrets import redact

import httpx

Answer = TypeVar("Answer")

NO_SERVER = "no server answers at this address (connection refused); start it, or correct the URL"
LONGEST_PAUSE = 60.0  # seconds between two attempts at one server


def server_urls(urls: str, field: str) -> list[str]:
    """The URLs in a comma-separated setting. Raises FlagError if there is none, or one is no address of an HTTP server.

    field: name of the setting, for errors. They don't show the secrets in a URL.
    """
    found = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
    if not found:
        raise FlagError(field, repr(urls), "no URL in it; give http://host:port")
    for url in found:
        shown = redact(url)
        if not url.startswith(("http://", "https://")):
            raise FlagError(field, shown, "must start with http:// or https://")
        try:
            httpx.URL(url)
        except httpx.InvalidURL:
            raise FlagError(field, shown, "not a URL; write @ : / # ? in a password as %40 and so on") from None
    return found


def below(url: str, path: str) -> str:
    """The URL of a path below a server's URL. The query, which may hold a key, stays at the end."""
    base = httpx.URL(url)
    return str(base.copy_with(path=base.path.rstrip("/") + path))


def _is_here(url: str) -> bool:
    """Whether a URL means this machine."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def http_client(urls: Sequence[str], field: str, **given: Any) -> httpx.Client:
    """A client for servers. It uses the environment's proxies, unless all servers run on this machine: a proxy can't
    reach them.

    Raises FlagError about the setting `field` for proxies that can't be used. given: further arguments of httpx.Client.
    """
    try:
        # By default httpx lets requests above 100 wait, until they time out.
        return httpx.Client(trust_env=not all(map(_is_here, urls)), limits=httpx.Limits(), **given)
    except (ImportError, ValueError) as error:
        problem = f"the environment's proxies (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) can't be used: {redact(str(error))}"
        raise FlagError(field, None, problem) from error


def ask_in_turn(
    send: Callable[[str], Answer], urls: Sequence[str], first: int, retries: int, backoff: float
) -> tuple[Answer | None, str]:
    """Asks servers one after the other until one answers: (send(url), ""), or (None, the last problem).

    The first attempt goes to urls[first % len(urls)], each of `retries` further attempts to the next server. Before a
    server is asked again there is a pause of `backoff` seconds. The pause doubles each time up to LONGEST_PAUSE, and
    varies by half, so that many clients don't return at the same moment. A server that refuses (a 4xx status except 408
    and 429, or a redirect, which a second request can't change) isn't asked again. An answer that `send` can't read is
    a failure.
    """
    turn = deque(urls)
    turn.rotate(-first)
    asked, problem = set(), ""
    for _ in range(retries + 1):
        if not turn:  # all have refused
            break
        url = turn.popleft()
        if url in asked:
            time.sleep(min(backoff, LONGEST_PAUSE) * random.uniform(0.5, 1.5))
            backoff *= 2
        asked.add(url)
        try:
            return send(url), ""
        except httpx.HTTPStatusError as error:
            status, text = error.response.status_code, error.response.text[:300]
            problem, refused = f"HTTP {status} {text}", status < 500 and status not in (408, 429)
        except httpx.ConnectError as error:
            refused = False
            problem = NO_SERVER if "refused" in str(error) else repr(error)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
            problem, refused = str(error) if type(error) is ValueError else repr(error), False
        problem = redact(f"{url}: {problem}".splitlines()[0])
        if not refused:
            turn.append(url)
    return None, problem
