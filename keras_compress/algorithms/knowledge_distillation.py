"""Knowledge distillation: the float model as a teacher."""

from typing import ClassVar, Literal

from keras_compress.algorithms.base import Algorithm
from keras_compress.options import number, option


class KnowledgeDistillation(Algorithm):
    """Distillation of the original model into the compressed one."""

    name: ClassVar[str] = "knowledge_distillation"
    built: ClassVar[bool] = False

    type: Literal["softmax", "mse"] = option(..., "Loss between the two models' outputs.")
    scale: number(0) = option(1.0, "Factor on that loss.")
    temperature: number(0) = option(1.0, "Softness of the probabilities; softmax only.")
    compression_lr_multiplier: number(0) | None = option(
        None, "Accepted for the shared format; this algorithm trains no parameters of its own."
    )
