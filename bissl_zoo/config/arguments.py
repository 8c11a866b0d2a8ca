"""The arguments of the calls in a config: their domains, which are checked before a run starts.

These are also all arguments that the config of a zoo entry may set: what is not listed here, a stranger cannot set. No
listed argument names a file, an address, a cache or code. A part of a plug-in lists its own where it is registered:
`@PRETEXT_METHODS.register("mine", args={"temperature": POSITIVE})`.
"""

from collections.abc import Mapping
from typing import Any

from bissl_zoo import registry
from bissl_zoo.config.domains import (
    ANY,
    BELOW_ONE,
    COLORS,
    COUNT,
    DEVIATIONS,
    FLAG,
    FRACTION,
    NON_NEGATIVE,
    NULL,
    NUMBER,
    PAIR,
    POSITIVE,
    SEED,
    SHARE,
    TEXT,
    WHOLE,
    WIDTHS,
    Domain,
    choice,
    sequence,
)

_SCALE = sequence(SHARE, length=2, ordered=True)
_RATIO = sequence(POSITIVE, length=2, ordered=True)
_FRACTIONS = sequence(FRACTION)
_NORMALIZATION = {"mean": COLORS, "std": DEVIATIONS}
_NAMES = NULL | sequence(TEXT)

#: target that builds a registered part -> its registry, and the domains of the arguments of the parts of this kind
PARTS: dict[str, tuple[str, dict[str, Domain]]] = {
    "bissl_zoo.registry.build_backbone": (
        "BACKBONES",
        {
            "architecture": TEXT,
            "out_features": ANY,
            **dict.fromkeys(("in_chans", "embed_dim", "depth", "base_width", "cardinality", "stem_width"), COUNT),
            **dict.fromkeys(("depths", "dims", "num_heads", "layers", "channels"), COUNT | WIDTHS),
            **dict.fromkeys(("img_size", "patch_size", "window_size"), COUNT | WIDTHS),
            **dict.fromkeys(("output_stride", "reg_tokens"), WHOLE),
            **dict.fromkeys(("class_token", "no_embed_class", "dynamic_img_size", "qkv_bias", "qk_norm"), FLAG),
            **dict.fromkeys(("pre_norm", "zero_init_last", "avg_down"), FLAG),
            **dict.fromkeys(("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"), BELOW_ONE),
            **dict.fromkeys(("pos_drop_rate", "patch_drop_rate"), BELOW_ONE),
            **dict.fromkeys(("init_values", "ls_init_value"), NULL | NON_NEGATIVE),
            **{
                "mlp_ratio": POSITIVE,
                "fc_norm": NULL | FLAG,
                "global_pool": TEXT,
                "pos_embed": TEXT,
                "stem_type": TEXT,
            },
        },
    ),
    "bissl_zoo.registry.build_pretext": (
        "PRETEXT_METHODS",
        {
            "projector": WIDTHS,
            "predictor": WIDTHS,
            **dict.fromkeys(("temperature", "student_temperature", "teacher_temperature"), POSITIVE),
            **dict.fromkeys(("decay", "center_decay"), FRACTION),
            **dict.fromkeys(("redundancy", "invariance", "variance", "covariance"), NON_NEGATIVE),
            **dict.fromkeys(("queue_length", "decoder_dim", "decoder_depth", "decoder_heads"), COUNT),
            "augmentation": ANY,
        },
    ),
    "bissl_zoo.registry.build_task": (
        "DOWNSTREAM_TASKS",
        {
            **_NORMALIZATION,
            **{"image_size": COUNT, "crop_scale": _SCALE, "aspect_ratio": _RATIO, "resize": NULL | COUNT},
            "interpolation": choice("bicubic", "bilinear"),
            "loss": choice("bce", "softmax"),
            **{"min_size": COUNT | WIDTHS, "max_size": COUNT, "fpn_channels": NULL | COUNT},
            **{"anchor_sizes": NULL | WIDTHS, "anchor_ratios": NULL | sequence(POSITIVE)},
            **dict.fromkeys(("roi_size", "box_head", "rpn_batch", "roi_batch"), NULL | COUNT),
            **{"sampling_ratio": NULL | NUMBER, "rpn_proposals": NULL | sequence(COUNT, length=2)},
            **dict.fromkeys(("score_threshold", "nms_threshold"), NULL | FRACTION),
            **{"detections": NULL | COUNT, "flip_probability": FRACTION},
            **{"config": choice("C4", "FPN"), "evaluator": choice("common", "detectron2")},
        },
    ),
    "bissl_zoo.registry.build_solver": (
        "SOLVERS",
        {
            **{"iterations": WHOLE, "tolerance": NON_NEGATIVE, "damping": NUMBER | choice("auto")},
            **{"blockwise": FLAG, "growth": POSITIVE, "check": FLAG},
            **{"gradients": COUNT, "blocks": choice("tensor", "layer", "all"), "store": choice("device", "cpu")},
            **{"recycle": WHOLE, "recycled_iterations": COUNT, "rank": COUNT, "max_size": COUNT, "seed": SEED},
        },
    ),
    "bissl_zoo.registry.build_dataset": (
        "DATASETS",
        {
            **{
                "split": TEXT,
                "splits": sequence(TEXT),
                "classes": _NAMES | choice("voc"),
                "labelled": FLAG,
                "part": NULL | TEXT,
            },
            **{"on_bad_annotation": choice("error", "skip"), "on_bad": choice("error", "skip")},
            **{"val_fraction": FRACTION, "seed": SEED, "limit": NULL | COUNT, "shuffle_buffer": COUNT},
            **{"difficult": choice("ignore", "positive", "negative")},
            **dict.fromkeys(("image_size", "train", "test"), COUNT),
            **dict.fromkeys(("unlabeled", "val"), WHOLE),
        },
    ),
}

