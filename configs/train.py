"""How a model is trained: optimizer, schedule, batch, precision, ZeRO, checkpoints and evaluation.

Durations may be given in steps, epochs or examples; `configs.resolve` turns them into steps, once, at submission.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.base import Fraction, Positive, Seed, Strict
from configs.probes import FewShot

Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(gt=0.0, le=1e15)]


TrainedPart = Literal["all", "head", "attention"]
Weights = Literal["raw", "ema"]
Decay = Literal["linear", "cosine", "constant", "steps"]
Loss = Literal["softmax", "sigmoid", "bce"]
Objective = Literal["classification", "masked_patch"]


class Optim(Strict):
    """AdamW (decoupled decay, on kernels only), LAMB, or SGD with momentum. Weight decay is torch's: multiplied by the
    learning rate (big_vision's 1e-4 at lr 1e-3 is 0.1 here)."""

    name: Literal["adamw", "sgd", "lamb"] = "adamw"
    lr: Annotated[float, Field(gt=0.0, le=100.0)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    clip_grad_norm: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        1.0, description="Global norm; null: no clip."
    )
    layer_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="The learning rate of each layer is this many times that of the layer above it."
    )
    train: TrainedPart = Field("all", description="all; head: linear probe; attention: attention, positions and head.")

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        unused = {"adamw": {"momentum"}, "lamb": {"momentum"}, "sgd": {"betas", "eps"}}[self.name]
        defaults = type(self).model_fields
        for field in sorted(unused):
            if getattr(self, field) != defaults[field].default:
                raise ValueError(f"{field} does not apply to {self.name}")
        if self.layer_decay is not None and self.train == "head":
            raise ValueError("layer_decay does not apply to train: head, where one layer is trained")
        return self


class Schedule(Strict):
    """Learning rate: linear warm-up from 0, then linear or cosine to `min_lr`, constant, or by steps. Exactly one
    total."""

    total_steps: Positive | None = None
    total_epochs: Amount | None = None
    total_examples: Positive | None = None
    warmup_steps: Count | None = None
    warmup_epochs: Annotated[float, Field(ge=0.0, le=1e6)] | None = None
    warmup_examples: Count | None = None
    decay: Decay = Field(
        "cosine", description="steps: a tenth after 30, 60 and 90 % of all steps each (BiT's HyperRule)."
    )
    min_lr: Annotated[float, Field(ge=0.0, le=100.0)] = Field(
        0.0, description="What the learning rate decays to (DeiT: 1e-5, MAE: 1e-6); with layer_decay, before scaling."
    )

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        total = [f for f in ("total_steps", "total_epochs", "total_examples") if getattr(self, f) is not None]
        if len(total) != 1:
            raise ValueError(
                f"give exactly one of total_steps, total_epochs and total_examples, got {', '.join(total) or 'none'}"
            )
        warmup = [f for f in ("warmup_steps", "warmup_epochs", "warmup_examples") if getattr(self, f) is not None]
        if len(warmup) > 1:
            raise ValueError(
                f"give at most one of warmup_steps, warmup_epochs and warmup_examples, got {', '.join(warmup)}"
            )
        if self.total_steps is not None and self.warmup_steps is not None and self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than total_steps {self.total_steps}")
        if self.decay in ("constant", "steps") and self.min_lr > 0.0:
            raise ValueError(f"min_lr {self.min_lr:g} does not apply to decay: {self.decay}")
        return self


class SpikeRollback(Strict):
    """Go back to a checkpoint from before the loss spiked and pass over the data that came since (PaLM, 5.1). The loss
    is looked at where it is logged, every `train.log_every_steps`."""

    factor: Annotated[float, Field(gt=1.0, le=1e6)] = Field(
        2.0, description="A loss above this many times the median of the last `window` logged ones is high."
    )
    window: Annotated[int, Field(ge=3, le=1000)] = Field(20, description="Logged losses that the median is taken of.")
    patience: Annotated[int, Field(ge=1, le=100)] = Field(
        2, description="High losses in a row that make a spike. So do `train.max_nonfinite_steps`."
    )
    max_rollbacks: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="Spikes after which the job goes back; one more ends it with LOSS_SPIKE."
    )


