"""Two processes train as one does: DDP and FSDP2, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback
from typer.testing import CliRunner

from ranks import together
from router_tuning.cli import app
from router_tuning.errors import ConfigError, TrainingError
from router_tuning.training.budget import STATE_FILE
from router_tuning.training.processes import Layout, check_engine, check_launch, check_layout
from router_tuning.training.safety import last_complete_checkpoint
from router_tuning.training.trainer import RouterTrainer, RouterTrainingArguments
from router_tuning.units import decoder_layers, decoder_of
from test_trainer import (
    awake,
    batch_of,
    gradients,
    logged,
    routed,
    rows,
    saved_routers,
    trainable,
    trainer_of,
)
from tiny import SENTENCES, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not torch.distributed.is_gloo_available(),
    reason="needs gloo and a fork server",
)

RECIPES = Path(__file__).parents[1] / "recipes"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
ROWS = 8
"""Of a micro-batch, over all processes."""
CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "lm": {"objective": "lm", "gradient_accumulation_steps": 2},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Of float32 sums in another order, after some steps of Adam."""


def trainer_in(folder: Path, processes: int, **fields: Any) -> RouterTrainer:
    """Four steps of an awake model; the rows of a step do not depend on the processes."""
    each = ROWS // processes
    given = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, **fields}
    return trainer_of(
        awake(routed()),
        folder,
        rows(48, labels=True),
        rows(ROWS, seed=9, labels=True),
        per_device_train_batch_size=each,
        per_device_eval_batch_size=each,
        **given,
    )


def outcome(trainer: RouterTrainer) -> dict[str, Any]:
    return {
        "routers": trainable(trainer.routed),
        "log": logged(trainer, "loss", "task_loss", "budget_loss", "kept"),
        "held out": [x["eval_kept"] for x in trainer.state.log_history if "eval_kept" in x],
    }


def train(folder: Path, processes: int, resume: bool = False, **fields: Any) -> dict[str, Any]:
    trainer = trainer_in(folder, processes, **fields)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def train_in_two(folder: Path) -> dict[str, Any]:
    """What one of two processes finds: all that can be tried in one group."""
    found: dict[str, Any] = {
        name: train(folder / "two" / name, 2, **fields) for name, fields in CASES.items()
    }
    found["resumed"] = train(folder / "one, then two", 2, resume=True)
    found["Ctrl-C in one"] = stopped_by_one(folder / "stopped")
    found["nan in one"] = broken_in_one(folder / "broken")
    return found


class _Press(TrainerCallback):
    """Ctrl-C in the second process only, between two steps."""

    def __init__(self) -> None:
        self.trainer: RouterTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def stopped_by_one(folder: Path) -> str:
    # A shell starts background jobs, and so their processes, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trainer_in(folder, 2, max_steps=8, save_steps=8, callbacks=[_Press()]).train()
    except KeyboardInterrupt as error:
        return str(error)
    return "went on"


def broken_in_one(folder: Path) -> str:
    trainer = trainer_in(folder, 2, save_steps=8)
    whole = trainer.task_loss

    def broken(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        loss, outputs = whole(*args, **kwargs)
        bad = trainer.args.process_index == 1 and trainer.state.global_step == 1
        return loss * (float("nan") if bad else 1.0), outputs

    trainer.task_loss = broken  # type: ignore[method-assign]
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)
    return "went on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process finds."""
    return {name: train(folder / "one" / name, 1, **fields) for name, fields in CASES.items()}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    begun = folder / "one" / "one micro-batch" / "checkpoint-2"
    shutil.copytree(begun, folder / "one, then two" / "checkpoint-2")
    return together(train_in_two, folder)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["routers"].keys() == expected["routers"].keys()
    for name, parameter in expected["routers"].items():
        torch.testing.assert_close(found["routers"][name], parameter, **CLOSE)
    for values, wanted in zip(found["log"], expected["log"], strict=True):
        assert values == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert values[-1] == wanted[-1]  # the kept fraction is a count
    assert found["held out"] == expected["held out"]


# ---- DDP ----


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    case: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    fresh = trainable(awake(routed()))
    moved = [n for n, p in one[case]["routers"].items() if not torch.equal(p, fresh[n])]
    assert len(moved) == len(fresh)
    assert_same(two[0][case], one[case])
    for name, parameter in two[1][case]["routers"].items():
        assert torch.equal(parameter, two[0][case]["routers"][name])


def test_two_processes_write_one_checkpoint(two: list[dict[str, Any]], folder: Path) -> None:
    checkpoint = folder / "two" / "accumulated" / "checkpoint-4"
    alone = folder / "one" / "accumulated" / "checkpoint-4"
    random = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    names = {path.name for path in checkpoint.iterdir()}
    assert names - random == {path.name for path in alone.iterdir()} - random
    loaded = PeftModel.from_pretrained(tiny_model(), checkpoint, is_trainable=True)
    for name, parameter in trainable(loaded).items():
        assert torch.equal(parameter, two[0]["accumulated"]["routers"][name])


