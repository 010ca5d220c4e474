"""Time of others' code beside ours and the dense model: same weights, text and part of skipped
attentions, in one process, in turns.

Peers come from checkouts that the user names, and are glued to the model by peer_models. What a
peer does not do, the JSON says with the first line of what it raised. Example:

    python benchmarks/speed_peers.py --peer llm-drop=LLM-Drop --peer d-llm=D-LLM --threads 2 \\
        --json benchmarks/results/speed-peers-smollm2-135m.json

A peer that wants an older transformers runs under a Python that has it, beside the dense model of
that transformers: `--only dense,llm-drop`, and a folder as `--model`.

Shapes: B batch, T tokens, N tokens of the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_models import PEERS
from peer_models.checkout import OF_4
from peer_models.subject import Causal, Subject, Wanted, rope_theta, shared_copy
from places import ROOT, shown
from torch import Tensor

OURS = ("dense", 'ours, kv="all"', 'ours, kv="kept"', "ours, static", "ours, masked")
WHOLE = ", nothing skipped"
"""Behind the name of a peer's own code that skips nothing, where it can skip something."""
PACKAGES = ("router-tuning", "torch", "transformers", "fairscale", "einops", "triton")
TEXT = ROOT / "src/router_tuning/prompts.txt"


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what the arguments ask for; None takes those of the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        "model": shown(options.model),
        "rate": options.rate,
        "skips": {},
        "peers": {},
        "cells": [],
        "run": _run_record(options, given),
    }
    with torch.no_grad():
        base, ids_N = _base(options), _text(options)
        for batch, prompt in _cells(options):
            ids_BT = _rows(ids_N, batch, prompt + options.new_tokens).to(base.device)
            wanted = _wanted(options, base, ids_BT)
            subjects = {"dense": Subject(Causal(shared_copy(base)), "nothing", skips_work=False)}
            subjects |= _ours(base, wanted, options)
            for name, folder in options.peers.items():
                built, document["peers"][name] = _peer(name, folder, base, wanted, ids_BT)
                subjects |= built
            document["skips"] |= {name: subject.skips for name, subject in subjects.items()}
            cell = _cell(subjects, ids_BT, prompt, options.repeats)
            print(json.dumps(cell), flush=True)
            document["cells"].append(cell)
            _write(Path(options.json), document)


def _write(path: Path, document: dict[str, Any]) -> None:
    """All of it or nothing: a run that is broken off leaves the cells that it had."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n")
    partial.replace(path)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="alias, hub id or folder")
    add("--peer", action="append", default=[], metavar="NAME=FOLDER", help=", ".join(PEERS))
    add("--only", type=_names, help="leave all but these out, such as dense,llm-drop")
    add("--rate", type=float, default=0.75, help="part of the attentions that run")
    add("--prompt-tokens", type=_numbers, default=[512, 2048])
    add("--batch-size", type=_numbers, default=[1, 8])
    add("--most-tokens", type=int, help="leave out cells with longer prompts, all rows together")
    add("--new-tokens", type=int, default=16, help="to decode after each prompt; 0 for none")
    add("--repeats", type=int, default=5, help="after a round that does not count")
    add("--text", default=str(TEXT), help="a text file to run on")
    add("--seed", type=int, default=0, help="of random masks and fresh routers")
    add("--dtype", default="bfloat16")
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", required=True)
    options = parser.parse_args(given)
    options.peers = dict(peer.partition("=")[::2] for peer in options.peer)
    for name, folder in options.peers.items():
        if name not in PEERS or not Path(folder).is_dir():
            parser.error(f"--peer {name}={folder}: wanted a folder with one of {', '.join(PEERS)}")
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _run_record(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", "benchmarks/speed_peers.py", *map(shown, given)]),
        "seeds": [options.seed],
        "versions": versions,
        "device": _device_name(options.device),
        "dtype": options.dtype,
        "threads": options.threads,
        "repeats": options.repeats,
        "text": shown(options.text),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _device_name(device: str) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


# ---- the model and its text ----


def _base(options: argparse.Namespace) -> Any:
    """The model that all share the weights of."""
    if OF_4:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(options.model)
        config.rope_theta = rope_theta(config)  # which a folder of transformers 5 has elsewhere
        dtype = getattr(torch, options.dtype)
        load = AutoModelForCausalLM.from_pretrained
        model = load(options.model, config=config, torch_dtype=dtype).to(options.device)
    else:
        from router_tuning.embedded import load_model

        model = load_model(options.model, dtype=options.dtype, device=options.device)
    return model.eval().requires_grad_(False)


def _text(options: argparse.Namespace) -> Tensor:
    """The text's tokens (N,)."""
    text = Path(options.text).read_text()
    if OF_4:
        return torch.tensor(_old_tokenizer(Path(options.model)).encode(text).ids)
    from router_tuning.embedded import load_tokenizer

    return torch.tensor(load_tokenizer(options.model)(text, verbose=False)["input_ids"])


