"""Every error that people see.

RouterTuningError
|-- ConfigError               an option is out of range or unknown              (also ValueError)
|-- UnsupportedModelError     the model has no such unit, or is of no known kind (also ValueError)
|-- UnsupportedCallError      a cache, mask or kernel that routing cannot serve  (also ValueError)
|-- BudgetError               a budget out of range, or not calibrated           (also ValueError)
|-- BaseModelMismatchError    the adapter belongs to another base model          (also ValueError)
|-- AdapterError              an adapter folder that cannot be read              (also ValueError)
|-- DataError                 a data file that cannot be read                    (also ValueError)
`-- TrainingError             training cannot go on                              (also RuntimeError)

Each message says what was wanted, what came, and what to do.
"""


class RouterTuningError(Exception):
    """The base of all errors raised on purpose by this package."""


class ConfigError(RouterTuningError, ValueError):
    """An option is out of range, unknown, or does not go with another."""


class UnsupportedModelError(RouterTuningError, ValueError):
    """The model's family, or one of its layers, cannot be routed."""


class UnsupportedCallError(RouterTuningError, ValueError):
    """A cache, mask, kernel or way to generate that routing cannot serve."""


class BudgetError(RouterTuningError, ValueError):
    """A budget is out of range, or was not calibrated."""


class BaseModelMismatchError(RouterTuningError, ValueError):
    """The adapter was trained on another base model."""


class AdapterError(RouterTuningError, ValueError):
    """The adapter folder is missing, corrupt, or of a newer format."""


class DataError(RouterTuningError, ValueError):
    """A data source is missing, empty or malformed."""


class TrainingError(RouterTuningError, RuntimeError):
    """Training cannot go on; what was reached is saved."""
