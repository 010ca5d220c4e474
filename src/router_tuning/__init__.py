"""Dynamic depth for frozen Hugging Face models: tiny routers decide, per token or sequence, what
runs.

Importing the package registers its adapters with PEFT. The trainers of TRL are imported when
they are asked for: they need the extra `trl`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from router_tuning.adapter_folder import load_adapter, save_adapter
from router_tuning.attach import attach, detach, routing_of, set_budget
from router_tuning.averaging import average_adapters
from router_tuning.baselines import RandomMask, StaticDrop
from router_tuning.calibration import calibrate, calibrate_windows
from router_tuning.config import RoutingConfig
from router_tuning.data import Example, WindowDataset, Windows, load_examples, make_windows
from router_tuning.embedded import load_model, load_tokenizer
from router_tuning.errors import (
    AdapterError,
    BaseModelMismatchError,
    BudgetError,
    ConfigError,
    DataError,
    RouterTuningError,
    TrainingError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from router_tuning.evaluation.perplexity import evaluate, window_loss
from router_tuning.execution.context import (
    always_skipping,
    decided_by,
    dense,
    execute,
    record,
    replay,
)
from router_tuning.peft_config import RouterTuningConfig
from router_tuning.peft_tuner import RouterTuningModel
from router_tuning.record import Trace
from router_tuning.training.trainer import (
    RouterTrainer,
    RouterTrainerMixin,
    RouterTrainingArguments,
)

if TYPE_CHECKING:
    from router_tuning.training.trl import RouterDPOConfig as RouterDPOConfig
    from router_tuning.training.trl import RouterDPOTrainer as RouterDPOTrainer
    from router_tuning.training.trl import RouterSFTConfig as RouterSFTConfig
    from router_tuning.training.trl import RouterSFTTrainer as RouterSFTTrainer

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "BaseModelMismatchError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "Example",
    "RandomMask",
    "RouterTrainer",
    "RouterTrainerMixin",
    "RouterTrainingArguments",
    "RouterTuningConfig",
    "RouterTuningError",
    "RouterTuningModel",
    "RoutingConfig",
    "StaticDrop",
    "Trace",
    "TrainingError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "WindowDataset",
    "Windows",
    "always_skipping",
    "attach",
    "average_adapters",
    "calibrate",
    "calibrate_windows",
    "decided_by",
    "dense",
    "detach",
    "evaluate",
    "execute",
    "load_adapter",
    "load_examples",
    "load_model",
    "load_tokenizer",
    "make_windows",
    "record",
    "replay",
    "routing_of",
    "save_adapter",
    "set_budget",
    "window_loss",
]

_OF_TRL = ("RouterDPOConfig", "RouterDPOTrainer", "RouterSFTConfig", "RouterSFTTrainer")
"""Public too. Not in __all__, so that importing every name works where trl is not installed."""


def __getattr__(name: str) -> Any:
    if name not in _OF_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("router_tuning.training.trl"), name)