def test_one_process_resumes_what_two_began(
    one: dict[str, Any], two: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "two" / "accumulated" / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = train(tmp_path, 1, resume=True, **CASES["accumulated"])
    assert_same(resumed, one["accumulated"])


def test_two_processes_resume_what_one_began(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert_same(two[0]["resumed"], one["one micro-batch"])


def test_processes_stop_together(two: list[dict[str, Any]], folder: Path) -> None:
    for found in two:
        assert "step 2 is saved in" in found["Ctrl-C in one"]
    assert last_complete_checkpoint(str(folder / "stopped")) == folder / "stopped" / "checkpoint-2"


def test_a_broken_loss_in_one_process_stops_all(two: list[dict[str, Any]], folder: Path) -> None:
    for found in two:
        assert "the loss became nan" in found["nan in one"]
        assert "step 1 is saved in" in found["nan in one"]
    saved = saved_routers(folder / "broken" / "checkpoint-1")
    assert all(p.isfinite().all() for p in saved.values())


DEATHS = {0: ("_save_scaler", 4), 1: ("task_loss", 3)}
"""The first process dies while it writes the second checkpoint, or the second one in a step."""


def killed(folder: Path, rank: int) -> None:
    """Train until one process is killed."""
    trainer = trainer_in(folder, 2)
    method, step = DEATHS[rank]
    whole = getattr(trainer, method)

    def die(*args: Any, **kwargs: Any) -> Any:
        if trainer.args.process_index == rank and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(trainer, method, die)
    trainer.train()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_leaves_the_last_checkpoint(
    rank: int, one: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        together(killed, tmp_path, rank)
    assert (tmp_path / "checkpoint-4").exists() == (rank == 0)
    checkpoint = last_complete_checkpoint(str(tmp_path))
    assert checkpoint == tmp_path / "checkpoint-2"
    PeftModel.from_pretrained(tiny_model(), checkpoint)
    assert_same(train(tmp_path, 1, resume=True), one["one micro-batch"])


# ---- FSDP2 ----


def shard(model: nn.Module, how: str) -> None:
    """As accelerate does it: layers, then the head, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(decoder_of(model)):
        fully_shard(layer, reshard_after_forward=True)
    if how == "head apart":
        fully_shard(model.get_output_embeddings(), reshard_after_forward=False)  # type: ignore[operator]
    fully_shard(model)


def sharded_gradients(folder: Path) -> dict[str, Any]:
    """Gradients of one of two processes, whose layers are sharded with the routers in them."""
    rank = torch.distributed.get_rank()
    mine = {name: x.chunk(2)[rank] for name, x in batch_of(rows(ROWS)).items()}
    found: dict[str, Any] = {}
    for family, how in SHARDED:
        trainer = trainer_of(awake(routed(family, kv="kept")), folder, save_strategy="no")
        shard(trainer.routed, how)
        gradients(trainer, mine)  # the second pass finds what the first has sharded again
        parts = gradients(trainer, mine)
        whole = {name: part.full_tensor() for name, part in parts.items()}  # type: ignore[attr-defined]
        found[f"{family}, {how}"] = (whole, trainer._sums["kept"] / 2)
    return found


SHARDED = (
    ("llama", "layers"),
    ("llama", "head apart"),
    ("gemma3", "layers"),
)


needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)


@pytest.fixture(scope="module")
def sharded(folder: Path) -> list[dict[str, Any]]:
    return together(sharded_gradients, folder)


@needs_sharding
@pytest.mark.parametrize(("family", "how"), SHARDED)
def test_gradients_of_sharded_layers_are_those_of_one_process(
    family: str, how: str, sharded: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = trainer_of(awake(routed(family, kv="kept")), tmp_path, save_strategy="no")
    expected = gradients(trainer, batch_of(rows(ROWS)))
    for found, kept in (of_rank[f"{family}, {how}"] for of_rank in sharded):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        assert kept == trainer._sums["kept"]


def shard_by_recipe() -> None:
    """Let accelerate shard by recipes/accelerate/fsdp2.yaml. It does so on GPUs only: make it take
    these processes for some.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    recipe = yaml.safe_load((RECIPES / "accelerate" / "fsdp2.yaml").read_text())
    settings = {name.upper(): str(value) for name, value in recipe["fsdp_config"].items()}
    os.environ.update(settings, ACCELERATE_USE_FSDP="true")
    state: Any = PartialState
    state._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def train_sharded(folder: Path) -> list[dict[str, Any]]:
    """What one of two processes finds: at the end of a training, and resumed from its middle."""
    shard_by_recipe()
    found = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        trainer = trainer_in(folder, 2, **CASES["accumulated"])
        trainer.train(resume_from_checkpoint=checkpoint)
        result = outcome(trainer)
        result["routers"] = {n: p.full_tensor() for n, p in result["routers"].items()}
        found.append(result)
    return found


@needs_sharding
def test_sharded_processes_train_and_resume_as_one(one: dict[str, Any], tmp_path: Path) -> None:
    found = together(train_sharded, tmp_path)
    for whole, resumed in found:
        assert_same(whole, one["accumulated"])
        for name, parameter in one["accumulated"]["routers"].items():
            torch.testing.assert_close(resumed["routers"][name], parameter, **CLOSE)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4", is_trainable=True)
    for name, parameter in trainable(loaded).items():
        torch.testing.assert_close(parameter, one["accumulated"]["routers"][name], **CLOSE)


def test_fsdp_of_version_1_is_refused() -> None:
    check_engine(SimpleNamespace(distributed_type="FSDP", is_fsdp2=True))
    check_engine(SimpleNamespace(distributed_type="MULTI_CPU", is_fsdp2=False))
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_engine(SimpleNamespace(distributed_type="FSDP", is_fsdp2=False))


# ---- what does not go together ----


def written_by(folder: Path, checkpoint: Path, **layout: Any) -> Path:
    """A copy of a checkpoint, as processes of another layout would have left it."""
    copied = shutil.copytree(checkpoint, folder / checkpoint.name)
    state = json.loads((copied / STATE_FILE).read_text())
    state["layout"] |= layout
    (copied / STATE_FILE).write_text(json.dumps(state))
    return Path(copied)


def test_other_rows_a_step_are_refused(one: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    written_by(tmp_path, folder / "one" / "one micro-batch" / "checkpoint-2", processes=4)
    with pytest.raises(
        TrainingError, match=r"32 rows a step \(4 processes x 8 rows x 1.* 8 rows.*has 32 rows"
    ):
        train(tmp_path, 1, resume=True)
    assert train(tmp_path, 1, resume=True, gradient_accumulation_steps=4)["log"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"engine": "FSDP"}, "written with FSDP weights.*load_adapter"),
        ({"engine": "DEEPSPEED"}, "written with DEEPSPEED weights.*launch it as that one was"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused(
    layout: dict[str, Any], message: str, one: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    written_by(tmp_path, folder / "one" / "one micro-batch" / "checkpoint-2", **layout)
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, 1, resume=True)


def test_deepspeed_needs_as_many_processes(
    one: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    of_one = folder / "one" / "one micro-batch" / "checkpoint-2"
    checkpoint = written_by(tmp_path, of_one, engine="DEEPSPEED", processes=2, rows=4)
    check_layout(checkpoint, Layout("DEEPSPEED", 2, 4, 1))
    with pytest.raises(TrainingError, match=r"written by 2 processes.*now there are 4"):
        check_layout(checkpoint, Layout("DEEPSPEED", 4, 2, 1))


def test_a_checkpoint_without_a_layout_resumes(
    one: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    checkpoint = written_by(tmp_path, folder / "one" / "one micro-batch" / "checkpoint-2")
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["layout"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    assert_same(train(tmp_path, 1, resume=True), one["one micro-batch"])


def test_processes_that_do_not_see_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = RouterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(args)  # a scheduler's variable, not a launcher's
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"started 2 processes, but this one sees 1.*use_cpu"):
        RouterTrainer(routed(), args, train_dataset=rows())


def test_the_command_line_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["env"]).exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused = CliRunner().invoke(app, ["env"])
    assert refused.exit_code == 2
    assert "recipes/tune.py" in refused.stderr


def test_a_half_written_state_is_no_checkpoint(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (4, '{"epoch": 1.0,'), (6, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"


# ---- recipes ----


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_reads_the_recipe(engine: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = RECIPES / "accelerate" / f"{engine}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    head = path.read_text().splitlines()[0]
    assert head.startswith("# Tested" if engine in ("ddp", "fsdp2") else "# Untested")
    stages = yaml.safe_load(path.read_text()).get("deepspeed_config", {})
    assert stages.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(engine)
    if engine == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.slow
def test_the_script_trains_in_two_processes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": sentence}) for sentence in SENTENCES * 8]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(RECIPES / "accelerate" / "ddp.yaml"), str(RECIPES / "tune.py")]
    told = {
        "model": tmp_path / "model",
        "data": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "out",
        "length": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    options = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    source = {"PYTHONPATH": str(RECIPES.parent / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launch, *options], env=os.environ | source, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    state = json.loads((tmp_path / "out" / "checkpoint-2" / STATE_FILE).read_text())
    assert state["layout"]["processes"] == 2
    PeftModel.from_pretrained(tiny_model(), tmp_path / "out")


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_without_deepspeed_is_said(engine: str) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import is_deepspeed_available

    if is_deepspeed_available():
        pytest.skip("DeepSpeed is installed")
    config = str(RECIPES / "accelerate" / f"{engine}.yaml")
    args = launch_command_parser().parse_args(["--config_file", config, str(RECIPES / "tune.py")])
    with pytest.raises(ImportError, match="DeepSpeed is not installed => run `pip"):
        launch_command(args)
