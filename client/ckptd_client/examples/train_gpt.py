"""A small GPT, sharded with FSDP2, that goes on where it was when it is killed. Copy from here.

    ckptd serve &
    torchrun --standalone --nproc-per-node 2 -m ckptd_client.examples.train_gpt my-gpt

Kill it with any signal at any time and start it again: model, optimizer, learning rate, data order and random numbers
go on bit for bit. What makes it so is marked (1) to (4). It learns Python from the standard library's own sources, byte
by byte, on CPUs, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ckptd_client import Checkpointer

log = logging.getLogger("train_gpt")


class Block(nn.Module):
    """Attention to what came before, then a feed-forward network; dropout after both."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Predicts the next byte of a text."""

    def __init__(self, length: int, width: int = 160, layers: int = 4, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Batches:
    """Random windows of a text, without end. (1) It has state_dict(), so the data goes on where it stopped."""

    def __init__(self, text: torch.Tensor, size: int, length: int, seed: int) -> None:
        self.text, self.size, self.length = text, size, length
        self.random = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self.text) - self.length, (self.size, 1), generator=self.random)
        windows = self.text[starts + torch.arange(self.length + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.set_state(state["random"])


def read_text(most_bytes: int) -> torch.Tensor:
    """The sources of Python's standard library, as bytes."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text[:most_bytes], dtype=torch.uint8)


def hash_weights(model: nn.Module) -> str:
    """The same for equal weights, whatever rank asks."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.to_local().contiguous().view(torch.uint8).numpy().tobytes())
    of_ranks: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(of_ranks, digest.hexdigest())
    return hashlib.sha256("".join(of_ranks).encode()).hexdigest()


def train(args: argparse.Namespace) -> None:
    rank, is_first = dist.get_rank(), dist.get_rank() == 0
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = GPT(args.length)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    batches = Batches(read_text(4 << 20), args.batch, args.length, args.seed * 1000 + rank)
    torch.manual_seed(args.seed * 1000 + rank)  # dropout differs between ranks; it is restored as well

    state = {"model": model, "optim": optimizer, "rate": rate, "batches": batches}
    with Checkpointer(state, run=args.run, every=args.every, protect=args.protect) as ckpt:  # (2) what the state is
        restored = ckpt.restore()  # (3) go on where the last start ended, if there was one
        if restored:
            log.info("step %d restored from %s in %.2f s", restored.step, restored.source, restored.seconds)
            note(args, "restored", rank=rank, step=restored.step, source=restored.source, seconds=restored.seconds)
        for step in range(restored.step + 1 if restored else 1, args.steps + 1):
            text, following = batches.next()
            loss = cross_entropy(model(text).flatten(0, 1), following.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            ckpt.step(step)  # (4) a snapshot when one is due; returns at once

            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            if is_first:
                note(args, "step", step=step, loss=float(mean).hex())
            if is_first and (step % args.show_every == 0 or step == args.steps):
                log.info("step %d loss %.4f (%.2f bits a byte)", step, mean.item(), mean.item() / math.log(2))
    weights = hash_weights(model)
    if is_first:
        note(args, "end", weights=weights)


def note(args: argparse.Namespace, event: str, **fields: Any) -> None:
    """Append one line of JSON to ``--journal``; numbers exact, so that two runs can be compared bit for bit."""
    if args.journal:
        with args.journal.open("a") as lines:
            lines.write(json.dumps({"event": event, **fields}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name of the run: the same at every start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="steps between snapshots")
    parser.add_argument("--protect", default="auto", help="parity on other nodes: k+m (any m may be lost), auto, off")
    parser.add_argument("--batch", type=int, default=4, help="windows of text per rank and step")
    parser.add_argument("--length", type=int, default=96, help="bytes in a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--journal", type=Path, help="file for one line of JSON per step")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # sums depend on how they are split
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
