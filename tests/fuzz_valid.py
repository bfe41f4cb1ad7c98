"""Valid configurations, with every key of the format between them, for fuzzing to change."""

VALID = [
    {"compression": {"algorithm": "quantization"}},
    {
        "input_info": [{"sample_size": [1, 8, 8, 3], "type": "float", "keyword": "image"}],
        "target_device": "CPU",
        "compression_lr_multiplier": 0.5,
        "log_dir": "logs",
        "disable_shape_matching": True,
        "model": "resnet",
        "optimizer": {"type": "SGD", "base_lr": 0.1, "schedule": {"steps": [10, 20]}},
        "compression": [
            {
                "algorithm": "quantization",
                "preset": "mixed",
                "quantize_inputs": True,
                "quantize_outputs": False,
                "overflow_fix": "first_layer_only",
                "export_to_onnx_standard_ops": False,
                "ignored_scopes": ["{re}^head$"],
                "weights": {
                    "mode": "symmetric",
                    "bits": 8,
                    "signed": True,
                    "per_channel": True,
                    "logarithm_scale": False,
                    "ignored_scopes": ["stem"],
                },
                "activations": {
                    "mode": "asymmetric",
                    "bits": 8,
                    "signed": False,
                    "per_channel": False,
                    "unified_scale_ops": [["left", "right"]],
                },
                "scope_overrides": {
                    "weights": {
                        "body": {
                            "bits": 4,
                            "mode": "asymmetric",
                            "initializer": {"range": {"type": "min_max"}},
                        }
                    },
                    "activations": {"{re}image": {"bits": 7}},
                },
                "initializer": {
                    "range": [
                        {
                            "type": "percentile",
                            "num_init_samples": 4,
                            "params": {"min_percentile": 1, "max_percentile": 99.5},
                            "target_quantizer_group": "activations",
                            "target_scopes": ["{re}.*"],
                        },
                        {"type": "mean_min_max", "num_init_samples": 2},
                    ],
                    "batchnorm_adaptation": {"num_bn_adaptation_samples": 4},
                },
                "params": {
                    "batch_multiplier": 2,
                    "activations_quant_start_epoch": 1,
                    "weights_quant_start_epoch": 2,
                    "lr_poly_drop_start_epoch": 3,
                    "lr_poly_drop_duration_epochs": 4,
                    "disable_wd_start_epoch": 5,
                    "base_lr": 1e-3,
                    "base_wd": 1e-5,
                },
                "compression_lr_multiplier": 0.1,
                "gradient_scale": "lsq",
                "learn_ranges": True,
                "range_gradient": "clipping",
                "range_decay": 1e-4,
            }
        ],
    },
    {
        "compression": {
            "algorithm": "quantization",
            "initializer": {
                "precision": {
                    "type": "manual",
                    "bits": [2, 4, 8],
                    "bitwidth_per_scope": [[4, "stem"], [2, "{re}body"]],
                    "bitwidth_assignment_mode": "strict",
                }
            },
        }
    },
    {
        "compression": {
            "algorithm": "quantization",
            "initializer": {
                "precision": {
                    "type": "hawq",
                    "bits": [4, 8],
                    "num_data_points": 4,
                    "iter_number": 2,
                    "tolerance": 1e-3,
                    "compression_ratio": 1.5,
                    "budget": {"bytes": 100000, "bit_operations": 1e12, "latency": 100.0},
                    "traces_per_layer_path": "traces.json",
                    "dump_init_precision_data": False,
                }
            },
        }
    },
    {
        "compression": {
            "algorithm": "quantization",
            "initializer": {
                "precision": {
                    "type": "autoq",
                    "eval_subset_ratio": 0.5,
                    "warmup_iter_number": 3,
                    "compression_ratio": 0.2,
                }
            },
        }
    },
    {
        "compression": {
            "algorithm": "filter_pruning",
            "pruning_init": 0.1,
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
            "params": {
                "filter_importance": "L1",
                "pruning_target": 0.4,
                "pruning_steps": 3,
                "num_init_steps": 1,
                "schedule": "exponential_with_bias",
                "all_weights": True,
                "round_to": 1,
                "random_seed": 1,
                "prune_first_conv": True,
                "prune_downsample_convs": False,
                "prune_batch_norms": True,
            },
            "target_scopes": ["{re}.*"],
        }
    },
    {
        "compression": {
            "algorithm": "filter_pruning",
            "params": {
                "interlayer_ranking_type": "learned_ranking",
                "pruning_flops_target": 0.3,
                "round_to": 1,
                "legr_params": {
                    "generations": 2,
                    "train_steps": 1,
                    "max_pruning": 0.5,
                    "random_seed": 3,
                    "population_size": 2,
                    "num_samples": 2,
                    "mutate_percent": 0.5,
                    "scale_sigma": 1,
                },
                "save_ranking_coeffs_path": "ranking.json",
            },
        }
    },
    {
        "compression": [
            {
                "algorithm": "magnitude_sparsity",
                "sparsity_init": 0.1,
                "params": {
                    "schedule": "multistep",
                    "multistep_steps": [2, 4],
                    "multistep_sparsity_levels": [0.1, 0.3, 0.6],
                    "sparsity_level_setting_mode": "local",
                    "weight_importance": "abs",
                    "sparsity_freeze_epoch": 6,
                    "patience": 2,
                },
                "validate_scopes": False,
                "ignored_scopes": "{re}nothing",
            },
            {
                "algorithm": "knowledge_distillation",
                "type": "softmax",
                "temperature": 2,
                "scale": 1,
            },
        ]
    },
    {
        "compression": [
            {
                "algorithm": "magnitude_sparsity",
                "params": {
                    "schedule": "polynomial",
                    "sparsity_target": 0.5,
                    "sparsity_target_epoch": 3,
                    "update_per_optimizer_step": True,
                    "steps_per_epoch": 4,
                    "power": 3,
                    "concave": False,
                    "sparsity_pattern": "block",
                    "block_shape": [2, 2],
                },
            },
            {"algorithm": "quantization"},
        ]
    },
    {
        "compression": [
            {
                "algorithm": "rb_sparsity",
                "sparsity_init": 0.1,
                "compression_lr_multiplier": 2,
                "params": {"schedule": "adaptive", "sparsity_target": 0.6, "patience": 1},
            },
            {
                "algorithm": "knowledge_distillation",
                "type": "mse",
                "scale": 0.5,
                "features": {"target_scopes": ["body"], "scale": 2, "loss": "mae"},
            },
        ]
    },
    {"compression": [{"algorithm": "const_sparsity", "target_scopes": ["stem", "body"]}]},
    {
        "compression": {
            "algorithm": "movement_sparsity",
            "params": {
                "warmup_start_epoch": 1,
                "warmup_end_epoch": 3,
                "importance_regularization_factor": 0.1,
                "enable_structured_masking": False,
                "power": 2,
                "init_importance_threshold": -1.0,
                "final_importance_threshold": 0.0,
                "steps_per_epoch": 2,
            },
            "sparse_structure_by_scopes": [
                {"mode": "block", "sparse_factors": [2, 2], "target_scopes": ["body"]},
                {"mode": "per_dim", "axis": 0, "target_scopes": ["hidden"]},
                {"mode": "fine", "target_scopes": "head"},
            ],
        }
    },
    {
        "compression": {
            "algorithm": "binarization",
            "mode": "dorefa",
            "binarize_first_and_last": True,
            "initializer": {
                "range": {"type": "mean_min_max", "num_init_samples": 2},
                "batchnorm_adaptation": {"num_bn_adaptation_samples": 2},
            },
            "params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 0},
        }
    },
    {
        "accuracy_aware_training": {
            "mode": "early_exit",
            "params": {"maximal_absolute_accuracy_degradation": 0.5, "maximal_total_epochs": 5},
        },
        "compression": {"algorithm": "quantization"},
    },
    {
        "accuracy_aware_training": {
            "mode": "adaptive_compression_level",
            "params": {
                "maximal_relative_accuracy_degradation": 1.0,
                "initial_training_phase_epochs": 1,
                "patience_epochs": 1,
                "initial_compression_rate_step": 0.1,
                "compression_rate_step_reduction_factor": 0.5,
                "lr_reduction_factor": 0.5,
                "minimal_compression_rate_step": 0.02,
            },
        },
        "compression": [
            {
                "algorithm": "filter_pruning",
                "params": {"pruning_parameters_target": 0.3, "round_to": 2},
            },
            {"algorithm": "experimental_quantization"},
        ],
    },
    {
        "bootstrapNAS": {"training": {"algorithm": "progressive_shrinking", "stages": [{"a": 1}]}},
        "compression": {"algorithm": "quantization", "preset": "performance"},
    },
]
