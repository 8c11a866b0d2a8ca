"""All keys of the section `compare` with their defaults."""

compare = dict(
    metric=None,  # downstream metric to compare, such as AP50 or top1; null: the first of the task
    higher_is_better=True,  # false for errors
    seeds=10,  # number of seeds (0, 1, ...) or a list of them; more can be added later
    arms=["pretrained", "bissl", "longer_pretraining", "joint"],  # arms to compare; pretrained is required
    vary="bissl",  # first stage with a varying seed (pretrain, bissl or finetune); earlier stages run once
    finetune_seeds=1,  # fine-tunings per seed of the stage before; the value of a seed is their mean
    labels=None,  # shares of the training labels, such as [0.05, 0.25, 1.0], with a comparison for each
    margin=None,  # smallest difference that matters, such as 0.01: for tests of equivalence and the number of seeds
    budget="steps",  # the same for all arms: steps of fine-tuning, or seconds (cheaper arms fine-tune for longer)
    search_trials=0,  # trials of the section `search`, the same for every arm, before the seeds; 0: none
    datasets={},  # for --datasets: name of a data set -> overrides that select it
)
