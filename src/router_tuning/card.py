"""The model card (README.md) of an adapter: what is routed, what each budget keeps, how to load it.

Written from the config alone. Only the part between the two marks is ours: what people add to the
file around it survives the next save. Imports no torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from router_tuning.config import RoutingConfig

FILE_NAME = "README.md"
BEGIN = "<!-- router-tuning: begin; this part is written again on every save -->"
END = "<!-- router-tuning: end -->"
TAGS = ("router-tuning", "layer-skipping")

# PEFT makes a missing README.md out of this form; while both lines stand nobody has filled it in.
_UNFILLED = ("# Model Card for Model ID", "[More Information Needed]")
_COUNTED = {"executions": "executions of units", "flops": "FLOPs that skipping can save"}
_WHO_DECIDES = {
    "token": "each token decides for itself",
    "sequence": "a sequence decides once, after its first tokens",
}
_WHAT_IS_ROUTED = {"attn": "attention", "mlp": "MLP", "block": "whole decoder block"}


def write_card(folder: str | Path, config: RoutingConfig, base_model: str | None = None) -> Path:
    """Write or bring up to date the README.md of an adapter folder, atomically; returns its path.

    Args:
        folder: the adapter's folder; it must exist.
        config: the adapter's config.
        base_model: name of the base model; None takes it from the config.
    """
    path = Path(folder) / FILE_NAME
    name = base_model or base_name(config)
    card = ModelCard(_front(path))
    for key, value in _metadata(card, name).items():
        card.data[key] = value
    if name is None or _is_path(name):  # a path of this machine says nothing elsewhere
        card.data.pop("base_model", None)
    card.text = _around(card.text, card_text(config, name))
    _write(path, str(card))
    return path


def card_text(config: RoutingConfig, base_model: str | None) -> str:
    """The body of the card, between its marks."""
    parts = [
        BEGIN,
        f"# Routers for {_shown(base_model)}",
        f"This adapter adds small routers beside the {_unit_words(config)} of "
        f"{_shown(base_model)}. They decide what runs and what is skipped while the model runs; "
        f"what is skipped is not computed. {_lora_words(config)}"
        "The base model's weights are unchanged.",
        "## What is routed",
        _table(("setting", "value"), _settings(config)),
        "## Budgets",
        _budgets(config),
        *_per_unit(config),
        "## How to load it",
        _loading(config),
        "## License",
        f"The files here hold the routers{_and_lora(config)} and none of the base model's weights. "
        "The base model's own license applies to the base model and to what it is used for.",
        END,
    ]
    return "\n\n".join(parts)


def base_name(config: RoutingConfig) -> str | None:
    """The base model's name as an adapter records it; None where it has none."""
    name = (config.base or {}).get("name")
    return None if name is None else str(name)


def _front(path: Path) -> str:
    """What stands in the file already: front matter, and text unless it is an unfilled form."""
    empty = "---\n{}\n---\n"
    if not path.exists():
        return empty
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        text = empty + text
    if not all(line in text for line in _UNFILLED):
        return text
    return text[: text.index("\n---\n", 4) + len("\n---\n")]


def _metadata(card: ModelCard, name: str | None) -> dict[str, Any]:
    tags = [t for t in card.data.get("tags") or [] if not t.startswith("base_model:adapter:")]
    data: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if name is not None and not _is_path(name):
        tags.append(f"base_model:adapter:{name}")
        data["base_model"] = name
    data["tags"] = sorted({*tags, *TAGS})
    return data


def _around(text: str, ours: str) -> str:
    """Put our part where it was; in front of what others wrote if it is new."""
    before, begin, rest = text.partition(BEGIN)
    if begin:
        return before + ours + rest.partition(END)[2]
    return f"\n{ours}\n" + (f"\n{text.strip()}\n" if text.strip() else "")


def _settings(config: RoutingConfig) -> list[tuple[str, str]]:
    rows = [
        (
            "granularity",
            ", ".join(
                f"`{g}` ({_WHO_DECIDES[g.rpartition('_')[2]]})" for g in config.granularities
            ),
        ),
        ("layers", "all" if config.layers is None else ", ".join(map(str, config.layers))),
        ("keys and values of skipped tokens", _kv(config)),
        ("router", _router(config)),
        *_lora_rows(config),
        ("trained for a kept fraction of", f"{config.budget:g}, in {_COUNTED[config.budget_in]}"),
    ]
    if any(g.endswith("_sequence") for g in config.granularities):
        after = ("a sequence decides after", f"{config.decide_after} tokens, which always run")
        whole = ("a sequence decides by", "its whole prompt, for the prompt and the answer")
        future = ("a sequence decides by", "all of it, the answer too: for comparison alone")
        rows.insert(1, {"prompt": whole, "official": future}.get(config.pooling, after))
    return rows


