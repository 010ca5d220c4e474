"""Every verb, in process, on a tiny model: results, JSON, YAML, exit codes, and errors without
traceback.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import router_tuning
from router_tuning.cli import app, tuning
from router_tuning.cli.adapters import RECORD, WORK
from router_tuning.config import CALIBRATION_WINDOWS, GRANULARITIES, RoutingConfig
from router_tuning.data import Example, make_windows
from router_tuning.errors import TrainingError
from router_tuning.peft_config import RouterTuningConfig
from tiny import SENTENCES, VOCAB_SIZE, tiny_model, tiny_tokenizer

BUDGETS = (0.9, 0.8, 0.7)
FEW = ["--steps", "4", "--batch-size", "2", "--length", "32", "--held-out", "4", "--seed", "1"]
VERBS = (
    *("tune", "calibrate", "average", "eval", "analyse", "generate", "bench"),
    *("export", "import-official", "demo", "env"),
)
MEASURES = {"budget", "kept_fraction", "kept_of_routed", "loss", "answer_loss", "flops_fraction"}


class Result:
    """What a command left behind."""

    def __init__(self, arguments: list[str]) -> None:
        found = CliRunner().invoke(app, arguments)
        self.code, self.out, self.err = found.exit_code, found.stdout, found.stderr

    @property
    def said(self) -> str:
        """Its stderr in one line, without the frames and breaks that typer puts in."""
        return " ".join(self.err.replace("│", " ").split())


def run(*arguments: object) -> Result:
    """Run a command that shall succeed."""
    result = Result([str(a) for a in arguments])
    assert result.code == 0, result.err
    return result


def refused(code: int, *arguments: object) -> str:
    """Run a command that shall fail with a code and no traceback; returns what it said."""
    result = Result([str(a) for a in arguments])
    assert result.code == code, (result.code, result.out, result.err)
    assert "Traceback" not in result.err
    return result.said


pytestmark = pytest.mark.usefixtures("progress_bars")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, chat data and a text."""
    home = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    rows = [
        {"prompt": f"What is number {i}?", "response": SENTENCES[i % len(SENTENCES)] + f" ({i})"}
        for i in range(40)
    ]
    write_rows(home / "chat.jsonl", rows)
    (home / "plain.txt").write_text(" ".join(SENTENCES * 6))
    return home


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def adapter(home: Path) -> Path:
    """An adapter that `tune` made from chat data."""
    out = home / "adapter"
    budgets = ",".join(map(str, BUDGETS))
    run("tune", *data_options(home, out), "--budgets", budgets, "--json", home / "tuned.json")
    return out


def data_options(home: Path, out: Path) -> list[object]:
    return ["--model", home / "model", "--data", home / "chat.jsonl", "--out", out, *FEW]


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- The door ---


def test_version() -> None:
    assert run("--version").out == f"router-tuning {router_tuning.__version__}\n"


