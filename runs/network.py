"""The network: what the environment says of it (proxies, certificates, tokens), and names of this machine."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import ssl
from urllib.parse import urlsplit

from common import Message, UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")


def check_environment() -> None:
    """Raises UserError that names the variable by which no connection could be made: httpx would end in a traceback.

    To be called before anything asks a hub or starts a server. Asks nobody, takes milliseconds.
    """
    for name in (*PROXIES, *map(str.lower, PROXIES)):
        _check_proxy(name, os.environ.get(name, "").strip())
    for name in TOKENS:
        token = os.environ.get(name, "").strip()
        if not token.isascii() or any(character.isspace() for character in token):
            raise UserError(
                "the environment variable {variable} is not a token: it has letters other than ASCII, or spaces; "
                "copy the token again, or unset it",
                variable=name,
            )
    _check_certificates()
    _check_client()


def _check_proxy(name: str, proxy: str) -> None:
    import httpx

    if not proxy:
        return
    scheme = proxy.partition("://")[0].lower() if "://" in proxy else "http"
    if scheme not in PROXY_SCHEMES:
        raise UserError(
            "the environment variable {variable} names the proxy {proxy}; use one of {schemes}, or unset it",
            variable=name,
            proxy=proxy,
            schemes=PROXY_SCHEMES,
        )
    if scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise UserError(
            "the environment variable {variable} names the SOCKS proxy {proxy}, for which the package socksio is "
            "missing; run make setup again, or unset it",
            variable=name,
            proxy=proxy,
        )
    try:
        host = httpx.URL(proxy if "://" in proxy else f"http://{proxy}").host
    except httpx.InvalidURL:
        host = ""
    if not host:
        raise UserError(
            "the environment variable {variable} names the proxy {proxy}, which is not an address like "
            "http://HOST:PORT; correct or unset it",
            variable=name,
            proxy=proxy,
        )


def _check_certificates() -> None:
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # an SSLError is one
            problem = error.strerror or str(error)
            raise UserError(
                "the environment variable {variable} names {path}, whose certificates cannot be read ({problem}); "
                "correct or unset it",
                variable="SSL_CERT_FILE",
                path=file,
                problem=problem,
            ) from None
    elif folder and not os.path.isdir(folder):
        problem = os.strerror(2 if not os.path.exists(folder) else 20)
        raise UserError(
            "the environment variable {variable} names {path}, whose certificates cannot be read ({problem}); "
            "correct or unset it",
            variable="SSL_CERT_DIR",
            path=folder,
            problem=problem,
        )


def _check_client() -> None:
    """Makes a client as the libraries do; what still fails lies in NO_PROXY, or in several variables together."""
    import httpx

    try:
        httpx.Client().close()
    except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        known = [*PROXIES, "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"]
        variables = [name for name in (*known, *map(str.lower, known)) if os.environ.get(name)]
        raise UserError(
            "no connection can be made with the environment variables {variables} ({problem}); correct or unset them",
            variables=variables,
            problem=str(error),
        ) from None


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
    raise UserError(
        "cannot listen on {host}:{port} ({problem}); {advice}", host=host, port=port, problem=problem, advice=advice
    )


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
