"""The quickstart with a second pretraining before the BiSSL stage, and a hook."""

from ...configs.quickstart.digit_scenes_det import *

train.imports = ["examples/my_stage/second_pretraining.py"]  # registers "second_pretraining"
train.stages = ["pretrain", "second_pretraining", "bissl", "finetune"]
train.hooks = [{"_target_": "second_pretraining.LogLearningRate", "period": 50}]
train.output_dir, train.publish.name = "runs/second_pretraining", "resnet18.simclr_twice_bissl_digit_scenes"
