"""Small random models of each family and small texts, for tests; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from perennial.lm import Example, TextTask, bundled_model

TARGETS = {"encoder": ["query", "value"], "seq2seq": ["q", "v"], "causal": ["q_proj", "v_proj"]}
"""What LoRA adapts, by family."""

_WORDS = {"colour": ("red", "green", "blue"), "size": ("large", "small"), "taste": ("sweet", "sour")}


def text_task(name: str = "colour", count: int = 24) -> TextTask:
    """A task that can be read off the text."""
    labels = _WORDS[name]
    examples = [Example(f"thing {i} is {labels[i % len(labels)]}", labels[i % len(labels)]) for i in range(count)]
    return TextTask(name, "SC", labels, tuple(examples), tuple(examples[:6]), tuple(examples[6:15]))


def write_tasks(folder: Path) -> None:
    """CL_Benchmark's layout under the names of three of its tasks."""
    for place, name in (("TC/agnews", "colour"), ("SC/yelp", "size"), ("WiC/WiC", "taste")):
        task = text_task(name, 40)
        here = folder / "CL_Benchmark" / place
        here.mkdir(parents=True)
        rows = [{"sentence": e.sentence, "label": e.label} for e in task.train]
        (here / "labels.json").write_text(json.dumps(task.labels))
        (here / "train.json").write_text(json.dumps(rows))
        (here / "test.json").write_text(json.dumps(rows[:12]))


def write_model(family: str, folder: Path) -> str:
    """A random model of a family with MiniLM's words; its folder."""
    tokenizer = AutoTokenizer.from_pretrained(str(bundled_model()))
    tokenizer.eos_token = tokenizer.sep_token
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any
        if family == "encoder":
            model = BertModel(
                BertConfig(**sizes, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
            )
        elif family == "seq2seq":
            model = T5ForConditionalGeneration(
                T5Config(**sizes, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    **sizes,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    bos_token_id=tokenizer.cls_token_id,
                )
            )
    place = folder / family
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)
