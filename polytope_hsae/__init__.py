"""Hierarchical sparse autoencoders with teachers from the geometry of language models.

The public names are loaded when they are first used, so that `hsae -h` does not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import BatchTopKConfig as BatchTopKConfig
    from .config import Config as Config
    from .config import HSAEConfig as HSAEConfig
    from .config import JumpReLUConfig as JumpReLUConfig
    from .config import MatryoshkaConfig as MatryoshkaConfig
    from .config import TopKConfig as TopKConfig
    from .config import load_config as load_config
    from .geometry.causal import CausalGeometry as CausalGeometry
    from .geometry.causal import Space as Space
    from .geometry.estimators import ConceptEstimator as ConceptEstimator
    from .geometry.evidence import collect_evidence as collect_evidence
    from .geometry.evidence import test_hierarchical_orthogonality as test_hierarchical_orthogonality
    from .lm import LanguageModel as LanguageModel
    from .models.base import SparseAutoencoder as SparseAutoencoder
    from .models.batchtopk import BatchTopKSAE as BatchTopKSAE
    from .models.codes import Codes as Codes
    from .models.flat import TopKSAE as TopKSAE
    from .models.hsae import HierarchicalSAE as HierarchicalSAE
    from .models.hsae import freeze_decoder_weights as freeze_decoder_weights
    from .models.hsae import unfreeze_decoder_weights as unfreeze_decoder_weights
    from .models.init import ChildInit as ChildInit
    from .models.jumprelu import JumpReLUSAE as JumpReLUSAE
    from .models.matryoshka import MatryoshkaSAE as MatryoshkaSAE
    from .teacher import Teacher as Teacher
    from .teacher import extract_teacher as extract_teacher
    from .training.train import train as train
    from .training.trainer import HSAETrainer as HSAETrainer

__version__ = "0.2.0"

_HOME = {
    "Config": "config",
    "HSAEConfig": "config",
    "BatchTopKConfig": "config",
    "JumpReLUConfig": "config",
    "MatryoshkaConfig": "config",
    "TopKConfig": "config",
    "load_config": "config",
    "CausalGeometry": "geometry.causal",
    "Space": "geometry.causal",
    "ConceptEstimator": "geometry.estimators",
    "collect_evidence": "geometry.evidence",
    "test_hierarchical_orthogonality": "geometry.evidence",
    "LanguageModel": "lm",
    "SparseAutoencoder": "models.base",
    "Codes": "models.codes",
    "BatchTopKSAE": "models.batchtopk",
    "JumpReLUSAE": "models.jumprelu",
    "MatryoshkaSAE": "models.matryoshka",
    "TopKSAE": "models.flat",
    "ChildInit": "models.init",
    "HierarchicalSAE": "models.hsae",
    "freeze_decoder_weights": "models.hsae",
    "unfreeze_decoder_weights": "models.hsae",
    "Teacher": "teacher",
    "extract_teacher": "teacher",
    "HSAETrainer": "training.trainer",
    "train": "training.train",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
