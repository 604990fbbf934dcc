"""A recipe of `phi3-jax finetune` as users of transformers would run it.

PyTorch and transformers are optional, so only the functions that need them import them.
"""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from phi3_jax.config.model_checks import PROBLEM_TYPES
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.lora import save_adapters
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.model.saving import save_model
from phi3_jax.trainer.objectives import Objective
from phi3_jax.trainer.optimizers import decays

from .recipe import Recipe, new_model, with_adapters

CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
}
"""The classes of transformers, by task."""

Tensor: TypeAlias = Any
"""A torch.Tensor."""
Tensors: TypeAlias = dict[str, Tensor]

DROPOUT_RATES = ("attention_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout")


class TransformersTraining:
    """The training of a recipe with transformers' model, PEFT's adapters and PyTorch's AdamW.

    As usual there, trained parameters are float32, and a step computes under autocast to bfloat16 if that is
    the dtype; frozen parameters are stored in the dtype.
    """

    def __init__(self, recipe: Recipe):
        import torch

        settings, model_type = recipe.settings, recipe.config.model_type
        if model_type != Phi3Config.model_type:
            raise UserError(f"transformers has no model of model_type {model_type!r} to compare with")
        torch.manual_seed(settings.seed)
        self._kind, self._settings = recipe.kind, settings
        self._objective = Objective(settings.label_smoothing, recipe.data.class_weights)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = _model(recipe).to(self._device)
        self._trained = {name: x for name, x in self._model.named_parameters() if x.requires_grad}
        decay = decays(self._trained)
        groups = [
            {"params": [x for name, x in self._trained.items() if decay[name] == flag], "weight_decay": rate}
            for flag, rate in ((True, settings.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,
        )

    def step(self, batches: Sequence[Mapping[str, np.ndarray]], learning_rate: float) -> float:
        """Updates the parameters by the batches of a step; returns their loss before the update."""
        import torch

        tensors = [self._tensors(arrays) for arrays in batches]
        count = sum(self._count(rows["labels"], self._objective) for rows in tensors) or 1.0
        # As in `finetune`, several batches are themselves the micro-batches.
        parts = self._settings.gradient_accumulation_steps if len(batches) == 1 else 1
        self._model.train()
        loss = 0.0
        for rows, part in product(tensors, range(parts)):
            some = {name: x[part::parts] for name, x in rows.items()}
            if not len(some["input_ids"]):
                continue
            logits, labels = self._forward(some)
            value = self._loss_sum(logits, labels, self._objective) / count
            value.backward()
            loss += value.item()
        if self._settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trained.values(), self._settings.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def score(self, arrays: Mapping[str, np.ndarray]) -> tuple[float, float, tuple[np.ndarray, ...]]:
        """Returns the sum of a batch's losses, the count that divides it, and arrays of the rows."""
        import torch

        rows, plain = self._tensors(arrays), Objective()
        self._model.eval()
        with torch.no_grad():
            logits, labels = self._forward(rows)
            losses = self._loss_sum(logits, labels, plain).item(), self._count(rows["labels"], plain) or 1.0
        outputs: tuple[np.ndarray, ...] = ()
        if self._kind in PROBLEM_TYPES:
            outputs = (logits.cpu().numpy(),)
        elif self._kind == "token-classification":
            best = logits.softmax(-1).max(-1)
            outputs = best.indices.cpu().numpy(), best.values.cpu().numpy()
        return *losses, outputs

    def trained(self) -> Tensors:
        """Returns a copy of the trained parameters."""
        return {name: x.detach().clone() for name, x in self._trained.items()}

    def restore(self, trained: Tensors) -> None:
        """Restores the parameters that `trained` returned."""
        for name, x in self._trained.items():
            x.data.copy_(trained[name])

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> Tensors:
        """Returns a batch as PyTorch takes it: without padding rows, because its shapes may vary."""
        import torch

        real = arrays["attention_mask"].any(axis=1)
        # transformers separates the examples of a packed row by their positions, but only without a mask.
        unused = {"weights", "segment_ids"} | ({"attention_mask"} if "segment_ids" in arrays else set())
        tensors = {name: torch.from_numpy(x[real]) for name, x in arrays.items() if name not in unused}
        return {
            name: (x if x.is_floating_point() else x.long()).to(self._device) for name, x in tensors.items()
        }

    def _forward(self, rows: Tensors) -> tuple[Tensor, Tensor]:
        """Returns the logits in float32, and their labels."""
        import torch

        inputs = {name: x for name, x in rows.items() if name != "labels"}
        with torch.autocast(self._device, torch.bfloat16, enabled=self._settings.dtype == "bfloat16"):
            logits = self._model(**inputs, use_cache=False).logits.float()
        labels = rows["labels"]
        return (logits[:, :-1], labels[:, 1:]) if self._kind == "causal-lm" else (logits, labels)

    def _loss_sum(self, logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
        """Returns the sum of the losses, from PyTorch's loss function for the problem."""
        from torch.nn import functional

        weights, smoothing = self._weights(objective), objective.label_smoothing
        if self._kind == "regression":
            return functional.mse_loss(logits, labels.reshape(logits.shape), reduction="sum")
        if self._kind == "multi_label_classification":
            soft = (1 - smoothing) * labels + smoothing / 2
            return functional.binary_cross_entropy_with_logits(logits, soft, weights, reduction="sum")
        return functional.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            weights,
            ignore_index=IGNORE_INDEX,
            label_smoothing=smoothing,
            reduction="sum",
        )

    def _count(self, labels: Tensor, objective: Objective) -> float:
        """Returns the labels that count, by their weights; their number divides the sum of the losses."""
        if labels.is_floating_point():
            return float(labels.numel())
        labels = labels[:, 1:] if self._kind == "causal-lm" else labels
        counted = labels[labels != IGNORE_INDEX]
        weights = self._weights(objective)
        return float(counted.numel() if weights is None else weights[counted].sum())

    def _weights(self, objective: Objective) -> Tensor | None:
        import torch

        weights = objective.class_weights
        return None if weights is None else torch.tensor(weights, device=self._device)


def _model(recipe: Recipe) -> Any:
    """Returns transformers' model with the parameters that ours has before the first step."""
    import torch
    import transformers

    settings = recipe.settings
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="phi3-jax-bench-") as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        ours = new_model(recipe, None)
        save_model(ours, base)
        if settings.trained == "lora":
            save_adapters(with_adapters(ours, recipe), adapter, base_model=str(base))
        dtype = getattr(torch, ours.dtype.name)
        del ours
        config = transformers.AutoConfig.from_pretrained(base)
        if not settings.dropout:
            for rate in DROPOUT_RATES:
                setattr(config, rate, 0.0)
        kind = getattr(transformers, CLASSES[settings.task])
        model = kind.from_pretrained(base, config=config, dtype=dtype)
        if recipe.remat != "none":
            model.activation_checkpointing_enable()
        if settings.trained == "lora":
            from peft import PeftModel

            with warnings.catch_warnings():
                # PEFT uses an old name of transformers.
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout) and not settings.dropout:
                    module.p = 0.0
    for name, parameter in model.named_parameters():
        if settings.trained == "head":
            parameter.requires_grad_("score" in name.split("."))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
