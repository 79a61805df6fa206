"""Loading a tokenizer: the one place where it is done, and where a wrong label in tokenizer_config.json is noticed.

transformers 5 builds the tokenizer anew from the vocabulary of `tokenizer.json` by the class that `tokenizer_class`
names. Many models name a class of another kind (a byte-level Llama 3 called LlamaTokenizerFast): spaces and Chinese
get lost without an error. Here `tokenizer.json` decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Config, UserError
from runs.target import find_model

# Texts on which kinds of tokenizers differ: spaces, line ends, accents in both forms, contractions, digits, code,
# several scripts, emoji, and characters that some normalizers replace.
PROBES = (
    "The French  café",
    " a leading space",
    "cafe\u0301 and DON'T, I'll",
    "a\n\n  b\r\n\r\n\tc  ",
    "12345 67, 3.14",
    "def f(x):\n\treturn x.value()->y  # snake_case CamelCase",
    "你好，世界！日本語テスト",
    "🙂👩‍👩‍👧",
    "ﬁ ① Å \u00a0\u200b",
    "عربى हिन्दी",
    "!!!...???",
)


def load_tokenizer(place: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a folder or of a model in the hub's cache; nothing is fetched.

    Where there is a `tokenizer.json`, it encodes PROBES as that file says, whatever class the label names; a class that
    does otherwise is replaced by the plain one, which also saves a label that plain transformers reads rightly.
    Raises UserError where there is no tokenizer, or where no class does what the file says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(place) / "tokenizer.json"
    failure: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:  # the last two: a class of another kind than the file
        tokenizer, failure = None, error
    if tokenizer is not None and (not file.is_file() or _is_custom(tokenizer)):
        return tokenizer
    if not file.is_file():
        raise _not_there(place, failure) from None
    if type(tokenizer) is PreTrainedTokenizerFast and "add_prefix_space" not in tokenizer.init_kwargs:
        return tokenizer  # it has read the file itself: reading it once more to compare takes up to a second
    expected = _probe(read_backend(file))
    if tokenizer is not None and _probe(tokenizer.backend_tokenizer) == expected:
        return tokenizer
    return _by_the_file(Path(place), expected)


def load_base_tokenizer(config: Config) -> Any:
    """The tokenizer of the base model that a recipe names; raises UserError where it is not on the disk."""
    place = find_model(config.model_name_or_path) or config.model_name_or_path
    return load_tokenizer(place, trust_remote_code=config.trust_remote_code)


def read_backend(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json; raises UserError where the file is broken."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises nothing more exact
            raise
        raise UserError(
            "{file} cannot be read ({reason}); fetch the model again, or copy this file again",
            file=file,
            reason=_first_line(error),
        ) from None


def _by_the_file(folder: Path, expected: list[tuple[list[int], str]]) -> Any:
    """The tokenizer of `tokenizer.json` as it stands there, with the names and the template of its settings."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _not_there(folder, error) from None
    for text, found, wanted in zip(PROBES, _probe(tokenizer.backend_tokenizer), expected, strict=True):
        if found != wanted:
            raise UserError(
                "the tokenizer that transformers builds in {folder} encodes {text} otherwise than its tokenizer.json;\n"
                "tokenizer_config.json contradicts that file: fetch both again from where the model was published",
                folder=folder,
                text=repr(text),
            )
    return tokenizer


def _not_there(model: Path | str, error: Exception | None) -> UserError:
    return UserError(
        "the tokenizer of {model} is not on the disk, or cannot be read ({reason}); fetch it: python download.py",
        model=model,
        reason=_first_line(error),
    )


def _is_custom(tokenizer: Any) -> bool:
    """Whether there is no backend to compare, or its code came with the model (trust_remote_code): that one decides."""
    return not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers.")


def _probe(backend: Any) -> list[tuple[list[int], str]]:
    """For each text of PROBES its ids, and what these decode to."""
    backend.no_truncation()  # transformers sets both for each call
    backend.no_padding()
    ids = [encoding.ids for encoding in backend.encode_batch(list(PROBES), add_special_tokens=False)]
    return [(some, backend.decode(some, skip_special_tokens=False)) for some in ids]


def _first_line(error: Exception | None) -> str:
    return (str(error).splitlines() or [""])[0]
