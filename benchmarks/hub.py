"""Backbones of keras-hub for the coverage page: small sizes, random weights from a fixed seed.

`NAMES` lists them; `make(name)` returns (built model, data for 8 samples) as `zoo.make` does.
"""

import keras
import numpy as np

from keras_compress.training.batch_norm import adapt_batch_norm

SAMPLES = 8
SIZE = 64
TOKENS = 16
VOCABULARY = 100
TRANSFORMER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_sequence_length": TOKENS,
}
VISION = {"image_shape": (SIZE, SIZE, 3), "num_layers": 2, "num_heads": 4, "hidden_dim": 64}


def image_encoder():
    """Return the residual network that detection and segmentation backbones build on."""
    return backbone("ResNet", **ARGUMENTS["ResNetBackbone"])


def mix_transformer():
    """Return the hierarchical transformer that SegFormer builds on."""
    return backbone("MiT", **ARGUMENTS["MiTBackbone"])


ARGUMENTS = {
    "ResNetBackbone": {
        "input_conv_filters": [32],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 64, 64, 64],
        "stackwise_num_blocks": [1, 1, 1, 1],
        "stackwise_num_strides": [1, 2, 2, 2],
        "block_type": "bottleneck_block",
        "image_shape": (SIZE, SIZE, 3),
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[40, 56], [64, 144]],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_filters": [[16, 16], [24, 24]],
        "stackwise_kernel_size": [[3, 3], [5, 5]],
        "stackwise_num_strides": [[2, 1], [2, 1]],
        "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
        "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
        "stackwise_padding": [[1, 1], [2, 2]],
        "output_num_filters": 128,
        "depthwise_filters": 16,
        "depthwise_stride": 1,
        "depthwise_residual": True,
        "last_layer_filter": 128,
        "squeeze_and_excite": 0.5,
        "image_shape": (SIZE, SIZE, 3),
    },
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 3, 5],
        "stackwise_num_repeats": [1, 2, 2],
        "stackwise_input_filters": [16, 16, 24],
        "stackwise_output_filters": [16, 24, 40],
        "stackwise_expansion_ratios": [1, 4, 4],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.0, 0.25],
        "stackwise_strides": [1, 2, 2],
        "stackwise_block_types": ["fused", "fused", "unfused"],
        "stackwise_width_coefficients": [1.0] * 3,
        "stackwise_depth_coefficients": [1.0] * 3,
        "num_features": 128,
        "input_shape": (SIZE, SIZE, 3),
    },
    "DenseNetBackbone": {
        "stackwise_num_repeats": [2, 2, 2],
        "growth_rate": 16,
        "image_shape": (SIZE, SIZE, 3),
    },
    "ViTBackbone": VISION | {"patch_size": 8, "mlp_dim": 128},
    "DeiTBackbone": VISION | {"patch_size": (8, 8), "intermediate_dim": 128},
    "MiTBackbone": {
        "layerwise_depths": [1, 1],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [4, 1],
        "max_drop_path_rate": 0.1,
        "layerwise_patch_sizes": [7, 3],
        "layerwise_strides": [4, 2],
        "hidden_dims": [32, 64],
        "image_shape": (SIZE, SIZE, 3),
    },
    "RetinaNetBackbone": {
        "image_encoder": image_encoder,
        "min_level": 3,
        "max_level": 6,
        "use_p5": False,
        "image_shape": (SIZE, SIZE, 3),
    },
    "DeepLabV3Backbone": {
        "image_encoder": image_encoder,
        "spatial_pyramid_pooling_key": "P4",
        "low_level_feature_key": "P2",
        "upsampling_size": 4,
        "dilation_rates": [1, 2, 3],
        "image_shape": (SIZE, SIZE, 3),
    },
    "SegFormerBackbone": {"image_encoder": mix_transformer, "projection_filters": 64},
    "BertBackbone": TRANSFORMER,
    "DistilBertBackbone": TRANSFORMER,
    "DebertaV3Backbone": TRANSFORMER | {"bucket_size": 8},
    "GPT2Backbone": TRANSFORMER,
    "LlamaBackbone": {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "hidden_dim": 64,
        "intermediate_dim": 128,
    },
    "BartBackbone": TRANSFORMER,
    "T5Backbone": {k: v for k, v in TRANSFORMER.items() if k != "max_sequence_length"},
}
NAMES = [*ARGUMENTS]


def make(name):
    """Return (built model, data): the weights depend on the name alone."""
    keras.utils.set_random_seed(0)
    model = backbone(name.removesuffix("Backbone"), **ARGUMENTS[name])
    random = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in weight.dtype and not np.ptp(keras.ops.convert_to_numpy(weight)):
            # Constant as initialized: class tokens, biases, gains of normalizations.
            noise = random.normal(0.0, 0.1, weight.shape)
            weight.assign(keras.ops.convert_to_numpy(weight) + np.abs(noise))
    inputs = keras.tree.map_structure(fixed_size, model.input)
    fixed = keras.Model(inputs, model(inputs), name=model.name)
    data = keras.tree.map_structure(lambda tensor: values(tensor, random), inputs)
    adapt_batch_norm(fixed, [keras.tree.flatten(data)])
    return fixed, data


def backbone(name, **arguments):
    """Return a keras-hub backbone; an encoder among its arguments is given by a function."""
    import keras_hub

    made = {key: value() if callable(value) else value for key, value in arguments.items()}
    return getattr(keras_hub.models, f"{name}Backbone")(**made)


def fixed_size(tensor):
    """Return the input of fixed size that stands for a backbone's own."""
    shape = [size or TOKENS for size in tensor.shape[1:]]
    return keras.Input(shape, dtype=tensor.dtype, name=tensor.name)


def values(tensor, random):
    """Return random values for an input: images in [0, 1], or token, segment and mask indices."""
    shape = (SAMPLES, *tensor.shape[1:])
    if tensor.dtype.startswith("float"):
        return random.random(shape).astype(tensor.dtype)
    if "mask" in tensor.name:
        mask = np.ones(shape, tensor.dtype)
        mask[::2, -3:] = 0  # padding
        return mask
    largest = 2 if "segment" in tensor.name else VOCABULARY
    return random.integers(0, largest, shape).astype(tensor.dtype)
