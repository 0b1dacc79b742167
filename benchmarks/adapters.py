"""What the penalties of continual LoRA cost, as a share of a training step of T5-large.

    python benchmarks/adapters.py [--batch 8] [--tokens 64] [--rounds 3]

T5-large with random weights (737 million, 144 adapted matrices of 1024 x 1024, rank 8) is trained on random tokens with
one earlier adapter in each matrix: forward, backward, AdamW. Steps and penalties (value and gradients) are timed in
turn; the median of the rounds counts. A larger batch makes the share smaller: penalties do not depend on it. The last
lines: what the published code does at each step instead, which looks for the pairs of old and new factors by name among
all parameters, for each adapted matrix anew; and the plain formula of N-LoRA, which holds every update in the graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig
from transformers import T5Config, T5ForConditionalGeneration

from perennial.lm import AdapterStack, L2Update, NLoRA, NuclearNorm, OLoRA


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = T5Config(d_model=1024, d_ff=4096, d_kv=64, num_heads=16, num_layers=24, decoder_start_token_id=0)
    stack = AdapterStack(T5ForConditionalGeneration(config), LoraConfig(r=8, lora_alpha=32, target_modules=["q", "v"]))
    stack.begin("first")
    model = stack.begin("second")
    pairs = stack.pairs()
    with torch.no_grad():
        for pair in pairs:
            pair.new.up.normal_(std=0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(2, config.vocab_size, (given.batch, given.tokens))
    labels = torch.randint(2, config.vocab_size, (given.batch, 8))

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def searched() -> int:
        count = 0
        for name, _ in model.named_parameters():
            if "lora_A.second" in name:
                wanted = name.replace("second", "first")
                count += sum(other == wanted for other, _ in model.named_parameters())
        return count

    def plain() -> None:
        sum((pair.new.scaling * pair.new.up @ pair.new.down).abs().sum() for pair in pairs).backward()  # type: ignore[union-attr]

    work: dict[str, Callable[[], object]] = {"step": step}
    for penalty in (NLoRA(1e-5), OLoRA(0.5), OLoRA(0.5, normalize=True), L2Update(1e-3), NuclearNorm(1e-3)):
        work[repr(penalty)] = lambda penalty=penalty: penalty(model).backward()  # type: ignore[misc]
    work["published search for the pairs alone"] = searched
    work["N-LoRA, plain formula in the graph"] = plain
    step()
    taken = {name: [] for name in work}
    for _ in range(given.rounds):
        for name, one in work.items():
            taken[name].append(seconds(one))
            if name != "step":
                optimizer.zero_grad()
    whole = statistics.median(taken["step"])
    print(f"{len(pairs)} pairs, {given.batch} x {given.tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'a step without penalty':<62} {1e3 * whole:9.0f} ms")
    for name, times in taken.items():
        if name != "step":
            print(f"{name:<62} {1e3 * statistics.median(times):9.1f} ms {100 * statistics.median(times) / whole:6.2f}%")


if __name__ == "__main__":
    main()
