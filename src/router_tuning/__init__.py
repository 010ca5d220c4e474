"""Dynamic depth for frozen Hugging Face models: tiny routers decide, per token or per sequence, what runs."""

from router_tuning.attach import attach, detach, routing_of, set_budget
from router_tuning.config import RoutingConfig
from router_tuning.errors import RouterTuningError
from router_tuning.execution.context import decided_by, dense, execute, record, replay

__version__ = "0.1.0"

__all__ = [
    "RouterTuningError",
    "RoutingConfig",
    "attach",
    "decided_by",
    "dense",
    "detach",
    "execute",
    "record",
    "replay",
    "routing_of",
    "set_budget",
]
