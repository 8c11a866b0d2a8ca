"""Zoo entries of a few hundred kilobytes."""

import timm
import torch

from bissl_zoo.zoo import publish_entry


def publish_tiny(zoo, name="tiny", seed=0, config="train: {}\n", pretext_head=None, **metadata):
    """Publish a small ResNet with the weights of `seed`; the rest is what the entry says of itself."""
    torch.manual_seed(seed)
    return publish_entry(
        name=name,
        backbone_state=timm.create_model("test_resnet", num_classes=0).state_dict(),
        architecture="test_resnet",
        pretrained_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]},
        metadata=metadata,
        train_config_text=config,
        pretext_head_state=pretext_head,
        zoo=zoo,
    )
