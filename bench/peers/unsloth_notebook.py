"""Unsloth as its notebooks show it: FastLanguageModel, SFTTrainer on texts, train_on_responses_only.

python unsloth_notebook.py SETTINGS.json
"""

import json
import sys
from pathlib import Path

from unsloth import FastLanguageModel, is_bfloat16_supported  # noqa: F401 - first, before trl
from unsloth.chat_templates import train_on_responses_only

# isort: split
import torch
from datasets import Dataset
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=settings["model"],
    max_seq_length=settings["length"],
    dtype=torch.float32,
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    target_modules=settings["targets"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)
set_peft_model_state_dict(model, load_file(Path(settings["adapter"]) / "adapter_model.safetensors"))
texts = [{"text": row["prompt"] + row["completion"]} for row in settings["rows"]]
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(texts),
    args=SFTConfig(**settings["arguments"], dataset_text_field="text", max_length=settings["length"]),
)
trainer = train_on_responses_only(
    trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
)
trainer.train()