def test_help_names_the_verbs() -> None:
    said = run("--help").out
    assert all(verb in said for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_common_options(verb: str) -> None:
    said = run(verb, "--help").out
    assert all(option in said for option in ("--json", "--config", "--debug"))
    assert ("--seed" in said) == (verb not in ("average", "export", "import-official", "env"))


def test_help_needs_no_torch() -> None:
    """The files of the command line import it in the verbs only. (The package itself is stood in
    for.)
    """
    source = str(Path(router_tuning.__file__).parent)
    code = f"""
import sys, types
package = types.ModuleType("router_tuning")
package.__path__, package.__version__ = [{source!r}], "0"
sys.modules["router_tuning"] = package
import router_tuning.cli
heavy = sorted({{"torch", "transformers", "peft", "matplotlib", "datasets"}} & sys.modules.keys())
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_runs() -> None:
    import router_tuning.__main__ as door
    from router_tuning.cli import main

    assert door.main is main


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_are_notes_and_libraries_do_not_talk_to_each_other(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from router_tuning import cli

    def warns() -> None:
        warnings.warn("too little text", stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)
        warnings.warn("older name", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warns)
    monkeypatch.setattr(sys, "argv", ["router-tuning", *(["--debug"] if debug else [])])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        # pytest's own way of showing them keeps them to itself
        monkeypatch.setattr(warnings, "showwarning", _show_plainly)
        cli.main()
    said = capsys.readouterr().err
    if debug:
        assert "FutureWarning: old name" in said
        assert "note:" not in said
    else:
        assert said == "note: too little text\n"


def _show_plainly(message: Warning | str, category: type[Warning], *args: object) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)


def test_wrong_usage_is_2() -> None:
    assert "No such command" in refused(2, "tuna")
    assert "--model" in refused(2, "tune", "--out", "x")
    assert "--nonsense" in refused(2, "env", "--nonsense")


# --- tune ---


def test_tune_leaves_an_adapter_and_its_record(home: Path, adapter: Path) -> None:
    names = {p.name for p in adapter.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        RECORD,
        WORK,
    }
    config = config_of(adapter)
    # With the one that was trained for, which is then that of calls that name none.
    assert [e["budget"] for e in config["calibration"]] == [0.7, 0.75, 0.8, 0.9]
    assert config["default_budget"] == 0.75
    record = read(adapter / RECORD)
    assert record == read(home / "tuned.json")
    assert [row["budget"] for row in record["budgets"]] == [0.9, 0.8, 0.75, 0.7]
    for row in record["budgets"]:
        assert row["kept_fraction"] == pytest.approx(row["budget"], abs=0.05)
        assert row["loss"] > 0
    assert record["train_windows"] == 8
    assert {"task_loss", "kept", "budget_loss"} <= record["log"][0].keys()
    assert any("eval_loss" in entry for entry in record["log"])


def test_json_says_who_ran_what(home: Path, adapter: Path) -> None:
    found = read(adapter / RECORD)["run"]
    assert found["command"].startswith("router-tuning tune --model ")
    assert found["seeds"] == [1]
    assert found["versions"].keys() == {"router-tuning", "torch", "transformers", "peft", "python"}
    assert found["device"] == "cpu"
    assert found["dtype"] == "float32"
    assert found["threads"] >= 1
    assert found["instructions"].split(",")[0].isupper()
    assert found["data"] == {"tuned": str(home / "chat.jsonl")}
    assert found["options"]["steps"] == 4


def test_tune_shows_a_table(home: Path, tmp_path: Path) -> None:
    said = run("tune", *data_options(home, tmp_path / "out"), "--budgets", "0.9").out
    assert "held-out loss" in said
    assert f"Adapter: {tmp_path / 'out'}" in said


def test_tune_without_data_samples_answers(home: Path, tmp_path: Path) -> None:
    options = ["--prompts", "12", "--answer-tokens", "8", "--budgets", "0.9"]
    run("tune", "--model", home / "model", "--out", tmp_path / "out", *FEW, *options)
    answers = (tmp_path / "out" / WORK / "answers.jsonl").read_text().splitlines()
    assert 6 <= len(answers) <= 12
    assert "shipped" in read(tmp_path / "out" / RECORD)["run"]["data"]["tuned"]


def test_tune_mixes_in_what_the_model_writes_itself(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    train = tuning.train

    def spy(model: Any, settings: Any, material: Any, *args: Any, **options: Any) -> Any:
        seen.append(material.train)
        return train(model, settings, material, *args, **options)

    monkeypatch.setattr(tuning, "train", spy)
    out = tmp_path / "out"
    run("tune", *data_options(home, out), "--budgets", "0.9", "--own-text", "0.5")
    rows = (out / WORK / "own_text.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    own = make_windows(tokenizer, [Example(text=text) for text in texts], length=32).ids
    (windows,) = seen
    assert len(windows) == 8
    assert windows.ids[1::2].tolist() == [own[i % len(own)].tolist() for i in range(4)]
    assert read(out / RECORD)["settings"]["own_text"] == 0.5


def test_all_of_the_text_may_be_the_models_own(home: Path, tmp_path: Path) -> None:
    run("tune", *data_options(home, tmp_path), "--budgets", "0.9", "--own-text", "1")
    assert read(tmp_path / RECORD)["train_windows"] == 8


def test_own_text_goes_with_data_that_is_shorter_than_a_window(home: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "The quick fox."}\n' * 12)
    options = ["--model", home / "model", "--data", few, "--out", tmp_path / "out", *FEW]
    run("tune", *options, "--length", "128", "--budgets", "0.9", "--own-text", "0.5")
    assert read(tmp_path / "out" / RECORD)["train_windows"] == 8


def test_tune_on_plain_text(home: Path, tmp_path: Path) -> None:
    options = ["--model", home / "model", "--data", home / "plain.txt", "--out", tmp_path / "out"]
    run("tune", *options, *FEW, "--budgets", "0.9", "--objective", "lm")
    record = read(tmp_path / "out" / RECORD)
    assert record["train_windows"] >= 8
    assert 1 <= record["held_out_windows"] <= 4


def test_options_reach_the_adapter(home: Path, tmp_path: Path) -> None:
    options = ["--kv-sink", "2", "--kv-window", "3", "--layers", "1-2", "--router", "bottleneck"]
    run("tune", *data_options(home, tmp_path), *options, "--router-hidden", "4")
    config = config_of(tmp_path)
    assert (config["kv_sink"], config["kv_window"]) == (2, 3)
    assert config["layers"] == [1, 2]
    assert (config["router"], config["router_hidden"]) == ("bottleneck", 4)


def test_tune_trains_lora_in_the_same_adapter(home: Path, tmp_path: Path) -> None:
    options = ["--lora-r", "2", "--lora-target", "q_proj,down_proj", "--lora-learning-rate", "0.01"]
    said = run("tune", *data_options(home, tmp_path), *options).out
    assert "132 router parameters, 1152 of LoRA" in " ".join(said.split())
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    assert config_of(tmp_path)["lora"] == lora
    record = read(tmp_path / RECORD)
    assert record["lora_parameters"] == 4 * 2 * (32 + 32 + 48 + 32)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    moved = [weight.abs().max() for name, weight in weights.items() if "lora_B" in name]
    assert len(moved) == 8
    assert min(moved) > 1e-3


def test_budgets_that_cannot_be_met_are_skipped(home: Path, tmp_path: Path) -> None:
    options = [*data_options(home, tmp_path), "--layers", "0,1", "--budgets", "0.9,0.6,0.5,0.4"]
    said = run("tune", *options)
    assert [e["budget"] for e in config_of(tmp_path)["calibration"]] == [0.6, 0.75, 0.9]
    assert read(tmp_path / RECORD)["not_calibrated"] == [0.5, 0.4]
    assert "0.500 of the executions run in any case; not calibrated: 0.5, 0.4" in said.said


def test_the_budget_that_was_trained_for_is_calibrated(home: Path, tmp_path: Path) -> None:
    options = [*data_options(home, tmp_path), "--budget", "0.4", "--budgets", "0.9,1"]
    run("tune", *options)
    assert [e["budget"] for e in config_of(tmp_path)["calibration"]] == [0.4, 0.9]
    assert config_of(tmp_path)["default_budget"] == 0.4
    run("generate", "--adapter", tmp_path, "--budget", "0.4", "--prompt", "Hello")


def test_a_default_budget_that_cannot_be_met_is_told_of(home: Path, tmp_path: Path) -> None:
    options = [*data_options(home, tmp_path), "--layers", "0,1", "--budget", "0.4"]
    said = run("tune", *options, "--budgets", "0.9").said
    assert "not calibrated: 0.4" in said
    assert "budget 0.4 is not calibrated, so the adapter has no default budget" in said
    assert config_of(tmp_path)["default_budget"] is None


def test_every_kind_of_unit_is_in_the_help_and_can_be_tuned(home: Path, tmp_path: Path) -> None:
    said = " ".join(run("tune", "--help").out.replace("│", " ").split())
    assert all(name in said for name in GRANULARITIES)
    options = [*data_options(home, tmp_path), "--granularity", "block_token"]
    run("tune", *options, "--budgets", "0.9")
    assert config_of(tmp_path)["granularity"] == "block_token"


def test_sequence_prefixes_run_in_any_case(home: Path, tmp_path: Path) -> None:
    options = ["--granularity", "attn_sequence", "--decide-after", "16", "--budgets", "0.9,0.4"]
    run("tune", *data_options(home, tmp_path), *options)
    assert read(tmp_path / RECORD)["not_calibrated"] == [0.4]  # half of 32 tokens always run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0"], "a budget is the fraction"),
        (["--budget", "1.2"], "a budget is the fraction"),
        (["--budget", "nan"], "a budget is the fraction"),
        (["--budgets", "0.9,x"], "--budgets wants numbers"),
        (["--budgets", ","], "--budgets is empty"),
        (["--budgets", "0.9,1.5"], "a budget is the fraction"),
        (["--granularity", "attn"], "granularity must be one of"),
        (["--kv", "some"], "kv must be one of"),
        (["--kv", "all", "--kv-sink", "4"], "kv_sink and kv_window go with"),
        (["--layers", "a-b"], "--layers wants indices"),
        (["--layers", "99"], "99"),
        (["--objective", "x"], "objective must be one of"),
        (["--answers-only"], "--answers-only goes with --objective lm"),
        (["--device", "tpu"], "--device must be one of"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--steps", "0"], "--steps"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--lora-r", "0"], "--lora-r"),
        (["--lora-alpha", "4"], "--lora-alpha is of LoRA, which --lora-r asks for"),
        (["--lora-r", "2", "--lora-target", "qkv"], "'qkv' names no linear layer"),
    ],
)
def test_bad_options_of_tune(home: Path, tmp_path: Path, options: list[str], words: str) -> None:
    assert words in refused(2, "tune", *data_options(home, tmp_path / "out"), *options)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_unknown_model(tmp_path: Path) -> None:
    said = refused(1, "tune", "--model", tmp_path / "nothing", "--out", tmp_path / "out")
    assert "nothing" in said


def test_malformed_data_names_its_line(home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    options = ["--model", home / "model", "--data", bad, "--out", tmp_path / "out"]
    assert "bad.jsonl, line 2" in refused(2, "tune", *options)
    bad.write_text("")
    assert "is empty" in refused(2, "tune", *options)


def test_a_command_that_was_mistyped_may_be_corrected(
    home: Path, tmp_path: Path, stop_at: Callable[[int | None], None]
) -> None:
    out = tmp_path / "out"
    start = ["tune", "--out", out, *FEW, "--budgets", "0.9"]
    chat = ["--data", home / "chat.jsonl"]
    assert "no such file" in refused(2, *start, "--model", home / "model", "--data", "chta.jsonl")
    assert "nothing" in refused(1, *start, "--model", tmp_path / "nothing", *chat)
    stop_at(2)
    refused(130, *start, "--model", home / "model", *chat)  # now there is something to lose
    assert "an interrupted tuning" in refused(2, *start, "--model", home / "model", *chat)


def test_a_finished_record_alone_is_not_overwritten(
    home: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / RECORD).write_text((adapter / RECORD).read_text())
    assert "a finished tuning" in refused(2, "tune", *data_options(home, tmp_path))


def test_a_model_of_unknown_family_is_named(home: Path, tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    start = ["tune", "--data", home / "chat.jsonl", *FEW, "--model"]
    said = refused(1, *start, tmp_path / "mamba", "--out", tmp_path / "out")
    assert "no unit table for model_type 'mamba'" in said
    assert "Add a row to FAMILIES" in said
    (tmp_path / "nonesuch").mkdir()
    (tmp_path / "nonesuch" / "config.json").write_text('{"model_type": "nonesuch"}')
    said = refused(1, *start, tmp_path / "nonesuch", "--out", tmp_path / "out")
    assert "nonesuch" in said
    assert "Give a folder with config.json" in said


# --- the output folder ---


@pytest.mark.parametrize("verb", ["tune", "calibrate", "demo"])
def test_read_only_folder_is_found_before_the_work(
    home: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Root may write anywhere, so the file system's answer is made up."""

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("router_tuning.cli.options.tempfile.TemporaryFile", denied)
    monkeypatch.setattr("router_tuning.cli.adapters.load_base", lambda *a: pytest.fail("loaded"))
    options: dict[str, list[object]] = {
        "tune": ["tune", *data_options(home, tmp_path / "out")],
        "calibrate": ["calibrate", "--adapter", own],
        "demo": demo_options(home, tmp_path / "out"),
    }
    said = refused(2, *options[verb])
    assert "cannot write to the folder" in said
    assert "Permission denied; free space there, make it writable, or give another" in said


def test_folder_that_cannot_be_made_is_found_before_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "train", lambda *a, **k: pytest.fail("trained"))
    assert "cannot write" in refused(2, "tune", *data_options(home, tmp_path / "file" / "out"))
    assert "is a file" in refused(2, "tune", *data_options(home, tmp_path / "file"))


