"""BiSSLight in minutes on two CPU cores: digits on photographs, MAE on a tiny ViT, LoRA and M-FAC, Faster R-CNN."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

from ..common.pretext.mae import pretext
from ..common.solvers.mfac import solver
from .digit_scenes_det import bilevel, clip_grad, dataloader, finetune, lr_multiplier, optimizer, pretrain, task, train

# patches of 8 pixels, so that the detector gets a map of stride 8
backbone = L(build_backbone)(name="vit_tiny_patch16_224", img_size=96, patch_size=8, embed_dim=96, depth=4, num_heads=3)
pretext.update(decoder_dim=96, decoder_depth=1, decoder_heads=3)
pretext.augmentation.update(size=96, crop_scale=[0.5, 1.0], mask_patch=8, flip_probability=0.0)

bilevel.shared_stage = None
bilevel.lora = dict(r=8, alpha=8, targets=["q", "v"])
solver.gradients = 8  # two alternations

train.output_dir = "runs/quickstart_light"
train.publish.name = "vit_tiny_patch16_224.mae_bissl_light_digit_scenes"
