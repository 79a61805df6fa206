"""The network: what the environment says of it (proxies, certificates, tokens), and names of this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import urlsplit

from common import Message, UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")

# What httpx reads when a client is made.
CLIENT_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")


def check_environment() -> None:
    """Raises UserError that names the variables by which no connection could be made: httpx would end in a traceback.

    To be called before anything asks a hub or starts a server. Asks nobody, takes milliseconds.
    """
    import httpx

    for name in TOKENS:
        token = os.environ.get(name, "").strip()
        if not token.isascii() or any(character.isspace() for character in token):
            text = "the variable {variable} is not a token (ASCII without spaces); copy it again, or unset it"
            raise UserError(text, variable=name)
    try:
        httpx.Client().close()
    except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        variables = [name for name in (*CLIENT_VARIABLES, *map(str.lower, CLIENT_VARIABLES)) if os.environ.get(name)]
        text = "no connection can be made with the variables {variables} ({problem}); correct or unset them"
        raise UserError(text, variables=variables, problem=str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# For servers


def listen(host: str, port: int, advice: Message) -> socket.socket:
    """A socket, before anything slow starts; raises UserError, with `advice`, where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        problem = error.strerror
    except OSError as error:  # whose text names the address once more
        problem = os.strerror(error.errno)
    text = "cannot listen on {host}:{port} ({problem}); {advice}"
    raise UserError(text, host=host, port=port, problem=problem, advice=advice)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_name(url: str) -> str:
    """The name in a URL, or in a `Host` header after "//"; "" where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # "//[": no address
        return ""