#: arguments that only the user gives: they are ignored in the config of an entry
USER_ARGS = {
    "bissl_zoo.registry.build_task": ("overrides",),
    "bissl_zoo.registry.build_dataset": ("root", "annotations", "images", "urls", "index"),
}

_LOADER = {
    **{"dataset": ANY, "batch_size": COUNT, "num_workers": WHOLE, "pin_memory": FLAG, "timeout": NON_NEGATIVE},
    "on_bad": choice("error", "skip"),
}
_VIEWS = {
    **{"size": COUNT, "crop_scale": _SCALE, "aspect_ratio": _RATIO, "flip_probability": FRACTION, **_NORMALIZATION},
}
_COLORS = {
    **{"jitter": sequence(NON_NEGATIVE, length=4), "jitter_probability": FRACTION, "grayscale_probability": FRACTION},
    **{"blur_probability": _FRACTIONS, "blur_sigma": _RATIO, "solarize_probability": _FRACTIONS},
}
_OPTIMIZER = {
    **dict.fromkeys(("lr", "weight_decay", "eps", "momentum_decay"), NON_NEGATIVE),
    **dict.fromkeys(("momentum", "dampening", "alpha"), BELOW_ONE),
    "betas": sequence(BELOW_ONE, length=2),
    **dict.fromkeys(("nesterov", "amsgrad", "centered", "maximize", "decoupled_weight_decay"), FLAG),
    **dict.fromkeys(("bias_correction", "grad_averaging", "always_adapt"), FLAG),
    **dict.fromkeys(("foreach", "fused"), NULL | FLAG),
    "trust_coeff": POSITIVE,
    "trust_clip": FLAG | NUMBER,
    "max_grad_norm": NULL | POSITIVE,
}
_SCHEDULES = "fvcore.common.param_scheduler"

#: target of any other call -> the domains of its arguments
CALLS: dict[str, dict[str, Domain]] = {
    "bissl_zoo.data.loaders.build_train_loader": {
        **_LOADER,
        **dict.fromkeys(("augment_on", "views_on"), choice("workers", "device")),
    },
    "bissl_zoo.data.loaders.build_test_loader": _LOADER,
    "bissl_zoo.data.views.two_views": {**_VIEWS, **_COLORS},
    "bissl_zoo.data.views.multi_crop": {
        **{**_VIEWS, **_COLORS, "local_size": COUNT, "local_crops": WHOLE, "local_scale": _SCALE},
    },
    "bissl_zoo.data.views.masked_view": {
        **{**_VIEWS, "mask_patch": COUNT, "mask_ratio": FRACTION, "interpolation": choice("bicubic", "bilinear")},
    },
    "bissl_zoo.optim.LRMultiplier": {"scheduler": ANY, "warmup_steps": WHOLE},
    f"{_SCHEDULES}.ConstantParamScheduler": {"value": NON_NEGATIVE},
    f"{_SCHEDULES}.CosineParamScheduler": {"start_value": NON_NEGATIVE, "end_value": NON_NEGATIVE},
    f"{_SCHEDULES}.ExponentialParamScheduler": {"start_value": NON_NEGATIVE, "decay": NON_NEGATIVE},
    f"{_SCHEDULES}.LinearParamScheduler": {"start_value": NON_NEGATIVE, "end_value": NON_NEGATIVE},
    f"{_SCHEDULES}.MultiStepParamScheduler": {
        **{"values": sequence(NON_NEGATIVE), "num_updates": NULL | COUNT, "milestones": NULL | sequence(WHOLE)},
    },
    f"{_SCHEDULES}.PolynomialDecayParamScheduler": {"base_value": NON_NEGATIVE, "power": NON_NEGATIVE},
    f"{_SCHEDULES}.StepParamScheduler": {"num_updates": POSITIVE, "values": sequence(NON_NEGATIVE)},
    f"{_SCHEDULES}.StepWithFixedGammaParamScheduler": {
        **{"base_value": NON_NEGATIVE, "num_decays": COUNT, "gamma": POSITIVE, "num_updates": COUNT},
    },
    f"{_SCHEDULES}.CompositeParamScheduler": {
        **{"schedulers": ANY, "lengths": sequence(SHARE), "interval_scaling": sequence(TEXT)},
    },
}
for _module, _names in {
    "torch.optim": ("sgd.SGD", "adam.Adam", "adamw.AdamW", "nadam.NAdam", "radam.RAdam", "rmsprop.RMSprop"),
    "timm.optim": ("lars.Lars", "lamb.Lamb"),
}.items():
    for _name in _names:  # torch.optim.sgd.SGD and torch.optim.SGD
        CALLS[f"{_module}.{_name}"] = CALLS[f"{_module}.{_name.rpartition('.')[2]}"] = _OPTIMIZER

