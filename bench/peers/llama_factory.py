"""LLaMA-Factory's `train`, with a ChatML that does not learn the newline after the end of the turn.

python llama_factory.py RECIPE.yaml
"""

import sys

sys.modules["torchao"] = None  # the kit's is too new for it

from llamafactory.cli import main  # noqa: E402
from llamafactory.data.formatter import StringFormatter  # noqa: E402
from llamafactory.data.template import TEMPLATES  # noqa: E402

TEMPLATES["chatml"].format_assistant = StringFormatter(slots=["{{content}}<|im_end|>"])
sys.argv = ["llamafactory-cli", "train", sys.argv[1]]
main()
