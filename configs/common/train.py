"""Every key of the plain sections, with its default. Other configs import these and change what differs."""

train = dict(
    output_dir="runs/default",  # the run directory; must be new or empty unless --resume
    stages=["bissl", "finetune"],  # of pretrain, bissl, finetune: each goes on from what the one before left
    init=None,  # where the first stage starts: a .safetensors file, a run directory, zoo:NAME; null: random
    imports=None,  # Python files or modules that register parts of your own, such as [mine/rotation.py]
    hooks=None,  # hooks of your own, a list of described calls such as [L(MyHook)(period=10)], see the engine reference
    zoo=None,  # folder or address, or a list of them, where zoo:NAME is looked up; null: $BISSL_ZOO, or model_zoo/
    seed=0,  # of weights, data order and augmentation
    deterministic=False,  # algorithms that give the same bits every time, and a resumed run too; slower on GPUs
    device="auto",  # auto (a GPU where there is one), cpu, cuda
    amp=None,  # bf16: losses that are differentiated once run in bfloat16 autocast; null: all in float32
    on_nonfinite="stop",  # at a loss or gradient that is NaN or infinite; skip: undo the step and take the next batch
    max_skipped=10,  # most steps skipped in a stage (in bissl of both levels together); one more ends the run
    log_period=10,  # steps between progress lines and records in metrics.jsonl; bissl records every alternation
    writers=["json", "tensorboard"],  # of the figures: json (metrics.jsonl, always), tensorboard, wandb
    lock=True,  # refuse a second process on output_dir; false only for a file system without file locks
    report=True,  # write report.html when the run has ended; what goes wrong with it is a warning
    checkpoint=dict(
        period=500,  # steps between checkpoints; the last step of a stage always has one
        keep=2,  # newest checkpoints kept per stage
        every=None,  # also kept: those at multiples of so many steps
        best=None,  # also kept: the one of the highest value of a figure measured on the way, such as test/AP50
    ),
    probe=dict(  # of the embedding that the pretext method trains, in pretrain and bissl; the run does not notice
        period=0,  # steps (in bissl alternations) between probes, and one at the end of the stage; 0 for none
        images=2000,  # most images of each data set that is looked at, drawn with train.seed
        k=20,  # of kNN from dataloader.train to dataloader.test, where their targets are classes; 0: monitors only
        linear=True,  # also a linear classifier from the same features; not where k is 0
    ),
    publish=dict(
        name=None,  # name of the zoo entry the run ends in; null publishes nothing
        zoo=None,  # folder or address that it is published to; null: the first of train.zoo
        licence="unknown",  # of the published weights, an SPDX identifier
    ),
)

pretrain = dict(
    steps=None,  # optimizer steps; give these or epochs
    epochs=500,  # passes over dataloader.pretext
    ema=None,  # decay, such as 0.999, of a moving average of the weights, which then leaves the stage; null for none
    accumulate=1,  # equal parts of a batch to pass one by one, for want of memory; of methods for which it is exact
    channels_last=False,  # keep the networks in that memory format: faster on GPUs with tensor cores
    compile=False,  # torch.compile the backbone; needs a C++ compiler, and pays off in long runs on a GPU
)

bilevel = {
    "lambda": 0.001,  # weight of the pull of the lower backbone towards the upper one
    "gamma": 1.0,  # weight of the plain downstream loss in the upper objective
    "lower_steps": 20,  # N_L, pretext steps per alternation
    "upper_steps": 8,  # N_U, downstream steps per alternation
    "alternations": 500,  # T
    "adaptation": None,  # dict(every=100, alpha=0.1) is that of versions 1 and 2 of the paper
    "curvature_batch_size": None,  # samples of the pretext batch that defines the Hessian; null for a whole batch
    "hvp_mode": "retain_graph",  # of Hessian-vector products; recompute: slower, less memory
    "on_bad_hypergradient": "stop",  # if a solver's answer is not finite or far off; plain: follow v instead of x
    "update_bn_stats": True,  # downstream images of the hypergradient move the lower backbone's batch-norm statistics
    "shared_stage": None,  # last stage of the backbone that both levels share, such as c4; null for the whole backbone
    "pretext_warmup": dict(  # where train.init brings no head of the pretext method, and pretrain makes none
        steps=100,  # optimizer steps of a new pretext head on the frozen backbone; give these or epochs; 0 for none
        epochs=None,  # passes over dataloader.pretext
    ),
    "head_warmup": dict(
        steps=None,  # optimizer steps of the downstream head on the frozen backbone; give these or epochs
        epochs=20,  # passes over dataloader.train
        backbone_mode="eval",  # eval, or train as the authors have it (batch statistics, moving the running ones)
    ),
}

finetune = dict(
    steps=None,  # optimizer steps; give these or epochs
    epochs=400,  # passes over dataloader.train
    baseline=False,  # also fine-tune from the backbone that entered the BiSSL stage: same budget, same seed
    eval_period=None,  # steps between evaluations on dataloader.val if there is one, else test; null for the end only
    layer_decay=None,  # factor, such as 0.75, on the learning rate from each layer to the one below it; null for none
    freeze_at=None,  # the backbone up to this stage, such as c2, is not trained; null trains it all
    early_stopping=dict(
        metric=None,  # such as AP50: the weights that are best by it on dataloader.val are tested; null: the last ones
        patience=None,  # evaluations without a better one after which the stage ends; null for all its steps
    ),
)

clip_grad = dict(pretrain=None, head_warmup=10.0, lower=10.0, upper=10.0, finetune=None)  # limit of the global norm
