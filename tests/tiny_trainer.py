"""A small deterministic training job: a CPU model and AdamW, whose every step depends on the step number alone.

So the hash of the state after step N is the same whether N was reached at once or across restarts. Events (JSON lines
in $TRAINER_EVENTS): ``ready`` (restored step or None, its source and hash), ``step`` (hash, seconds, why the snapshot
was skipped), ``failed`` (error class and message), ``holding``, ``done`` (newest staged and durable step known here).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ckptd.errors import CkptdError
from ckptd_client import Checkpointer


def emit(event: str, **fields: Any) -> None:
    fd = os.open(os.environ["TRAINER_EVENTS"], os.O_WRONLY | os.O_APPEND)
    os.write(fd, (json.dumps({"event": event, **fields}) + "\n").encode())
    os.close(fd)


def is_released(name: object) -> bool:
    return Path(os.environ["TRAINER_CONTROL"], f"go-{name}").exists()


def hold(name: object) -> None:
    """Wait until the test says to go on."""
    emit("holding", name=name)
    until = time.monotonic() + 60
    while not is_released(name):
        if time.monotonic() > until:
            raise TimeoutError(f"held at {name} for 60 s")
        time.sleep(0.005)


def state_hash(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit of parameters, buffers, optimizer state and the RNG."""
    digest = hashlib.sha256()
    tensors = [*model.state_dict().items()]
    for number, state in optimizer.state_dict()["state"].items():
        tensors += [(f"{number}.{key}", value) for key, value in sorted(state.items())]
    for name, tensor in sorted(tensors):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()[:16]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--persist-every", type=int)
    parser.add_argument("--width", type=int, default=16, help="features of the model; its state is about 48 w^2 bytes")
    parser.add_argument("--half", action="store_true", help="weights in bfloat16: more than one segment")
    parser.add_argument("--restore-step", type=int)
    parser.add_argument("--source")
    parser.add_argument("--no-restore", action="store_true")
    parser.add_argument("--wait", choices=("staged", "durable"), help="wait for it after each due step")
    parser.add_argument("--step-s", type=float, default=0.0, help="sleep in each step")
    parser.add_argument("--jitter-s", type=float, default=0.0, help="sleep up to so long in each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-at", type=int, action="append", default=[], help="wait after this step for go-STEP")
    parser.add_argument("--free", action="store_true", help="train until go-end, then until a step is --wait'ed for")
    parser.add_argument("--mutate", choices=("during", "versioned", "after"), help="change weights")
    parser.add_argument("--crash-after-restore", action="store_true")
    parser.add_argument("--ignore-close", action="store_true", help="exit without close()")
    return parser.parse_args()


def build(options: argparse.Namespace, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1000 + rank)
    random.seed(1000 + rank)
    width = options.width
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    if options.half:
        model[0] = model[0].to(torch.float64)
        model[1] = _Narrow()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


class _Narrow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).to(torch.float32)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, width: int) -> None:
    generator = torch.Generator().manual_seed(7 * step + rank)
    first = next(model.parameters())
    x = torch.randn(4, width, generator=generator).to(first.dtype)
    torch.rand(1)  # the global RNG moves too
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def newest(snapshots: list[Any], level: str) -> int:
    done = [s.step for s in snapshots if (f := getattr(s, level)).done() and f.exception() is None]
    return max(done, default=-1)


def main() -> int:
    options = parse()
    rank = int(os.environ.get("RANK", "0"))
    rng = random.Random(options.seed * 1000 + rank)
    model, optimizer = build(options, rank)
    started = time.monotonic()
    with Checkpointer(
        {"model": model, "optim": optimizer},
        run=options.run,
        every=options.every,
        persist_every=options.persist_every,
    ) as ckpt:
        restored = None
        if not options.no_restore:
            try:
                restored = ckpt.restore(options.restore_step, options.source)
            except CkptdError as error:
                emit("failed", error=type(error).__name__, message=str(error), hash=state_hash(model, optimizer))
                return 1
        emit(
            "ready",
            restored=restored.step if restored else None,
            source=restored.source if restored else None,
            hash=state_hash(model, optimizer),
            seconds=time.monotonic() - started,
        )
        if options.crash_after_restore:
            os._exit(9)
        snapshots: list[Any] = []
        first, last_tries = restored.step + 1 if restored else 1, 0
        for step in itertools.count(first) if options.free else range(first, options.steps + 1):
            is_ending = options.free and is_released("end")
            started = time.monotonic()
            time.sleep(options.step_s + options.jitter_s * rng.random())
            train_step(model, optimizer, step, rank, options.width)
            snapshot = ckpt.step(step)
            found = state_hash(model, optimizer)
            if snapshot is not None:
                snapshots.append(snapshot)
                if options.mutate == "versioned":
                    torch.nn.init.zeros_(next(model.parameters()))
                while options.mutate == "during" and not snapshot.staged.done():  # raises no version counter
                    for parameter in model.parameters():
                        parameter.data.add_(1.0)
                    time.sleep(0.001)
                if options.wait and (is_ending or not options.free):
                    outcome(snapshot, options.wait)
                if options.mutate == "after":
                    next(model.parameters()).data.add_(1.0)
            emit(
                "step",
                step=step,
                hash=found,
                seconds=time.monotonic() - started,
                skipped=snapshot.skipped if snapshot else None,
                error=problem(snapshot, options.wait) if snapshot else None,
                staged=newest(snapshots, "staged"),
            )
            if step in options.hold_at:
                hold(step)
            last_tries += is_ending
            if is_ending and (newest(snapshots, options.wait or "staged") == step or last_tries == 20):
                break
        if snapshots:
            outcome(snapshots[-1], "staged")
        if options.ignore_close:
            emit("done", staged=newest(snapshots, "staged"), durable=newest(snapshots, "durable"))
            sys.stderr.flush()
            os._exit(0)
    emit("done", staged=newest(snapshots, "staged"), durable=newest(snapshots, "durable"))
    return 0


def outcome(snapshot: Any, level: str) -> None:
    """Wait for ``level``; what became of it is read from the futures."""
    with contextlib.suppress(CkptdError):
        snapshot.wait(level, 30)


def problem(snapshot: Any, level: str | None) -> str | None:
    future = getattr(snapshot, level or "staged")
    error = future.exception() if future.done() else None
    return f"{type(error).__name__}: {error}" if error else None


if __name__ == "__main__":
    sys.exit(main())
