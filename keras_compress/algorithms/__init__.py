"""The algorithms, one file each."""

from keras_compress.algorithms.base import Algorithm
from keras_compress.algorithms.binarization import Binarization
from keras_compress.algorithms.const_sparsity import ConstSparsity
from keras_compress.algorithms.filter_pruning import FilterPruning
from keras_compress.algorithms.knowledge_distillation import KnowledgeDistillation
from keras_compress.algorithms.magnitude_sparsity import MagnitudeSparsity
from keras_compress.algorithms.movement_sparsity import MovementSparsity
from keras_compress.algorithms.quantization import Quantization
from keras_compress.algorithms.rb_sparsity import RBSparsity

__all__ = [
    "Algorithm",
    "Binarization",
    "ConstSparsity",
    "FilterPruning",
    "KnowledgeDistillation",
    "MagnitudeSparsity",
    "MovementSparsity",
    "Quantization",
    "RBSparsity",
]