def test_full_disk_is_found_before_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("router_tuning.cli.options.tempfile.TemporaryFile", full)
    said = refused(2, "tune", *data_options(home, tmp_path / "out"))
    assert "No space left on device" in said


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Let the disk be full for files of a name; None makes room again."""
    replace = os.replace

    def arm(name: str | None) -> None:
        def full(source: Any, target: Any) -> None:
            if Path(target).name == name:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)

    return arm


def test_disk_that_fills_at_the_end_of_tune(
    home: Path, tmp_path: Path, adapter: Path, full_for: Callable[[str | None], None]
) -> None:
    options = [*data_options(home, tmp_path), "--budgets", "0.9,0.8,0.7"]
    full_for("adapter_model.safetensors")
    said = refused(1, "tune", *options)
    assert "cannot write the adapter" in said
    assert "No space left on device" in said
    assert {p.name for p in tmp_path.iterdir()} == {RECORD, WORK}
    full_for(None)
    run("tune", *options, "--resume")  # nothing of the training is lost
    ours, other = (p / "adapter_model.safetensors" for p in (tmp_path, adapter))
    assert ours.read_bytes() == other.read_bytes()


def test_disk_that_fills_with_sampled_answers(
    home: Path, tmp_path: Path, full_for: Callable[[str | None], None]
) -> None:
    options = ["--prompts", "12", "--answer-tokens", "8", "--budgets", "0.9"]
    start = ["tune", "--model", home / "model", "--out", tmp_path, *FEW, *options]
    full_for("answers.jsonl")
    said = refused(1, *start)
    assert "answers.jsonl: No space left on device; make room there" in said
    assert not list((tmp_path / WORK).iterdir())
    full_for(None)
    run(*start)


def test_disk_that_fills_while_a_calibration_is_saved(
    own: Path, full_for: Callable[[str | None], None]
) -> None:
    before = config_of(own)
    full_for("adapter_config.json")
    said = refused(1, "calibrate", "--adapter", own, "--budgets", "0.9")
    assert "cannot write the calibration" in said
    assert config_of(own) == before


def test_folder_of_others_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    said = refused(2, "tune", *data_options(home, tmp_path))
    assert "thesis.txt" in said
    assert "--overwrite" in said
    assert "holds no tuning" in refused(2, "tune", *data_options(home, tmp_path), "--resume")
    run("tune", *data_options(home, tmp_path), "--budgets", "0.9", "--overwrite")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_finished_tuning_is_not_lost_by_accident(home: Path, adapter: Path) -> None:
    before = (adapter / "adapter_model.safetensors").read_bytes()
    assert "a finished tuning" in refused(2, "tune", *data_options(home, adapter))
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


# --- Ctrl-C and resume ---


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Press Ctrl-C after a step of training; None takes it back."""
    shown = tuning._Show.on_step_end
    # A worker of pytest-xdist ignores the signal; a command line never does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def arm(step: int | None) -> None:
        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown(self, args, state, control, **kwargs)
            if state.global_step == step:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(tuning._Show, "on_step_end", on_step_end)

    yield arm
    signal.signal(signal.SIGINT, before)