def _old_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder of transformers 5, whose pairs an older tokenizers wants in one
    string.
    """
    from tokenizers import Tokenizer

    said = json.loads((folder / "tokenizer.json").read_text())
    merges = said["model"]["merges"]
    said["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    return Tokenizer.from_str(json.dumps(said))


def _rows(ids_N: Tensor, batch: int, length: int) -> Tensor:
    """Rows of text (B, length), one behind the other, from the start again where it ends."""
    return ids_N[torch.arange(batch * length) % len(ids_N)].view(batch, length)


def _cells(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Rows and prompt tokens of each."""
    most = options.most_tokens or float("inf")
    pairs = [(b, p) for b in options.batch_size for p in options.prompt_tokens]
    return [(batch, prompt) for batch, prompt in pairs if batch * prompt <= most]


# ---- what is compared ----


def _wanted(options: argparse.Namespace, base: Any, ids_BT: Tensor) -> Wanted:
    """For one batch; what a static method drops is spread over the depth, as in `bench`."""
    layers = base.config.num_hidden_layers
    number = round((1 - options.rate) * layers)
    rows, tokens = ids_BT.shape
    return Wanted(
        options.rate,
        tuple(i * layers // number for i in range(number)),
        rows,
        tokens,
        options.seed,
    )


def _ours(base: Any, wanted: Wanted, options: argparse.Namespace) -> dict[str, Subject]:
    """Our variants, as far as they are asked for."""
    names = [name for name in OURS[1:] if options.only is None or name in options.only]
    if not names:
        return {}
    from router_tuning import RandomMask, RoutingConfig, StaticDrop, attach, execute, routing_of

    def routed(kv: str, cached: bool = True) -> Any:
        model = shared_copy(base)
        attach(model, RoutingConfig(granularity="attn_token", kv=kv))
        return Causal(model, cached=cached)

    def decided(run: Causal, skips: str, decider: Any, **more: Any) -> Subject:
        return _decided(run, Subject(run, skips, **more), decider)

    chance = RandomMask(wanted.rate, wanted.seed)
    all_keys, kept_keys = routed("all"), routed("kept")
    masked = routed("all", cached=False)
    dropped = [u.name for u in routing_of(kept_keys.model).units if u.layer_idx in wanted.dropped]
    every = {
        OURS[1]: decided(all_keys, "queries of attentions", chance),
        OURS[2]: decided(kept_keys, "attentions", chance),
        OURS[3]: decided(kept_keys, "attentions of whole layers", StaticDrop(dropped)),
        OURS[4]: decided(
            masked,
            "nothing: a mask multiplies",
            chance,
            skips_work=False,
            no_decode="no cache: for training",
            context=lambda: execute(masked.model, "masked"),
        ),
    }
    return {name: every[name] for name in names}


def _decided(run: Causal, subject: Subject, decider: Any) -> Subject:
    """A routed model, with what decides for it and what it kept."""
    from router_tuning import decided_by, record

    around, traces = subject.context, []

    @contextmanager
    def context() -> Iterator[None]:
        with around(), decided_by(run.model, decider):
            yield

    @contextmanager
    def counted() -> Iterator[None]:
        with record(run.model) as trace:
            traces.append(trace)
            yield

    def kept() -> float:
        last = traces[-1].forwards[-1:]
        return dataclasses.replace(traces[-1], forwards=last).kept_fraction()

    subject.context, subject.counted, subject.kept = context, counted, kept
    return subject


def _peer(
    name: str, folder: str, base: Any, wanted: Wanted, ids_BT: Tensor
) -> tuple[dict[str, Subject], dict[str, Any]]:
    """A peer by name, also as it is where it skips nothing, and what is said of it."""
    repository, build = PEERS[name]
    said: dict[str, Any] = {"repository": repository, "commit": _commit(folder)}
    try:
        whole, subject = (build(Path(folder), base, w) for w in (wanted.whole, wanted))
    except Exception as error:
        return {}, {**said, "failed": reason(error)}
    said |= {
        "ran_with": subject.ran_with,
        "nothing_skipped_over_dense": _distance(whole, base, ids_BT),
    }
    whole.skips = "nothing"
    more = {f"{name}{WHOLE}": whole} if subject.skips_work else {}
    return {name: subject, **more}, said


def _commit(folder: str) -> str | None:
    """The commit of a checkout; None where it is none."""
    command = ["git", "-C", folder, "log", "-1", "--format=%H", "--", "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _distance(whole: Subject, base: Any, ids_BT: Tensor) -> float | str:
    """How far a peer that skips nothing is from the dense model: the norm of the difference of the
    last logits over the norm of them. 0, or what the dtype rounds, says that it is the same model.
    """
    dense_BV = Causal(shared_copy(base)).logits(ids_BT)
    try:
        return float((whole.run.logits(ids_BT) - dense_BV).norm() / dense_BV.norm())
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    """The first line of what was raised, without folders of this machine."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', line)}".removesuffix(": ")


# ---- times ----


def _cell(
    subjects: Mapping[str, Subject], ids_BT: Tensor, prompt: int, repeats: int
) -> dict[str, Any]:
    """One batch of text: the times of all, and what stopped those that have none."""
    failed: dict[str, dict[str, str]] = {}
    kept = {name: _tried(name, s, ids_BT, prompt, failed) for name, s in subjects.items()}
    names = [name for name in subjects if "prefill" not in failed.get(name, {})]
    seconds: dict[str, list[tuple[Clocks, Clocks]]] = {name: [] for name in names}
    for number in range(repeats):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            decode = "decode" not in failed.get(name, {})
            seconds[name].append(_timed(subjects[name], ids_BT, prompt, decode))
    decoding = [n for n in names if "decode" not in failed.get(n, {})]
    new_tokens = ids_BT.shape[1] - prompt
    return {
        "batch_size": ids_BT.shape[0],
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "kept": kept,
        "prefill": _phase({name: [s[0] for s in seconds[name]] for name in names}),
        "decode": _phase({n: [s[1] for s in seconds[n]] for n in decoding}) if new_tokens else None,
        "failed": failed,
    }


def _tried(
    name: str, subject: Subject, ids_BT: Tensor, prompt: int, failed: dict[str, dict[str, str]]
) -> dict[str, float] | None:
    """The unmeasured round: what was kept, and what raised where."""
    kept: dict[str, list[float]] = {"prefill": [], "decode": []}
    ended = 0
    if subject.no_decode:
        failed[name] = {"decode": subject.no_decode}
    try:
        with subject.context(), subject.counted():
            for phase in _forwards(subject, ids_BT, prompt, not subject.no_decode):
                ended += 1
                if subject.kept is not None:
                    kept[phase].append(subject.kept())
    except Exception as error:
        if name in OURS:
            raise
        failed[name] = {**failed.get(name, {}), "decode" if ended else "prefill": reason(error)}
    return {of: statistics.fmean(parts) for of, parts in kept.items() if parts} or None


def _forwards(subject: Subject, ids_BT: Tensor, prompt: int, decode: bool) -> Iterator[str]:
    """A prompt, and the text's own next tokens, so that all do the same: what has just ended."""
    state = subject.run.prefill(ids_BT[:, :prompt])
    yield "prefill"
    for column in range(prompt, ids_BT.shape[1] if decode else prompt):
        state = subject.run.decode(ids_BT[:, column : column + 1], column, state)
        yield "decode"


def _timed(subject: Subject, ids_BT: Tensor, prompt: int, decode: bool) -> tuple[Clocks, Clocks]:
    """Of the prefill, and of one decoded token a row."""
    with subject.context():
        start = _now(ids_BT)
        forwards = _forwards(subject, ids_BT, prompt, decode)
        next(forwards)
        middle = _now(ids_BT)
        number = sum(1 for _ in forwards)
        end = _now(ids_BT)
    return middle.since(start), end.since(middle, max(number, 1))


class Clocks(NamedTuple):
    """Seconds on the wall, and of the process on all its CPUs."""

    wall: float
    cpu: float

    def since(self, start: Clocks, number: int = 1) -> Clocks:
        """The part of each of a number of steps."""
        return Clocks((self.wall - start.wall) / number, (self.cpu - start.cpu) / number)


def _now(ids_BT: Tensor) -> Clocks:
    if ids_BT.is_cuda:
        torch.cuda.synchronize(ids_BT.device)
    return Clocks(time.perf_counter(), time.process_time())


def _phase(seconds: Mapping[str, Sequence[Clocks]]) -> dict[str, Any]:
    """Medians and the distance of quartiles, and medians over dense's and over the same code's that
    skips nothing. What other processes take is on the wall only, so CPU time stands beside it.
    """
    wall = {name: _times([one.wall for one in took]) for name, took in seconds.items()}
    cpu = {name: _times([one.cpu for one in took]) for name, took in seconds.items()}
    middle = {name: one["median"] for name, one in wall.items()}
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "over_dense": {name: m / middle["dense"] for name, m in middle.items()},
        "cpu_over_dense": {n: one["median"] / cpu["dense"]["median"] for n, one in cpu.items()},
        "over_own": {
            name: m / middle[name + WHOLE] for name, m in middle.items() if name + WHOLE in middle
        },
    }


def _times(seconds: Sequence[float]) -> dict[str, float]:
    """What router_tuning.bench.Times has, which the transformers of a peer may not let in."""
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    low, high = torch.quantile(ordered, torch.tensor([0.25, 0.75], dtype=torch.float64))
    return {"median": statistics.median(seconds), "spread": float(high - low)}


if __name__ == "__main__":
    main()
