"""TRL's SFTTrainer with PEFT as its documentation shows them, on prompt-completion rows.

python trl_peft.py SETTINGS.json

By the releases that LLaMA-Factory pins (TRL 0.24, PEFT 0.18): TRL 1.15 computes the output layer by a Triton kernel on
every device, which ends in an error on a CPU ("0 active drivers").
"""

import json
import sys
from pathlib import Path

sys.modules["torchao"] = None  # the kit's is too new for this PEFT

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
trainer = SFTTrainer(
    model=settings["model"],
    args=SFTConfig(**settings["arguments"], max_length=settings["length"]),
    train_dataset=Dataset.from_list(settings["rows"]),
    peft_config=LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0, target_modules=settings["targets"], task_type="CAUSAL_LM"
    ),
)
set_peft_model_state_dict(trainer.model, load_file(Path(settings["adapter"]) / "adapter_model.safetensors"))
trainer.train()