def test_interrupted_tuning_resumes_to_the_same_adapter(
    home: Path, tmp_path: Path, adapter: Path, stop_at: Callable[[int | None], None]
) -> None:
    options = [*data_options(home, tmp_path), "--budgets", "0.9,0.8,0.7"]
    stop_at(2)
    said = refused(130, "tune", *options)
    assert "step 2 is saved" in said
    assert "continue with --resume" in said
    assert f"router-tuning tune --model {home / 'model'}" in said
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert "an interrupted tuning" in refused(2, "tune", *options)
    stop_at(None)
    run("tune", *options, "--resume")
    ours, uninterrupted = (p / "adapter_model.safetensors" for p in (tmp_path, adapter))
    assert ours.read_bytes() == uninterrupted.read_bytes()
    assert config_of(tmp_path)["calibration"] == config_of(adapter)["calibration"]


def test_interrupted_before_the_first_step(
    home: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*data_options(home, tmp_path), "--budgets", "0.9,0.8,0.7"]

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", stop)
        assert "no checkpoint was written yet" in refused(130, "tune", *options)
    run("tune", *options, "--resume")
    ours, uninterrupted = (p / "adapter_model.safetensors" for p in (tmp_path, adapter))
    assert ours.read_bytes() == uninterrupted.read_bytes()


def test_interrupted_while_calibrating(
    home: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*data_options(home, tmp_path), "--budgets", "0.9,0.8,0.7"]

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "calibrate_windows", stop)
        assert "step 4 is saved" in refused(130, "tune", *options)
    run("tune", *options, "--resume")
    assert config_of(tmp_path)["calibration"] == config_of(adapter)["calibration"]


def test_a_record_from_before_an_option_has_its_default(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*data_options(home, tmp_path), "--budgets", "0.9"]
    run("tune", *options)
    record = read(tmp_path / RECORD)
    del record["settings"]["own_text"]
    (tmp_path / RECORD).write_text(json.dumps(record))
    run("tune", *options, "--resume")
    assert "--own-text was 0.0 and is 0.5" in refused(
        2, "tune", *options, "--resume", "--own-text", "0.5"
    )


def test_resume_with_other_options_is_refused(
    home: Path, tmp_path: Path, stop_at: Callable[[int | None], None]
) -> None:
    stop_at(2)
    refused(130, "tune", *data_options(home, tmp_path))
    said = refused(2, "tune", *data_options(home, tmp_path), "--resume", "--kv", "all")
    assert "--kv was 'kept' and is 'all'" in said