#: keys of the plain sections of configs/common/train.py
VALUES: dict[str, Domain] = {
    "train.seed": SEED,
    "train.label_fraction": NULL | SHARE,
    "train.label_seed": NULL | SEED,
    "train.folds": NULL | PAIR,
    "train.amp": choice(None, "bf16"),
    "train.on_nonfinite": choice("stop", "skip"),
    "train.max_skipped": WHOLE,
    "train.log_period": COUNT,
    "train.checkpoint.period": COUNT,
    "train.checkpoint.keep": COUNT,
    "train.checkpoint.every": NULL | COUNT,
    "train.probe.period": WHOLE,
    "train.probe.images": PAIR,
    "train.probe.k": WHOLE,
    "pretrain.steps": NULL | COUNT,
    "pretrain.epochs": NULL | POSITIVE,
    "pretrain.accumulate": COUNT,
    "bilevel.lambda": POSITIVE,
    "bilevel.gamma": NON_NEGATIVE,
    "bilevel.lower_steps": COUNT,
    "bilevel.upper_steps": COUNT,
    "bilevel.alternations": COUNT,
    "bilevel.adaptation.every": COUNT,
    "bilevel.adaptation.alpha": FRACTION,
    "bilevel.curvature": choice("gauss_newton", "hessian"),
    "bilevel.curvature_precision": choice("float32", "tf32"),
    "bilevel.curvature_batch_size": NULL | PAIR,
    "bilevel.hvp_mode": choice("retain_graph", "recompute"),
    "bilevel.on_bad_hypergradient": choice("stop", "plain"),
    "bilevel.lora.r": COUNT,
    "bilevel.lora.alpha": POSITIVE,
    "bilevel.lora.targets": sequence(TEXT),
    "bilevel.lower_head_lr": NULL | NON_NEGATIVE,
    "bilevel.pretext_warmup.steps": NULL | WHOLE,
    "bilevel.pretext_warmup.epochs": NULL | NON_NEGATIVE,
    "bilevel.head_warmup.steps": NULL | WHOLE,
    "bilevel.head_warmup.epochs": NULL | NON_NEGATIVE,
    "bilevel.head_warmup.backbone_mode": choice("eval", "train"),
    "pretrain.head_warmup": FLAG,
    "finetune.head": choice("new", "warm"),
    "finetune.l2_sp": NULL | NON_NEGATIVE,
    "finetune.pseudo_threshold": FRACTION,
    "finetune.steps": NULL | COUNT,
    "finetune.epochs": NULL | POSITIVE,
    "finetune.eval_period": NULL | COUNT,
    "finetune.layer_decay": NULL | SHARE,
    "finetune.early_stopping.patience": NULL | COUNT,
    **{f"clip_grad.{level}": NULL | POSITIVE for level in ("pretrain", "head_warmup", "lower", "upper", "finetune")},
}


def arguments_of(call: Mapping[str, Any]) -> dict[str, Domain] | None:
    """Return the domains of the arguments of a described call; None if the call is not listed.

    Raises:
        RegistryError: it builds a part that is not registered.
    """
    target = call.get("_target_")
    if not isinstance(target, str):
        return None
    if target in PARTS:
        kind, domains = PARTS[target]
        return {"name": TEXT, **domains, **getattr(registry, kind).arguments(call.get("name"))}
    return CALLS.get(target)


def argument_problems(node: Any, key: str = "") -> list[str]:
    """Return "KEY is VALUE; it must be ..." for each value of `VALUES`, or argument of a call, outside its domain.

    Args:
        node: plain dictionaries, lists and scalars, such as a resolved config.
        key: dotted key of `node`.
    """
    problems = []
    if isinstance(node, Mapping):
        domains = arguments_of(node) or {} if "_target_" in node else {}
        for name, value in node.items():
            where = f"{key}.{name}".lstrip(".")
            domain = domains.get(name) or VALUES.get(where)
            if domain and (problem := domain.problem(value)):
                problems.append(f"{where} is {value!r:.80}; it {problem}.")
            problems += argument_problems(value, where)
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            problems += argument_problems(value, f"{key}.{number}")
    return problems