class Train(Strict):
    """Batch, precision, loss and randomness. The global batch never changes with the number of workers."""

    global_batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 4096
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = "auto"
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: fp32 parameters, bfloat16 autocast.")
    objective: Objective = Field(
        "classification",
        description="masked_patch: tell the mean colour of corrupted patches (paper, B.1.2); needs no labels.",
    )
    loss: Loss = Field(
        "softmax",
        description="sigmoid: binary cross-entropy summed over classes; bce: averaged over them, and every class of "
        "a mixed image counts whole (DeiT-III).",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    seed: Seed = 0
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Keep a moving average of the weights with this decay per step, such as 0.9999."
    )
    activation_checkpointing: bool = False
    compile: bool = Field(
        False, description="Compile the model with torch.compile; not at ZeRO stage 3. Needs a C++ compiler on workers."
    )
    spike_rollback: SpikeRollback | None = Field(None, description="Go back when the loss spikes; none: train on.")
    max_nonfinite_steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="Consecutive steps with a non-finite gradient before the job fails with NAN_LOSS."
    )
    log_every_steps: Positive = 10

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.loss == "bce" and self.label_smoothing > 0.0:
            raise ValueError("label_smoothing does not apply to loss: bce, whose targets are 0 or 1")
        return self


class Zero(Strict):
    """ZeRO stage: what is partitioned over the workers (0 nothing, 1 optimizer state, 2 also gradients, 3 also
    weights)."""

    stage: Literal[0, 1, 2, 3] = 1


class Every(Strict):
    """A cadence, in steps, epochs or examples; none: only at the end."""

    every_steps: Positive | None = None
    every_epochs: Amount | None = None
    every_examples: Positive | None = None

    @model_validator(mode="after")
    def _one_cadence(self) -> Self:
        given = [f for f in ("every_steps", "every_epochs", "every_examples") if getattr(self, f) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give at most one of every_steps, every_epochs and every_examples, got {', '.join(given)}"
            )
        return self

    @property
    def cadence(self) -> float | None:
        """How often, in whichever unit was given; None: only at the end."""
        return next((every for every in (self.every_steps, self.every_epochs, self.every_examples) if every), None)


class Checkpoint(Every):
    """Checkpoints are taken at this cadence and always at the end. `keep_best` keeps those with the best `metric`."""

    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    keep_best: Annotated[int, Field(ge=0, le=1000)] = 1
    metric: Literal["eval/top1", "eval/top5", "eval/loss"] = "eval/top1"


class Eval(Every):
    """Evaluation on the held-out or eval split at this cadence, and at the end unless `at_end` is false."""

    at_end: bool = True
    weights: Weights = Field("raw", description="ema: evaluate the moving average of the weights.")
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(256, description="Images per rank and forward pass.")
    few_shot: FewShot | None = Field(
        None, description="Also measure few-shot accuracy of the features, on examples of the training split."
    )

    @field_validator("few_shot", mode="before")
    @classmethod
    def _none_if_empty(cls, value: object) -> object:
        """Jobs stored before there was few-shot evaluation hold an empty list."""
        return None if value in ([], ()) else value

    @property
    def happens(self) -> bool:
        """Whether anything is evaluated at all."""
        return self.at_end or any((self.every_steps, self.every_epochs, self.every_examples))


__all__ = [
    "Checkpoint",
    "Decay",
    "Eval",
    "Every",
    "Fraction",
    "Loss",
    "Objective",
    "Optim",
    "Schedule",
    "SpikeRollback",
    "Train",
    "TrainedPart",
    "Weights",
    "Zero",
]
