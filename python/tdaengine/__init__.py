"""LLaMA-family inference with threshold-based dynamic activation (TDA).

from tdaengine import TDA, Engine

engine = Engine("path/to/checkpoint", weights="int8")
print(engine.generate("The sky is", max_new_tokens=32, tda=TDA()))
"""

from ._native import (
    TDA,
    CalibrateOptions,
    CheckpointError,
    ContextOverflow,
    DeviceError,
    Error,
    GenerateOptions,
    GenerationStats,
    OptionError,
    Predictor,
    Session,
    Thresholds,
    measure_read_bandwidth,
)
from ._native import __version__ as __version__  # type: ignore[attr-defined]  # not in stubs
from .engine import Engine, TdaWarning
from .grammar import Grammar
from .prefix_cache import PrefixCache
from .stream import Output, Stream, TokenLogprobs

__all__ = [
    "TDA",
    "CalibrateOptions",
    "CheckpointError",
    "ContextOverflow",
    "DeviceError",
    "Engine",
    "Error",
    "GenerateOptions",
    "GenerationStats",
    "Grammar",
    "OptionError",
    "Output",
    "Predictor",
    "PrefixCache",
    "Session",
    "Stream",
    "TdaWarning",
    "Thresholds",
    "TokenLogprobs",
    "__version__",
    "measure_read_bandwidth",
]