def test_a_config_file_that_overwrites_can_be_resumed(
    home: Path,
    tmp_path: Path,
    adapter: Path,
    stop_at: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command that is printed after Ctrl-C keeps its --config."""
    file = tmp_path / "tune.yaml"
    file.write_text("overwrite: true\nbudgets: [0.9, 0.8, 0.7]\n")
    options = [*data_options(home, tmp_path / "out"), "--config", file]
    stop_at(2)
    assert f"--config {file} --resume" in refused(130, "tune", *options)
    stop_at(None)
    monkeypatch.setattr(tuning, "start_routers", lambda *a, **k: pytest.fail("begun anew"))
    run("tune", *options, "--resume")
    ours, other = (p / "adapter_model.safetensors" for p in (tmp_path / "out", adapter))
    assert ours.read_bytes() == other.read_bytes()
    file.write_text("overwrite: true\nresume: true\n")
    assert "give one of them" in refused(2, "tune", *options)
    assert "give one of them" in refused(2, "tune", *options, "--resume", "--overwrite")


def test_resume_of_nothing_starts_at_the_beginning(home: Path, tmp_path: Path) -> None:
    said = run("tune", *data_options(home, tmp_path / "new"), "--budgets", "0.9", "--resume")
    assert "no tuning in" in said.said
    assert (tmp_path / "new" / "adapter_config.json").exists()


def test_training_that_cannot_go_on_is_3(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise TrainingError("the loss became nan; train(resume_from_checkpoint=True) continues")

    monkeypatch.setattr(tuning.RouterTrainer, "train", fail)
    said = refused(3, "tune", *data_options(home, tmp_path))
    assert "the loss became nan; --resume continues" in said


# --- calibrate ---


@pytest.fixture
def own(home: Path, adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    import shutil

    return Path(shutil.copytree(adapter, tmp_path / "own"))


def test_calibrate_rewrites_the_config(home: Path, own: Path, tmp_path: Path) -> None:
    weights = (own / "adapter_model.safetensors").read_bytes()
    options = ["--data", home / "plain.txt", "--length", "32", "--limit", "4"]
    said = run("calibrate", "--adapter", own, "--budgets", "0.85,0.6", *options).out
    assert "0.85" in said
    config = config_of(own)
    assert [e["budget"] for e in config["calibration"]] == [0.6, 0.85]
    assert config["default_budget"] == 0.75
    assert (own / "adapter_model.safetensors").read_bytes() == weights
    assert "0.85" in (own / "README.md").read_text()


def test_calibrate_takes_what_tune_held_back(home: Path, own: Path, tmp_path: Path) -> None:
    before = config_of(own)["calibration"]
    file = tmp_path / "c.json"
    run("calibrate", "--adapter", own, "--budgets", "0.9,0.8,0.75,0.7", "--json", file)
    assert config_of(own)["calibration"] == before  # the same text, the same thresholds
    document = read(file)
    assert document["run"]["data"] == {"calibrated": f"held back of {home / 'chat.jsonl'}"}
    assert [row["budget"] for row in document["budgets"]] == [0.9, 0.8, 0.75, 0.7]


def test_every_calibration_takes_as_many_windows_by_default() -> None:
    for verb, option in (("tune", "--held-out"), ("calibrate", "--limit")):
        said = " ".join(run(verb, "--help").out.replace("│", " ").split())
        assert f"[default: {CALIBRATION_WINDOWS}]" in said.partition(option)[2]
    assert tuning.Settings(model="m").recipe().held_out == CALIBRATION_WINDOWS
    chosen = inspect.signature(router_tuning.calibrate).parameters["max_windows"]
    assert chosen.default == CALIBRATION_WINDOWS


def test_calibrate_away_from_the_default_budget(own: Path) -> None:
    said = run("calibrate", "--adapter", own, "--budgets", "0.95,0.9")
    assert "budget 0.75 is not calibrated, so the adapter has no default" in said.said
    assert config_of(own)["default_budget"] is None


def test_a_budget_of_1_needs_no_calibration(own: Path) -> None:
    said = refused(2, "calibrate", "--adapter", own, "--budgets", "1.0")
    assert "a budget of 1 keeps everything and needs no calibration" in said
    run("calibrate", "--adapter", own, "--budgets", "1,0.9")
    assert [e["budget"] for e in config_of(own)["calibration"]] == [0.9]


def test_calibrate_an_adapter_of_unknown_origin(own: Path) -> None:
    (own / RECORD).unlink()
    said = run("calibrate", "--adapter", own, "--budgets", "0.9", "--limit", "1")
    assert "fresh answers to shipped prompts" in said.said


def test_calibrate_what_is_no_adapter(tmp_path: Path, own: Path) -> None:
    assert "no adapter folder" in refused(1, "calibrate", "--adapter", tmp_path / "none")
    (own / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(1, "calibrate", "--adapter", own)


def test_truncated_weights(own: Path) -> None:
    weights = own / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cut short" in refused(1, "calibrate", "--adapter", own)


def test_adapter_of_a_newer_version(own: Path) -> None:
    config = config_of(own)
    (own / "adapter_config.json").write_text(json.dumps({**config, "format_version": 99}))
    assert "newer" in refused(1, "generate", "--adapter", own, "--prompt", "x")


def test_adapter_of_another_model(home: Path, own: Path, tmp_path: Path) -> None:
    tiny_model("llama", seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    said = refused(1, "calibrate", "--adapter", own, "--model", tmp_path / "other")
    assert "other numbers" in said
    tiny_model("qwen3").save_pretrained(tmp_path / "other")
    said = refused(1, "calibrate", "--adapter", own, "--model", tmp_path / "other")
    assert "qwen3" in said


# --- eval ---


def test_eval_writes_the_form_of_the_issue(home: Path, adapter: Path, tmp_path: Path) -> None:
    data, file = home / "plain.txt", tmp_path / "e.json"
    options = ["--length", "32", "--limit", "3", "--json", file]
    said = run("eval", "--adapter", adapter, "--data", data, "--budgets", "0.9,0.8", *options).out
    document = read(file)
    assert document.keys() == {"dense", "routed", "run"}
    assert document["dense"].keys() == {"loss", "answer_loss", "tokens"}
    assert document["dense"]["tokens"] == 3 * 31
    assert [row["budget"] for row in document["routed"]] == [0.9, 0.8]
    assert all(row.keys() == MEASURES for row in document["routed"])
    assert document["dense"]["answer_loss"] is None
    assert document["run"]["data"] == {"measured": str(data)}
    assert f"{document['dense']['loss']:.4f}" in said


@pytest.fixture(scope="module")
def task_data(home: Path) -> Path:
    """Local files of two tasks."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    folder = home / "tasks"
    folder.mkdir()
    rows = [
        {"query": f"Question: {i}?", "choices": [f"it is {i}", "it is not"], "gold": i % 2}
        for i in range(6)
    ]
    write_rows(folder / "piqa.jsonl", rows)
    write_rows(
        folder / "gsm8k.jsonl", [{"question": f"{i}?", "answer": f"It is {i}."} for i in range(4)]
    )
    return folder


def test_eval_measures_tasks_without_data(
    home: Path, adapter: Path, task_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "e.json"
    options = ["--tasks", "piqa,gsm8k,generation", "--task-data", task_data, "--limit", "3"]
    said = run("eval", "--adapter", adapter, *options, "--budgets", "0.9,0.8", "--json", file)
    document = read(file)
    assert document.keys() == {"tasks", "run"}
    assert document["run"]["data"] == {"tasks": str(task_data)}
    tasks = document["tasks"]
    assert {name: task["kind"] for name, task in tasks.items()} == {
        "piqa": "choice",
        "gsm8k": "loss",
        "generation": "generation",
    }
    for task in tasks.values():
        assert task["dense"]["rows"] == 3
        assert [row["budget"] for row in task["routed"]] == [0.9, 0.8]
    row = tasks["piqa"]["routed"][0]
    assert row["gold_difference"].keys() == {"mean", "low", "high"}
    assert f"{row['gold_difference']['mean']:+.4f} [" in said.out
    assert f"{tasks['gsm8k']['dense']['loss']:.4f}" in said.out
    assert "agreement" in said.out


def test_eval_measures_tasks_beside_losses_and_controls(
    home: Path, adapter: Path, task_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "e.json"
    options = ["--tasks", "piqa", "--task-data", task_data, "--limit", "2", "--budgets", "0.8"]
    more = ["--compare", "--static-steps", "0", "--masks", "2", "--length", "32", "--json", file]
    data = ["--data", home / "plain.txt"]
    run("eval", "--adapter", adapter, *data, *options, *more)
    document = read(file)
    controls = {"random", "static_cosine", "static_greedy"}
    assert controls | {"dense", "routed", "tasks", "run"} <= document.keys()
    piqa = document["tasks"]["piqa"]
    assert controls | {"dense", "routed", "kind", "metric", "shots"} == piqa.keys()
    assert piqa["random"][0]["seeds"] == [0, 1]
    kept = piqa["routed"][0]["kept_fraction"]
    assert piqa["static_greedy"][0]["kept_fraction"] == pytest.approx(kept)
    assert document["run"]["data"].keys() == {"measured", "selection", "tasks"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to measure"),
        (["--tasks", " , "], "--tasks is empty"),
        (["--data", "x", "--shots", "2"], "go with --tasks"),
        (["--data", "x", "--task-data", "y"], "go with --tasks"),
        (["--tasks", "piqa", "--compare", "--static-steps", "2"], "go with --data"),
    ],
)
def test_bad_options_of_tasks(adapter: Path, options: list[str], words: str) -> None:
    assert words in refused(2, "eval", "--adapter", adapter, *options)


def test_malformed_tasks_name_their_line(adapter: Path, task_data: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text('{"query": "a"}\n')
    options = ["--tasks", "piqa", "--task-data", tmp_path]
    assert "line 1: missing 'choices', 'gold'" in refused(2, "eval", "--adapter", adapter, *options)


def test_bench_measures_an_adapter(home: Path, adapter: Path, tmp_path: Path) -> None:
    file, figure = tmp_path / "b.json", tmp_path / "b.png"
    options = ["--prompt-tokens", "20,40", "--batch-size", "1,2", "--new-tokens", "2"]
    more = ["--repeats", "1", "--json", file, "--figure", figure, "--data", home / "plain.txt"]
    said = run("bench", "--adapter", adapter, "--budgets", "0.9,0.8", *options, *more).out
    document = read(file)
    assert len(document["cells"]) == 8
    assert {cell["budget"] for cell in document["cells"]} == {0.9, 0.8}
    assert document["adapter"]["granularity"] == "attn_token"
    assert document["run"]["data"] == {"text": str(home / "plain.txt")}
    assert document["run"]["threads"] >= 1
    assert figure.stat().st_size > 0
    assert "floor" in said
    assert "prefill" in said


def test_bench_draws_growth_and_leaves_large_cells_out(
    home: Path, adapter: Path, tmp_path: Path
) -> None:
    file, figure = tmp_path / "b.json", tmp_path / "b.png"
    options = ["--prompt-tokens", "20,40", "--batch-size", "1,2", "--new-tokens", "1"]
    more = ["--variants", "routed", "--most-tokens", "40", "--repeats", "1", "--json", file]
    text = ["--data", home / "plain.txt", "--growth", figure]
    run("bench", "--adapter", adapter, "--budgets", "0.9,1.0", *options, *more, *text)
    cells = read(file)["cells"]
    sizes = [(cell["batch_size"], cell["prompt_tokens"]) for cell in cells]
    assert sizes == [(1, 20), (1, 20), (1, 40), (1, 40), (2, 20), (2, 20)]
    assert set(cells[0]["prefill"]["seconds"]) == {"dense", "routed", "floor"}
    assert figure.stat().st_size > 0


def test_bench_takes_held_back_text_and_the_adapters_own_budget(
    adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "b.json"
    options = ["--prompt-tokens", "20", "--batch-size", "1", "--new-tokens", "0", "--repeats", "1"]
    run("bench", "--adapter", adapter, *options, "--json", file)
    (cell,) = read(file)["cells"]
    assert cell["budget"] is None
    assert cell["decode"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-tokens", "a"], "--prompt-tokens wants whole numbers"),
        (["--batch-size", "0"], "--batch-size wants numbers of at least 1"),
        (["--budgets", "0.2"], "0.2"),
        (["--variants", "slow"], "no variant 'slow'"),
        (["--most-tokens", "7"], "a benchmark wants prompts"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(adapter: Path, options: list[str], said: str) -> None:
    assert said in refused(2, "bench", "--adapter", adapter, *options)


CONTROLS = ("random", "random_uniform", "static_cosine", "static_greedy", "learned_static")


def test_eval_compares_with_every_control(home: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    options = ["--length", "32", "--limit", "3", "--budgets", "0.75", "--masks", "2"]
    data = ["--data", home / "plain.txt", "--adapter", adapter, "--compare", "--json", file]
    said = run("eval", *data, *options)
    document = read(file)
    for control in CONTROLS:
        (row,) = document[control]
        assert row.keys() >= MEASURES
        assert row["budget"] == 0.75
    # Of three routed layers of four, one is dropped, and the loss is that of a whole model.
    assert document["learned_static"][0]["kept_fraction"] == 0.75
    assert document["random"][0]["kept_fraction"] == pytest.approx(
        document["routed"][0]["kept_fraction"], abs=0.12
    )
    assert document["run"]["seeds"] == [0, 1]
    chat = home / "chat.jsonl"
    assert document["run"]["data"] == {
        "measured": str(home / "plain.txt"),
        "selection": f"held back of {chat}",
        "learned_static": f"{read(adapter / RECORD)['settings']['steps']} steps on {chat}",
    }
    assert "learned" in said.out


def test_eval_takes_a_learned_static_adapter(home: Path, adapter: Path, tmp_path: Path) -> None:
    static = tmp_path / "static"
    run("tune", *data_options(home, static), "--router", "bias", "--budgets", "0.9,0.7")
    file = tmp_path / "e.json"
    options = ["--length", "32", "--limit", "3", "--budgets", "0.8"]
    data = ["--data", home / "plain.txt", "--adapter", adapter, "--compare", "--json", file]
    run("eval", *data, *options, "--learned-static", static)
    document = read(file)
    assert document["learned_static"][0].keys() >= MEASURES
    assert document["run"]["data"]["learned_static"] == str(static)
    alone = ["--data", home / "plain.txt", "--adapter", static, "--json", file]
    run("eval", *alone, *options)
    assert document["learned_static"] == read(file)["routed"]
    assert "wanted an adapter tuned with --router bias" in refused(
        2, "eval", *data, *options, "--learned-static", adapter
    )
    changed = config_of(static)
    changed["base"]["fingerprint"] = "0" * 64
    (static / "adapter_config.json").write_text(json.dumps(changed))
    assert "wanted the same base model" in refused(
        2, "eval", *data, *options, "--learned-static", static
    )


def test_eval_chooses_on_what_a_tuning_on_plain_text_held_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_tuning.cli import controls, material

    out, plain = tmp_path / "out", home / "plain.txt"
    made: list[Any] = []

    def spy(recipe: Any, *args: Any, **options: Any) -> Any:
        made.append(prepare(recipe, *args, **options))
        return made[-1]

    prepare = material.prepare
    monkeypatch.setattr(material, "prepare", spy)
    monkeypatch.setattr(controls, "prepare", spy)
    run("tune", "--model", home / "model", "--data", plain, "--out", out, *FEW)
    options = ["--length", "32", "--limit", "2", "--budgets", "0.9", "--static-steps", "1"]
    run("eval", "--adapter", out, "--data", home / "chat.jsonl", "--compare", *options)
    tuned, chosen = made
    assert tuned.held_out.ids.tolist() == chosen.held_out.ids.tolist()


def test_eval_of_an_adapter_with_a_broken_record(home: Path, own: Path, tmp_path: Path) -> None:
    (own / RECORD).write_text("{")
    file = tmp_path / "e.json"
    options = ["--length", "32", "--limit", "2", "--budgets", "0.75", "--static-steps", "1"]
    data = ["--data", home / "plain.txt", "--adapter", own, "--compare", "--json", file]
    said = run("eval", *data, *options, "--selection-data", home / "chat.jsonl")
    assert "cannot be read" in said.said
    assert len(read(file)["learned_static"]) == 1


def test_eval_leaves_learned_static_out_when_told(
    home: Path, adapter: Path, tmp_path: Path
) -> None:
    file = tmp_path / "e.json"
    options = ["--length", "32", "--limit", "2", "--budgets", "0.9", "--json", file]
    data = ["--data", home / "plain.txt", "--adapter", adapter, "--compare"]
    run("eval", *data, *options, "--static-steps", "0", "--selection-data", home / "chat.jsonl")
    document = read(file)
    assert "learned_static" not in document
    assert document["run"]["data"]["selection"] == str(home / "chat.jsonl")


def test_learned_static_at_budget_1_is_dense_and_needs_no_tuning(
    home: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "train", lambda *a, **k: pytest.fail("trained"))
    file = tmp_path / "e.json"
    options = ["--length", "32", "--limit", "2", "--budgets", "1.0", "--json", file]
    run("eval", "--adapter", adapter, "--data", home / "plain.txt", "--compare", *options)
    document = read(file)
    (row,) = document["learned_static"]
    assert row.keys() == MEASURES
    assert (row["budget"], row["kept_fraction"]) == (1.0, 1.0)
    assert row["loss"] == document["dense"]["loss"] == document["static_greedy"][0]["loss"]
    assert "not tuned" in document["run"]["data"]["learned_static"]


def test_eval_on_text_of_training_says_so(home: Path, adapter: Path) -> None:
    options = ["--length", "32", "--limit", "2", "--budgets", "0.9"]
    said = run("eval", "--adapter", adapter, "--data", home / "chat.jsonl", *options).said
    assert "the adapter was tuned on" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budgets", "0.5"], "outside the calibrated range"),
        (["--budgets", "0"], "a budget is the fraction"),
        (["--budgets", "1.2"], "a budget is the fraction"),
        (["--budgets", "nan"], "a budget is the fraction"),
        (["--learned-static", "x"], "go with --compare"),
        (["--static-steps", "3"], "go with --compare"),
        (["--compare", "--learned-static", "x", "--static-steps", "3"], "name one"),
    ],
)
def test_bad_options_of_eval(home: Path, adapter: Path, options: list[str], words: str) -> None:
    data = ["--adapter", adapter, "--data", home / "plain.txt"]
    assert words in refused(2, "eval", *data, *options)


def test_eval_without_calibration(home: Path, own: Path) -> None:
    config = {**config_of(own), "calibration": [], "default_budget": None}
    (own / "adapter_config.json").write_text(json.dumps(config))
    said = refused(2, "eval", "--adapter", own, "--data", home / "plain.txt")
    assert "no budget is calibrated" in said


def test_eval_without_data(adapter: Path, tmp_path: Path) -> None:
    said = refused(2, "eval", "--adapter", adapter, "--data", tmp_path / "none.jsonl")
    assert "no such file" in said


# --- generate ---


def test_generate_ends_with_what_was_kept(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    options = ["--prompt", "What is the capital?", "--max-new-tokens", "12", "--json", file]
    said = run("generate", "--adapter", adapter, "--budget", "0.7", *options).out
    document = read(file)
    assert 0 < document["new_tokens"] <= 12
    assert document["kept_fraction"] < 0.95
    assert document["kv_bytes"] < document["dense_kv_bytes"]
    assert f"kept {document['kept_fraction']:.3f}" in said
    assert document["text"].split()[0] in said
    assert document["run"]["seeds"] == []


def test_generate_at_budget_1_keeps_everything(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.json"
    options = ["--prompt", "Hello", "--max-new-tokens", "4", "--raw", "--json", file]
    run("generate", "--adapter", adapter, "--budget", "1", *options)
    document = read(file)
    assert document["kept_fraction"] == 1.0
    assert document["kv_bytes"] == document["dense_kv_bytes"]


def test_generate_samples_by_seed(adapter: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (1, 1, 2):
        file = tmp_path / "g.json"
        options = ["--prompt", "Hello", "--max-new-tokens", "16", "--sample", "--seed", seed]
        run("generate", "--adapter", adapter, *options, "--json", file)
        texts.append(read(file)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_bad_options_of_generate(adapter: Path) -> None:
    start = ["generate", "--adapter", adapter]
    assert "the prompt is empty" in refused(2, *start, "--prompt", " ")
    assert "outside the calibrated" in refused(2, *start, "--prompt", "x", "--budget", "0.2")
    assert "a budget is the" in refused(2, *start, "--prompt", "x", "--budget", "0")
    sampled = [*start, "--prompt", "x", "--sample"]
    assert "--temperature" in refused(2, *sampled, "--temperature", "0")


# --- env ---


def test_env(tmp_path: Path) -> None:
    file = tmp_path / "env.json"
    said = run("env", "--json", file).out
    document = read(file)
    assert document["versions"]["router-tuning"] == router_tuning.__version__
    assert "smollm2-135m" in document["embedded models"]
    assert document["versions"]["torch"] in said


# --- --config, --json, --debug ---


def test_config_file_gives_options_and_the_command_line_wins(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text(
        f"model: {home / 'model'}\ndata: {home / 'chat.jsonl'}\nsteps: 2\nkv-window: 3\nkv_sink: "
        "2\n"
        "batch-size: 2\nlength: 32\nheld-out: 2\nbudgets: [0.9, 0.8]\nlayers: [0, 2]\nresume: "
        "null\n"
    )
    run("tune", "--config", file, "--out", tmp_path / "out", "--kv-sink", "1")
    config = config_of(tmp_path / "out")
    assert (config["kv_sink"], config["kv_window"]) == (1, 3)
    assert config["layers"] == [0, 2]
    assert [e["budget"] for e in config["calibration"]] == [0.75, 0.8, 0.9]
    assert read(tmp_path / "out" / RECORD)["settings"]["steps"] == 2


def test_config_file_sets_flags_by_either_name(adapter: Path, tmp_path: Path) -> None:
    for text, seeds in (("greedy: false", [0]), ("sample: true", [0]), ("sample: false", [])):
        (tmp_path / "g.yaml").write_text(f"{text}\nmax-new-tokens: 2\nprompt: Hello\n")
        options = ["--config", tmp_path / "g.yaml", "--json", tmp_path / "g.json"]
        run("generate", "--adapter", adapter, *options)
        assert read(tmp_path / "g.json")["run"]["seeds"] == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", "unknown option 'stepz'"),
        ("config: x.yaml", "unknown option 'config'"),
        ("- 1", "wanted option names with values"),
        ("a: [", "line 1: not valid YAML"),
        ("steps: many", "--steps"),
        ("steps: {a: 1}", "wants one value or a list"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    options = ["--model", "x", "--out", tmp_path / "out", "--config", tmp_path / "c.yaml"]
    assert words in refused(2, "tune", *options)
    assert not (tmp_path / "out").exists()


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read" in refused(2, "env", "--config", tmp_path / "none.yaml")


def test_json_that_cannot_be_written_is_found_first(home: Path, tmp_path: Path) -> None:
    options = [*data_options(home, tmp_path / "out"), "--json", tmp_path / "none" / "x.json"]
    assert "cannot write" in refused(2, "tune", *options)
    assert "is a folder" in refused(2, "env", "--json", tmp_path)
    assert not (tmp_path / "out").exists()


def test_interrupted_json_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_tuning.cli.records import write_json
    from router_tuning.errors import RouterTuningError

    file = tmp_path / "x.json"
    write_json(file, {"a": float("inf"), "b": (1, Path("p"))})
    assert read(file) == {"a": None, "b": [1, "p"]}

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("router_tuning.cli.records.os.replace", full)
    with pytest.raises(RouterTuningError, match="No space left"):
        write_json(file, {"a": 2})
    assert read(file)["a"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_debug_shows_where(adapter: Path) -> None:
    options = ["generate", "--adapter", str(adapter), "--prompt", "x", "--budget", "0.2"]
    result = Result([*options, "--debug"])
    assert result.code == 2
    assert "Traceback" in result.err
    assert "outside the calibrated range" in result.err


def test_unexpected_error_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("router_tuning.cli.env._found", broken)
    said = refused(1, "env")
    assert "unexpected ZeroDivisionError: by nothing" in said
    assert "--debug" in said


def test_ctrl_c_anywhere_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("router_tuning.cli.env._found", stop)
    assert "stopped by Ctrl-C" in refused(130, "env")


# --- demo ---


def demo_options(home: Path, out: Path) -> list[object]:
    small = ["--steps", 3, "--prompts", 24, "--answer-tokens", 8, "--length", 32]
    return ["demo", "--model", home / "model", "--out", out, *small, "--max-new-tokens", 4]


def test_demo_leaves_adapter_numbers_and_figure(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*demo_options(home, out), "--budgets", "0.75", "--budget", "0.5"]
    said = run(*options, "--json", tmp_path / "d.json")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    ours = {"demo.json", "demo.png", "tune.json", "checkpoints"}
    assert {p.name for p in out.iterdir()} == names | ours
    document = read(out / "demo.json")
    assert document == read(tmp_path / "d.json")
    for name in ("routed", "random", "static_cosine"):
        assert [row["budget"] for row in document[name]] == [0.75, 0.5]
        assert all(row.keys() >= MEASURES for row in document[name])
    for row in document["static_cosine"]:  # of four layers, one and two are dropped
        assert row["kept_fraction"] == row["budget"]
    dense, routed = document["answers"]
    assert dense["kept_fraction"] == 1.0
    assert routed["budget"] == 0.5
    assert str(out / "demo.png") in said.out
    config = RouterTuningConfig.from_pretrained(str(out))
    assert [e["budget"] for e in config.calibration] == [0.5, 0.75]
    assert (config.kv, config.kv_sink, config.kv_window) == ("kept", 4, 16)
    again = tmp_path / "c.json"  # no prompt that trained, and none that was measured
    said_again = run("calibrate", "--adapter", out, "--budgets", "0.75,0.5", "--json", again)
    assert "Sampling" not in said_again.said
    assert RouterTuningConfig.from_pretrained(str(out)).calibration == config.calibration
    run(*options)  # again, over its own folder
    (out / "tune.json").unlink()
    (out / "demo.json").unlink()
    run(*options)  # as after Ctrl-C
    (out / "demo.json").unlink()  # now it looks like a tuning of somebody's
    assert "--overwrite" in refused(2, *demo_options(home, out))
    assert (out / "checkpoints").is_dir()


def test_what_to_try_after_the_demo_works_as_printed(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "the demo's"
    said = run(*demo_options(home, out), "--budgets", "0.8", "--budget", "0.6").out
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("  router-tuning")]
    generate, tune, evaluate = ([str(part) for part in line[1:]] for line in lines)
    assert "kept" in run(*generate, "--max-new-tokens", "2").out
    more = ["--out", tmp_path / "more", "--data", home / "chat.jsonl", *FEW]
    run(*tune, *more)
    assert read(tmp_path / "more" / RECORD)["settings"]["model"] == str(home / "model")
    evaluate[evaluate.index("YOUR.jsonl")] = str(home / "plain.txt")
    run(*evaluate, "--length", "32", "--limit", "2", "--static-steps", "0")


def test_the_program_is_called_as_it_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_tuning.cli.records import program

    script = tmp_path / "a folder" / "router-tuning"
    script.parent.mkdir()
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == f"'{script}'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "router-tuning"
    monkeypatch.setattr(sys, "argv", ["/lib/router_tuning/__main__.py"])
    assert program() == f"{shlex.quote(sys.executable)} -m router_tuning"


def test_demo_needs_enough_text(home: Path, tmp_path: Path) -> None:
    options = [*demo_options(home, tmp_path), "--prompts", 10, "--length", 4096]
    assert "ask for more --prompts" in refused(2, *options)


# --- what is trained on is never measured on ---


def test_no_example_is_on_both_sides(home: Path) -> None:
    from router_tuning.cli.material import _split

    recipe = tuning.Settings(model="m", data=str(home / "chat.jsonl"), seed=3).recipe()
    held, rest = _split(recipe, None, None, None)
    assert (len(held), len(rest)) == (4, 36)
    assert not {e.messages[0]["content"] for e in held if e.messages} & {
        e.messages[0]["content"] for e in rest if e.messages
    }


def test_settings_follow_the_routing_defaults() -> None:
    """What `tune` leaves alone is what RoutingConfig says, but for the budget that is trained
    for.
    """
    routing, fresh = tuning.Settings(model="m").routing(), RoutingConfig()
    assert vars(routing) == {**vars(fresh), "budget": 0.75}
