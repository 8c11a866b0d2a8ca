"""The teacher of self-training: a model that is fine-tuned on the labels and labels the unlabelled images."""

from dataclasses import replace

from bissl_zoo.bilevel.level import Level
from bissl_zoo.engine.stages.finetune import Finetune, FinetuneTrainer
from bissl_zoo.engine.trainer import Context, Weights
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import STAGES


class TeacherTrainer(FinetuneTrainer):
    """Fine-tune a teacher; the result is the weights that entered the stage, and the teacher."""

    def __init__(self, level: Level, l2_sp: float | None, entered: Weights) -> None:
        super().__init__(level, l2_sp)
        self.entered = entered

    def result(self) -> Weights:
        """Return the weights that entered the stage, with the teacher."""
        teacher = Weights(self.level.backbone.state_dict(), task=self.level.head.state_dict())
        return replace(self.entered, teacher=teacher)


@STAGES.register("teacher")
class Teacher(Finetune):
    """Fine-tune on the labelled images alone, with the settings of `finetune`, to label the unlabelled images."""

    name = "teacher"
    data_roles = ("pretext", "train")
    evaluates = False
    purpose = "train a teacher on the labelled images, which then labels the others"

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> TeacherTrainer:
        """Return the trainer of the teacher."""
        if hasattr(context.data["pretext"], "stream"):
            raise ConfigError("The stage 'teacher' labels single images; dataloader.pretext cannot be a set of shards.")
        trainer = super().build(context, weights, start_step)
        return TeacherTrainer(trainer.level, trainer.l2_sp, weights)
