"""Train a LoRA adapter with transformers and PEFT, as most adapters in the world are.

    .venv-peft/bin/python scripts/train_peft.py MODEL DATA OUT [--iters N] [--learning-rate X]

MODEL is a folder with transformers' names in 16 bits, DATA a folder with ``train.jsonl`` in the
chat format; only answers are learned. Runs where torch, transformers and peft are installed, in
float32 on the CPU.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

_IGNORED = -100


def batches(data: Path, tokenizer: Any, size: int, count: int, seed: int) -> Iterator[Any]:
    """Token ids and labels ``[batch, length]``, padded on the right."""
    items = [json.loads(line)["messages"] for line in (data / "train.jsonl").open()]
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    for number in range(count):
        chosen = [items[order[(number * size + k) % len(items)]] for k in range(size)]
        rows = [_encoded(tokenizer, messages) for messages in chosen]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(size, length, dtype=torch.long)
        labels = torch.full((size, length), _IGNORED)
        for place, (tokens, start) in enumerate(rows):
            ids[place, : len(tokens)] = torch.tensor(tokens)
            labels[place, start : len(tokens)] = ids[place, start : len(tokens)]
        yield ids, labels


def _encoded(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """A conversation's tokens, and where its answer begins."""
    texts = (
        tokenizer.apply_chat_template(messages, tokenize=False),
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
    )
    whole, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return whole, len(before)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=asked.rank, lora_alpha=asked.alpha, target_modules="all-linear"
    )
    adapted = get_peft_model(model, settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=0.0)
    every = batches(asked.data, tokenizer, asked.batch_size, asked.iters, asked.seed)
    for number, (ids, labels) in enumerate(every, start=1):
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 0 or number == 1:
            print(f"iteration {number}: loss {loss.item():.4f}", flush=True)
    adapted.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
