"""Long-tail recognition via compositional knowledge transfer (Parisot et al., CVPR 2022), reproduced.

What people use on their own features, importable from here (loaded on first use, so that the command line
answers at once):

    from lt_core import ensemble_probabilities, group_accuracy, hybrid_classifiers, prototypes
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "CompositionalTransferClassifier": "estimator",
    "EXPECTED_FAILED_CHECKS": "estimator",
    "attention": "transfer",
    "continual_classifier": "transfer",
    "continual_classifiers": "transfer",
    "cosine_logits": "transfer",
    "ensemble_probabilities": "transfer",
    "group_accuracy": "metrics",
    "hybrid_classifier": "transfer",
    "hybrid_classifiers": "transfer",
    "knowledge_transfer": "transfer",
    "load_cache": "cache",
    "predict": "classifiers",
    "prototypes": "transfer",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lt_core.{_PUBLIC[name]}"), name)
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("lt_core")
        except metadata.PackageNotFoundError:
            return "of this checkout, not installed"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names first of all: what completion offers."""
    return [*__all__, "__version__"]
