"""Serves a trained model to programs that speak OpenAI's API: chat completions, responses and completions.

python api.py                     the newest run, at http://127.0.0.1:8000/v1
python api.py saves/NAME          a run, an adapter, a merged or plain model folder, a hub name, a FILE.gguf,
                                  or the recipe of a run
python api.py FOLDER template=llama3

Environment: API_HOST (127.0.0.1; any other needs API_KEY), API_PORT (8000), API_KEY (clients send it as a bearer
token), API_MODEL_NAME (the name that requests use; unset: that of the folder), FASTAPI_ROOT_PATH (behind a proxy),
MAX_CONCURRENT (8: replies computed at once; 8 times as many may wait), API_CORS_ORIGINS (web pages that may use it, as
https://example.com,http://localhost:3000; *: all; unset: none), API_ALLOWED_HOSTS (names under which it is reached
without a key, in addition to 127.0.0.1 and localhost; *: any).
"""

from __future__ import annotations

import os
import sys

from common import Message, print_notes
from inference.api.options import ServerOptions
from inference.load import load
from runs.configuration import run_command
from runs.network import listen
from runs.target import find_target, read_arguments


def main(argv: list[str]) -> None:
    target, settings = read_arguments(argv)
    options = ServerOptions.from_environment(os.environ)
    source = find_target(target, settings)
    print_notes(source.notes, file=sys.stderr)
    with listen(options.host, options.port, Message("set API_HOST, API_PORT")) as listener:
        print(Message("loading {name} ...", name=source.name), file=sys.stderr, flush=True)
        model = load(source)
        from inference.api.server import serve  # what is wrong is told before this takes its second

        serve(model, options, listener)


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "chat"))
