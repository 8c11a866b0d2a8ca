"""All keys of the plain sections with their defaults; other configs import them and change some."""

train = dict(
    output_dir="runs/default",  # run directory; must be new or empty unless --resume
    stages=["bissl", "finetune"],  # stages to run in order; each starts from the result of the previous one
    init=None,  # weights of the first stage: a file, a run directory, zoo:NAME, ...; null: random
    imports=None,  # Python files or modules that register custom parts, such as [mine/rotation.py]
    hooks=None,  # additional hooks, a list of lazy calls such as [L(MyHook)(period=10)]; see the engine reference
    zoo=None,  # folder, address or list of them in which zoo:NAME is looked up; null: $BISSL_ZOO, or model_zoo/
    seed=0,  # seed of weights, data order and augmentation
    label_fraction=None,  # share of dataloader.train to use, such as 0.05, class by class; null: all of it
    folds=None,  # cross-validation over dataloader.train and test together; the fold is label_seed modulo folds
    label_seed=None,  # seed of the share, null: train.seed; smaller shares of a seed are contained in larger ones
    deterministic=False,  # use deterministic algorithms; resumed runs are bit-equal, too; slower on GPUs
    device="auto",  # auto (a GPU if available), cpu, cuda
    amp=None,  # bf16: bfloat16 autocast for losses that are differentiated once; null: float32
    channels_last=False,  # channels-last memory format in all stages: faster convolutions, on many CPUs too
    on_nonfinite="stop",  # if a loss or gradient is NaN or infinite: stop, or skip (undo the step and continue)
    max_skipped=10,  # maximum number of skipped steps in a stage (bissl: both levels together)
    log_period=10,  # steps between log lines and records in metrics.jsonl; bissl records every alternation
    writers=["json", "tensorboard"],  # metric writers: json (metrics.jsonl, always on), tensorboard, wandb
    lock=True,  # refuse a second process on output_dir; set false only on file systems without locks
    report=True,  # write report.html at the end of the run; a failure is a warning
    checkpoint=dict(
        period=500,  # steps between checkpoints; the last step of a stage always has one
        keep=2,  # number of newest checkpoints to keep per stage
        every=None,  # also keep checkpoints at multiples of this number of steps
    ),
    probe=dict(  # probes of the pretext embedding in pretrain and bissl; they do not affect the run
        period=0,  # steps (bissl: alternations) between probes, plus one at the end of the stage; 0: none
        images=2000,  # maximum number of images per data set, drawn with train.seed
        k=20,  # k of kNN from dataloader.train to dataloader.test, if targets are classes; 0: collapse metrics only
        linear=True,  # also train a linear classifier on the same features; not if k is 0
    ),
    publish=dict(
        name=None,  # name of the published zoo entry; null: do not publish
        zoo=None,  # folder or address to publish to; null: the first of train.zoo
        model=False,  # also publish the fine-tuned model, which load_model("zoo:NAME") runs
        licence="unknown",  # licence of the published weights, an SPDX identifier
    ),
)

pretrain = dict(
    steps=None,  # optimizer steps; set these or epochs
    epochs=500,  # passes over dataloader.pretext
    accumulate=1,  # split each batch into equal parts to save memory; only for methods for which it is exact
    head_warmup=False,  # first train a missing pretext head on the frozen backbone, as bilevel.pretext_warmup does
    compile=False,  # torch.compile the backbone; needs a C++ compiler, pays off in long runs on a GPU
)

bilevel = {
    "lambda": 0.001,  # weight of the pull of the lower backbone towards the upper one
    "gamma": 1.0,  # weight of the plain downstream loss in the upper objective
    "lower_steps": 20,  # N_L, pretext steps per alternation
    "upper_steps": 8,  # N_U, downstream steps per alternation
    "alternations": 500,  # T
    "adaptation": None,  # dict(every=100, alpha=0.1) as in versions 1 and 2 of the paper
    "curvature": "gauss_newton",  # of the pretext loss, positive semidefinite; hessian: exact, in general indefinite
    "curvature_precision": "float32",  # of products on a GPU; tf32: twice as fast, off by about 0.1
    "curvature_batch_size": None,  # samples of the pretext batch that defines the curvature; null: a whole batch
    "hvp_mode": "retain_graph",  # Hessian-vector products: retain_graph, or recompute (slower, less memory)
    "on_bad_hypergradient": "stop",  # if a solution is not finite or far off: stop, or plain (use v instead of x)
    "lora": None,  # dict(r=64, alpha=64, targets=["q", "v"]): train low-rank additions to layers of a transformer alone
    "lower_head_lr": None,  # learning rate of the pretext head in the lower level; null: that of optimizer.lower
    "reset_teacher": False,  # set a momentum teacher to its student when the stage starts, as in the authors' code
    "update_bn_stats": True,  # update the lower backbone's batch-norm statistics with the downstream images
    "shared_stage": None,  # last stage of the backbone that both levels share, such as c4; null: the whole backbone
    "pretext_warmup": dict(  # if neither train.init nor pretrain provides a pretext head
        steps=100,  # optimizer steps of a new pretext head on the frozen backbone; set these or epochs; 0: none
        epochs=None,  # passes over dataloader.pretext
    ),
    "head_warmup": dict(
        steps=None,  # optimizer steps of the downstream head on the frozen backbone; set these or epochs
        epochs=20,  # passes over dataloader.train
        backbone_mode="eval",  # eval, or train as in the authors' code (batch statistics, running statistics updated)
    ),
}

finetune = dict(
    steps=None,  # optimizer steps; set these or epochs
    epochs=400,  # passes over dataloader.train
    baseline=False,  # also fine-tune from the backbone before the BiSSL stage, with the same budget and seed
    eval_period=None,  # steps between evaluations on dataloader.val if there is one, else test; null: only at the end
    layer_decay=None,  # factor, such as 0.75, on the learning rate from each layer to the one below; null: none
    sync_batch_norm=False,  # with several GPUs, compute batch-norm statistics over all of them
    head="new",  # new, or warm: that of the stage before, or first trained on the frozen backbone (LP-FT)
    l2_sp=None,  # strength of a pull of the backbone towards its start (L2-SP), such as 0.01; null: none
    pseudo_threshold=0.8,  # after the stage teacher: minimum score of its labels for unlabelled images
    freeze_at=None,  # freeze the backbone up to this stage, such as c2; null: train all of it
    early_stopping=dict(
        metric=None,  # test the weights that are best by this metric, such as AP50, on dataloader.val; null: the last
        patience=None,  # number of evaluations without improvement after which the stage ends; null: run all steps
    ),
)

# limits of the global gradient norm
clip_grad = dict(pretrain=None, head_warmup=10.0, lower=10.0, upper=10.0, finetune=None)
