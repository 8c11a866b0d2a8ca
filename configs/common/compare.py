"""All keys of the section `compare` with their defaults."""

compare = dict(
    metric=None,  # downstream metric to compare, such as AP50 or top1
    higher_is_better=True,  # false for errors
    seeds=10,  # number of seeds (0, 1, ...) or a list of them; more can be added later
    arms=["pretrained", "bissl", "longer_pretraining", "joint"],  # arms to compare; pretrained is required
    vary="bissl",  # first stage with a varying seed (pretrain, bissl or finetune); earlier stages run once
    search_trials=0,  # trials of the section `search`, the same for every arm, before the seeds; 0: none
    datasets={},  # for --datasets: name of a data set -> overrides that select it
)
