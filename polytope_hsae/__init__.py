"""Hierarchical sparse autoencoders with teachers from the geometry of language models."""

from .config import Config, HSAEConfig, load_config
from .geometry.causal import CausalGeometry, Space
from .geometry.estimators import ConceptEstimator
from .geometry.evidence import collect_evidence, test_hierarchical_orthogonality
from .lm import LanguageModel
from .models.base import SparseAutoencoder
from .models.codes import Codes
from .models.flat import TopKConfig, TopKSAE
from .models.hsae import ChildInit, HierarchicalSAE, freeze_decoder_weights, unfreeze_decoder_weights
from .teacher import Teacher, extract_teacher
from .training.trainer import HSAETrainer

__version__ = "0.1.0"

__all__ = [
    "CausalGeometry",
    "ChildInit",
    "Codes",
    "ConceptEstimator",
    "Config",
    "HSAEConfig",
    "HSAETrainer",
    "HierarchicalSAE",
    "LanguageModel",
    "SparseAutoencoder",
    "Space",
    "Teacher",
    "TopKConfig",
    "TopKSAE",
    "collect_evidence",
    "extract_teacher",
    "freeze_decoder_weights",
    "load_config",
    "test_hierarchical_orthogonality",
    "unfreeze_decoder_weights",
]
