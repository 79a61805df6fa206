"""The whole flow in a browser: choose data, train, watch, evaluate, export, chat.

python webui.py                   the board
python webui.py --chat X          only the chat page, for X: a run, an adapter, a merged or plain model folder,
                                  a hub name, a FILE.gguf, or the recipe of a run; settings as key=value
    --host H       where it listens; unset: 127.0.0.1, this machine only. Any other needs a password
    --port P       unset: 7860; 0: any free one
    --password     asks for the password that the page will ask for; or set WEBUI_PASSWORD
    --allow-host N another host name under which the page may be reached, as through a proxy; several with commas

The language (English or 中文) follows the browser and is switched on the page.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path

from common import Message, UserError, print_notes
from runs import network
from runs.configuration import load_config, run_command
from runs.target import find_target


def main(argv: list[str]) -> None:
    args = parse(argv)
    network.check_environment()  # Gradio asks its own server through httpx
    password = read_password(args)
    source = find_target(args.chat or None, args.settings) if args.chat is not None else None
    listener = network.listen(
        args.host,
        int(args.port),
        Message("choose another port: --port {other}, or leave --host out", other=int(args.port) + 1),
    )
    print_notes(source.notes if source else (), file=sys.stderr)
    names = [name.strip().lower() for name in args.allow_host.split(",") if name.strip()]
    from web import app  # what is wrong is told before this takes its seconds

    app.serve(app.build(source, password, args.host, names), listener)


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, and the settings as `key=value`. Host and port may also stand where Gradio's users put them."""
    parser = argparse.ArgumentParser(prog="webui.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--chat", nargs="?", const="", metavar="X")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", default=os.environ.get("GRADIO_SERVER_PORT", "7860"))
    parser.add_argument("--password", action="store_true")
    parser.add_argument("--allow-host", default="")
    args, args.settings = parser.parse_known_args(argv)
    if args.chat and "=" in args.chat and not Path(args.chat).exists():
        args.chat, args.settings = "", [args.chat, *args.settings]
    if not args.port.isdecimal() or int(args.port) > 65535:
        raise UserError("--port {port} is not a port; give a number from 0 to 65535", port=args.port)
    if args.chat is None and args.settings:
        load_config(args.settings)  # raises UserError for a misspelt flag
        raise UserError(
            "{setting} is not for the board, where settings are on the page; leave it out", setting=args.settings[0]
        )
    return args


def read_password(args: argparse.Namespace) -> str | None:
    """The password that visitors need, or None where only this machine can visit; raises UserError if it is missing."""
    password = os.environ.pop("WEBUI_PASSWORD", None) or None  # the commands that a page starts need not know it
    if args.password:
        password = getpass.getpass("password for the page: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
        if not password:
            raise UserError("the password is empty; type one")
    if password is None and not network.is_loopback(args.host):
        raise UserError(
            "--host {host} lets others reach this machine's models and files; give a password (--password, or "
            "WEBUI_PASSWORD in the environment), or leave --host out and forward the port: ssh -L "
            "{port}:127.0.0.1:{port} THIS_MACHINE",
            host=args.host,
            port=args.port,
        )
    return password


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "chat"))
