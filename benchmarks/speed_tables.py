"""Tables of time and memory: the demo's, `bench`'s, and a training step's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from places import RESULTS, link, read

PHASES = ("prefill", "decode")
CONTROLS = {
    "routed": "routed",
    "random": "random, same rate in each layer",
    "static_cosine": "static, cosine",
}


def demo(path: Path, root: str) -> str:
    """What `router-tuning demo` found, and what it took."""
    found = read(path)
    run, dense = found["run"], found["dense"]
    budgets = [row["budget"] for row in found["routed"]]
    lines = [
        f"**The demo** ({run['seconds'] / 60:.1f} minutes, {run['peak_rss_mb'] / 1000:.1f} GB, "
        f"{run['threads']} threads, {run['device']}; {dense['tokens']} tokens of held-out text, "
        f"dense loss {dense['loss']:.3f}; {link(path, root)}). Extra loss in nats a token, in "
        "brackets the kept fraction:",
        "",
        "| budget | " + " | ".join(f"{budget:.2f}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for key, name in CONTROLS.items():
        cells = [
            f"{row['loss'] - dense['loss']:+.3f} ({row['kept_fraction']:.3f})" for row in found[key]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(model: str, root: str) -> str:
    """Times over dense, and the share of the possible saving, of each adapter that was timed."""
    paths = sorted(RESULTS.glob(f"bench-{model}-*.json"))
    run = read(paths[0])["run"]
    lines = [
        f"**Speed of {model}** ({run['device']}, {run['dtype']}, {run['threads']} threads; medians "
        "of few repeats on a shared machine). Time over dense in the same run; in brackets the "
        "share of the possible saving that was realised, with a star where the saving is too small "
        "to tell:",
        "",
        "| adapter | rows x prompt + new | kept | prefill | decode | all kept | floor | masked | "
        "end to end | cache |",
        "|---|" + "---|" * 9,
    ]
    for path in paths:
        document = read(path)
        name = link(path, root, _adapter(document["adapter"])) + instructions(document["run"])
        lines += [f"| {name} | {_cells(cell)} |" for cell in document["cells"]]
    return "\n".join(lines)


def growth(path: Path, root: str) -> str:
    """Times over dense by prompt, rows and budget, as the figure beside it shows them."""
    document = read(path)
    run, cells = document["run"], document["cells"]
    budgets = sorted({cell["budget"] for cell in cells}, reverse=True)
    shapes = sorted({(cell["batch_size"], cell["prompt_tokens"]) for cell in cells})
    found = {(c["batch_size"], c["prompt_tokens"], c["budget"]): c for c in cells}
    lines = [
        f"**Growth of {document['model']}, {_adapter(document['adapter'])}** ({run['device']}, "
        f"{run['dtype']}, {run['threads']} threads{instructions(run)}; {link(path, root)}). Time "
        "over dense in the same run, of the prefill and of a decoded token; in brackets the part "
        "of the tokens that the routers kept:",
        "",
        f"![time over dense against the prompt's length]({root}docs/figures/{path.stem}.png)",
        "",
        "| rows x prompt | " + " | ".join(f"budget {budget:.2f}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for rows, prompt in shapes:
        row = [_grown(found[rows, prompt, budget]) for budget in budgets]
        lines.append(f"| {rows} x {prompt} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def paying(path: Path, root: str) -> str:
    """Where skipping pays under a key and value policy, and what is chosen."""
    document = read(path)
    run, found = document["run"], document["found"]
    shares = sorted({cell["kept"] for cell in found}, reverse=True)
    cells = {(cell.get("rows", 1), cell["tokens"], cell["kept"]): cell for cell in found}
    lines = [
        f"**Where skipping pays with {_policy(document)}, on {document['model']}** "
        f"({run['device']}, {run['dtype']}, {run['threads']} threads{instructions(run)}, "
        f"medians of {run['repeats']} repeats; {link(path, root)}). Time of a prefill over dense "
        "under random masks that keep so much: skipping always, and as chosen; "
        "in brackets the part of the attentions that then ran whole:",
        "",
        "| rows x tokens | " + " | ".join(f"{kept:g}" for kept in shares) + " |",
        "|---|" + "---|" * len(shares),
    ]
    for rows, tokens in sorted({shape[:2] for shape in cells}):
        row = []
        for kept in shares:
            cell = cells[rows, tokens, kept]
            over = cell["over_dense"]
            row.append(f"{over['skipping']:.2f}, {over['chosen']:.2f} ({cell['ran_whole']:.0%})")
        lines.append(f"| {rows} x {tokens} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def fewer_tokens(path: Path, root: str) -> str:
    """What half of the tokens save of a unit's own time."""
    document = read(path)
    run, found = document["run"], document["found"]
    lengths = sorted({one["tokens"] for one in found})
    lines = [
        f"**What half of the tokens can save, on {document['model']}** ({run['device']}, "
        f"{run['dtype']}, {run['threads']} threads{instructions(run)}, medians of "
        f"{run['repeats']} repeats; {link(path, root)}). The model's own units, called on half as "
        "many tokens: what that saves, over what their FLOPs would:",
        "",
        "| unit | " + " | ".join(f"of {tokens:,}" for tokens in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for unit in dict.fromkeys(one["unit"] for one in found):
        saved = {o["tokens"]: o["possible_saving"] for o in found if o["unit"] == unit}
        row = [f"{saved[tokens]:.2f}" for tokens in lengths]
        lines.append(f"| `{unit}` | {' | '.join(row)} |")
    return "\n".join(lines)


def _grown(cell: dict[str, Any]) -> str:
    over = ", ".join(f"{cell[phase]['over_dense']['routed']:.2f}" for phase in PHASES)
    return f"{over} ({cell['kept_of_routed']:.2f})"


def peers(path: Path, root: str) -> str:
    """Times over dense beside others' code, and what kept it from running."""
    document = read(path)
    run, cells = document["run"], document["cells"]
    shapes = [f"{c['batch_size']} x {c['prompt_tokens']} + {c['new_tokens']}" for c in cells]
    lines = [
        f"**Beside others' code, on {document['model']}** ({run['device']}, {run['dtype']}, "
        f"{run['threads']} threads, transformers {run['versions']['transformers']}, medians of "
        f"{run['repeats']} repeats, {document['rate']:.0%} of the attentions kept; "
        f"{link(path, root)}). Time over dense in the same run, of the prefill and of a decoded "
        "token; in brackets over the same code where it skips nothing:",
        "",
        "| what runs | what it leaves out | " + " | ".join(shapes) + " |",
        "|---|---|" + "---|" * len(cells),
    ]
    for name, skips in document["skips"].items():
        found = [", ".join(_over(cell[phase], name) for phase in PHASES) for cell in cells]
        lines.append(f"| {name} | {skips} | " + " | ".join(found) + " |")
    stopped = _stopped(document)
    return "\n".join(
        [*lines, "", "What did not run: " + "; ".join(stopped) + "."] if stopped else lines
    )


def training_step(path: Path, root: str) -> str:
    """What a training step costs beside full fine-tuning."""
    document = read(path)
    run = document["run"]
    lines = [
        f"**A training step of {run['model']}** (batch {run['batch_size']} x {run['length']}, "
        f"{run['device']}, {run['dtype']}, {run['threads']} threads{instructions(run)}; "
        f"{link(path, root)}), over full fine-tuning:",
        "",
        "| what trains | time | peak memory | tokens/s | trained numbers |",
        "|---|---|---|---|---|",
    ]
    for variant, one in document["variants"].items():
        over = document["over_full"][variant]
        lines.append(
            f"| {variant} | {over['time']:.2f} | {over['memory']:.2f} | "
            f"{one['tokens_per_second']:.0f} | {one['trainable']:,} |"
        )
    return "\n".join(lines)


def _over(phase: dict[str, Any] | None, name: str) -> str:
    """A time over dense's, in brackets over its own; a dash without one."""
    if phase is None or name not in phase["over_dense"]:
        return "-"
    own = phase["over_own"].get(name)
    return f"{phase['over_dense'][name]:.2f}" + ("" if own is None else f" ({own:.2f})")


def _stopped(document: dict[str, Any]) -> list[str]:
    """What each peer did not do, and why: each reason once."""
    found = {
        f"{name}: {said['failed']}": None
        for name, said in document["peers"].items()
        if "failed" in said
    }
    for cell in document["cells"]:
        for name, phases in cell["failed"].items():
            if name in document["peers"]:
                found |= {f"{name}, {phase}: {why}": None for phase, why in phases.items()}
    return [f"`{one}`" for one in found]


def _cells(cell: dict[str, Any]) -> str:
    prefill, decode = cell["prefill"]["over_dense"], (cell["decode"] or {}).get("over_dense", {})
    cache, whole = cell["kv_bytes_counted"], cell["end_to_end"]
    pairs = [
        f"{prefill[name]:.2f}, {decode[name]:.2f}" if name in decode else f"{prefill[name]:.2f}"
        for name in ("all_kept", "floor")
    ]
    cells = [
        f"{cell['batch_size']} x {cell['prompt_tokens']} + {cell['new_tokens']}",
        f"{cell['kept_of_routed']:.2f}",
        _saving(cell["prefill"]),
        _saving(cell["decode"]),
        *pairs,
        f"{prefill['masked']:.2f}" if "masked" in prefill else "-",
        f"{whole['routed'] / whole['dense']:.2f}" if whole else "-",
        f"{cache['routed'] / cache['dense']:.2f}",
    ]
    return " | ".join(cells)


def instructions(run: dict[str, Any]) -> str:
    """A CPU that is not like that of other results; older ones do not tell."""
    return f", {run['instructions']}" if run.get("instructions") else ""


def _adapter(adapter: dict[str, Any]) -> str:
    granularity = adapter["granularity"]
    names = granularity if isinstance(granularity, str) else ", ".join(granularity)
    if names.startswith("mlp"):
        return f"`{names}`"
    return f"`{names}`, {_policy(adapter)}"


def _policy(of: dict[str, Any]) -> str:
    """What is done with keys and values; only adapters and newer results name a window."""
    window = f", sink {of.get('kv_sink')}, window {of.get('kv_window')}"
    return f'`kv="{of.get("kv", "all")}"`' + (window if of.get("kv_window") else "")


def _saving(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "-"
    saved = phase["realised_saving"].get("routed")
    mark = "" if phase["conclusive"] else "*"
    return f"{phase['over_dense']['routed']:.2f}" + (
        "" if saved is None else f" ({saved:.2f}{mark})"
    )