def _lora(config: RoutingConfig) -> dict[str, Any] | None:
    """The options of LoRA in the same adapter; None without, as in a config of no adapter."""
    lora: dict[str, Any] | None = getattr(config, "lora", None)
    return lora


def _lora_words(config: RoutingConfig) -> str:
    if _lora(config) is None:
        return ""
    return (
        "It has LoRA in it too, in the same files, which was trained with the routers and is on "
        "whenever they are, at a budget of 1 too. "
    )


def _and_lora(config: RoutingConfig) -> str:
    return "" if _lora(config) is None else " and the LoRA,"


def _lora_rows(config: RoutingConfig) -> list[tuple[str, str]]:
    lora = _lora(config)
    if lora is None:
        return []
    names = lora.get("target_modules")
    shown = ", ".join(f"`{n}`" for n in ([names] if isinstance(names, str) else names or []))
    # Where the options are silent, PEFT's default of both is 8.
    size = f"rank {lora.get('r', 8)}, alpha {lora.get('lora_alpha', 8):g}"
    return [("LoRA", f"{size}, on {shown}" if shown else size)]


def _kv(config: RoutingConfig) -> str:
    if config.kv == "all":
        return '`kv="all"`: written for every token'
    visible = []
    if config.kv_sink:
        visible.append(f"those of the first {config.kv_sink} tokens")
    if config.kv_window:
        visible.append(f"those of the latest {config.kv_window} tokens")
    return '`kv="kept"`: not written' + (f", except {' and '.join(visible)}" if visible else "")


def _router(config: RoutingConfig) -> str:
    if config.router == "bottleneck":
        return f"`bottleneck`, {config.router_hidden} wide"
    return f"`{config.router}`"


def _budgets(config: RoutingConfig) -> str:
    if not config.calibration:
        return (
            "Not calibrated: the routers use their own threshold of 0. "
            "Run `router-tuning calibrate --adapter FOLDER` to get thresholds for budgets."
        )
    rows = [
        (
            f"{entry['budget']:g}",
            f"{entry['threshold']:.4f}",
            _number(entry.get("kept_fraction")),
            _number(entry.get("kept_of_routed")),
        )
        for entry in sorted(config.calibration, key=lambda e: -float(e["budget"]))
    ]
    default = (
        "A call that names no budget uses the routers' own threshold of 0."
        if config.default_budget is None
        else f"A call that names no budget uses {config.default_budget:g}."
    )
    return (
        "A budget is the fraction of unit executions to keep, over all layers of the model. "
        f"Measured on held-out text when the adapter was calibrated. {default}\n\n"
        + _table(("budget", "threshold", "kept fraction", "kept of the routed units"), rows)
    )


def _per_unit(config: RoutingConfig) -> list[str]:
    """The table of kept fractions per unit, one column a budget; nothing if none was measured."""
    entries = [e for e in config.calibration if e.get("kept_per_unit")]
    if not entries:
        return []
    entries.sort(key=lambda e: -float(e["budget"]))
    units: list[str] = list(entries[0]["kept_per_unit"])
    rows = [(unit, *(_number(e["kept_per_unit"].get(unit)) for e in entries)) for unit in units]
    header = ("unit", *(f"budget {e['budget']:g}" for e in entries))
    return ["### Kept fraction per layer", _table(header, rows)]


def _loading(config: RoutingConfig) -> str:
    budget = config.default_budget
    if budget is None and config.calibration:
        budget = min(float(e["budget"]) for e in config.calibration)
    load = 'model = router_tuning.load_adapter("FOLDER")  # checks the base model first'
    if budget is not None:
        load += f"\nrouter_tuning.set_budget(model, {budget:g})"
    return f"""```python
import router_tuning

{load}
```

Or with PEFT's own classes, which know this adapter once `router_tuning` is imported:

```python
import router_tuning  # registers the adapter type
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
```

`with model.disable_adapter():` gives the base model's own results."""


def _unit_words(config: RoutingConfig) -> str:
    return " and the ".join(_WHAT_IS_ROUTED[g.partition("_")[0]] for g in config.granularities)


def _shown(name: str | None) -> str:
    return "its base model" if name is None else f"`{Path(name).name if _is_path(name) else name}`"


def _is_path(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or os.path.isdir(name)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _write(path: Path, text: str) -> None:
    # Written beside, then renamed: nobody reads half a card, and an old one outlives a full disk.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
