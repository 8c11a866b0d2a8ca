"""Every key of the section `compare` of a comparison's config, with its default."""

compare = dict(
    metric=None,  # the figure of the downstream task that is compared, such as AP50 or top1
    higher_is_better=True,  # false for errors
    seeds=10,  # how many (0, 1, ...), or a list of them; more may be added later
    arms=["pretrained", "bissl", "longer_pretraining", "joint"],  # what is compared; pretrained must be one
    vary="bissl",  # the first stage that a seed changes, of pretrain, bissl, finetune; those before it run once
    search_trials=0,  # draws from the section `search`, the same for every arm, before the seeds are run; 0 for none
    datasets={},  # for --datasets: the name of a data set, and the overrides that make the config one of it
)
